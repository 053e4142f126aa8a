"""TorchServe's inference service over gRPC.

Inputs reach the handler as they came: ``bytearray`` under the names that the client gave them, without headers.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from pyserve.api.inference import Inference
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, ServeError
from pyserve.grpc_api.call import Call, Prediction
from pyserve.grpc_api.messages import INFERENCE, message
from pyserve.grpc_api.service import Method, Service
from pyserve.grpc_api.status import MissingParameterError, judge_prediction, status_text
from pyserve.grpc_api.streams import Begun, Streams, with_position
from pyserve.lanes.sequences import SEQUENCE_PREFIX
from pyserve.models.registry import Registry
from pyserve.request import codec
from pyserve.request.ids import new_id
from pyserve.request.messages import ErrorFormat, Headers
from pyserve.request.stages import ANSWER_HEADER

_Request = message(f"{INFERENCE}.PredictionsRequest")
_Response = message(f"{INFERENCE}.PredictionResponse")
_Health = message(f"{INFERENCE}.TorchServeHealthResponse")
_Empty = message("google.protobuf.Empty")


class InferenceService:
    """``InferenceAPIsService``. Loop thread only."""

    def __init__(
        self, registry: Registry, inference: Inference, config: Config, error_format: ErrorFormat, streams: Streams
    ):
        self._registry = registry
        self._inference = inference
        self._size_max = config.max_response_size
        self._id_key = config.ts_header_key_sequence_id
        self._start_key = config.ts_header_key_sequence_start
        self._error_format = error_format
        self._streams = streams

    def service(self) -> Service:
        """Its table."""
        methods = (
            Method("Ping", self.ping, _Empty, is_open=True),
            Method("Predictions", self.predictions, _Request),
            Method("StreamPredictions", self.stream_predictions, _Request, tells_many=True),
            Method("StreamPredictions2", self.stream_predictions_2, _Request, tells_many=True, asks_many=True),
        )
        return Service(f"{INFERENCE}.InferenceAPIsService", methods, judge_prediction, "inference")

    async def ping(self, call: Call, _: Any) -> Any:
        """Healthy or Unhealthy, as ``/ping``; both are answers, not errors."""
        status = "Healthy" if self._inference.is_healthy else "Unhealthy"
        return _Health(health=json.dumps({"status": status}, indent=2))

    async def predictions(self, call: Call, message: Any) -> Any:
        """One request, one answer."""
        response = await self._begin(call, message, self._sequence_headers(message)).answer()
        if ANSWER_HEADER in response.headers:
            call.told.append((ANSWER_HEADER.lower(), response.headers[ANSWER_HEADER]))
        return _Response(prediction=bytes(response.body))

    async def stream_predictions(self, call: Call, message: Any) -> AsyncIterator[Any]:
        """One request, its answer in the parts that the handler makes; of one that makes none in one."""
        prediction = self._begin(call, message, self._sequence_headers(message))
        async for part in prediction.parts():
            yield _Response(prediction=bytes(part))

    async def stream_predictions_2(self, call: Call, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Requests of sequences, each sequence's answered in their order; answers bear its id, errors come beside it.

        Answers of different sequences leave as they come.
        """
        last_id = ""
        are_mixed = False  # requests of several sequences take turns, so that one without an id may be of any
        positions = itertools.count()

        def begin(message: Any) -> Begun:
            nonlocal last_id, are_mixed
            id = message.sequence_id
            request_id = new_id()
            position = next(positions)
            try:
                headers = self._sequence_headers(message)
                if not headers and not last_id:
                    raise BadRequestError(
                        f"The stream's first request needs sequence_id, or an input {self._start_key} that is true."
                    )
                if not headers and are_mixed:
                    raise BadRequestError("The requests of this stream are of several sequences; give sequence_id.")
                are_mixed = are_mixed or (len(headers) == 1 and last_id not in ("", id))
                id = id or (headers[0][1] if headers else last_id)
                last_id = id
                prediction: Prediction | ServeError = self._begin(
                    call, message, headers or [(self._id_key, id)], request_id
                )
            except ServeError as error:
                prediction = error
            return Begun(id, self._answers(prediction, id, position, request_id))

        async for answer in self._streams.run(messages, begin):
            yield answer

    async def _answers(
        self, prediction: Prediction | ServeError, id: str, position: int, request_id: str
    ) -> AsyncGenerator[Any, None]:
        try:
            if isinstance(prediction, ServeError):
                raise prediction
            async with aclosing(prediction.parts()) as parts:
                async for part in parts:
                    yield _Response(prediction=bytes(part), sequence_id=id)
        except ServeError as error:
            error = with_position(error, position)
            verdict = judge_prediction(error)
            answer = _Response(sequence_id=id or None)
            answer.status.code = verdict.code.value[0]
            answer.status.message = status_text(error, verdict, self._error_format, request_id)
            yield answer

    def _begin(self, call: Call, message: Any, headers: Headers, request_id: str = "") -> Prediction:
        """Hands the request to its model.

        Raises:
            ServeError: it cannot be.
        """
        if not message.model_name:
            raise MissingParameterError("model_name")
        version = message.model_version or None
        model = self._registry.get(message.model_name, version)
        body, sizes = codec.join_fields(message.input)
        request = call.request(headers=headers, body=body, query=sizes, id=request_id, is_new=bool(request_id))
        prediction = Prediction(request, self._size_max)
        model.predict(prediction.exchange, version or "default", query_is_input=True, flags=codec.FIELDS)
        call.is_counted = True
        return prediction

    def _sequence_headers(self, message: Any) -> Headers:
        """What the lane has to know about the sequence; nothing if the request says nothing about one."""
        starts = message.input[self._start_key].strip().lower() if self._start_key in message.input else b""
        is_start = starts not in (b"", b"false", b"0")
        id = message.sequence_id
        if not id and is_start:
            id = SEQUENCE_PREFIX + new_id()
        if not id:
            return []
        if not (id.isascii() and id.isprintable()):
            raise BadRequestError("sequence_id must be printable ASCII text.")
        return [(self._id_key, id), *([(self._start_key, "true")] if is_start else [])]
