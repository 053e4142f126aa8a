"""The Open Inference Protocol over gRPC, as Triton's and KServe's clients speak it.

Tensors come as raw bytes or in typed lists, and go back as raw bytes, which every such client reads; in lists if the
request came in lists, which is what the protocol has without Triton's extension.
"""

from __future__ import annotations

import array
import itertools
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import torch
from google.protobuf.json_format import ParseDict

from pyserve.api import open_inference_models
from pyserve.api.inference import Inference
from pyserve.api.kserve_requests import sequence_id
from pyserve.api.model_configuration import model_configuration
from pyserve.api.model_repository import ModelRepository
from pyserve.api.open_inference import (
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    RequestedOutput,
    check_input,
    elements_of,
    quoted,
    tensor_of,
)
from pyserve.api.transport import Transport
from pyserve.api.triton_extensions import model_control_elsewhere
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, HandlerError, InputError, JsonObject, ModelNotFoundError, ServeError
from pyserve.grpc_api.call import Call, Prediction
from pyserve.grpc_api.messages import OPEN_INFERENCE, message
from pyserve.grpc_api.service import Method, Service
from pyserve.grpc_api.status import MissingParameterError, judge_open_inference, status_text
from pyserve.grpc_api.streams import Begun, Streams, with_position
from pyserve.lanes.audit import Repetition
from pyserve.lanes.lane import Lane
from pyserve.lanes.pending import Pending
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.request.datatypes import BYTES
from pyserve.request.exchange import Exchange
from pyserve.request.ids import new_id
from pyserve.request.messages import ErrorFormat, Headers, Request, Response
from pyserve.telemetry.metrics import Metrics

# datatype -> the list of InferTensorContents that its values stand in; FP16 and BF16 have none.
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", BYTES: "bytes_contents",
}  # fmt: skip
# Lists longer than this are not read on the loop.
QUICK_VALUE_COUNT_MAX = 1024
assert sys.byteorder == "little"


class OpenInferenceService:
    """``GRPCInferenceService``. Loop thread only."""

    def __init__(
        self, registry: Registry, inference: Inference, config: Config, error_format: ErrorFormat, streams: Streams, *,
        metrics: Metrics, repository: ModelRepository, management_address: str,
    ):  # fmt: skip
        self._repository = repository
        self._management_address = management_address
        self._registry = registry
        self._inference = inference
        self._size_max = config.max_response_size
        self._id_key = config.ts_header_key_sequence_id
        self._start_key = config.ts_header_key_sequence_start
        self._error_format = error_format
        self._streams = streams
        self._metrics = metrics

    def service(self, package: str, *, has_inference: bool, has_control: bool) -> Service:
        """Its table, under one of its names.

        Args:
            has_inference: whether the listener is that of inference: models are run there, with its key. Else the
                others need the key of management.
            has_control: whether models are loaded and unloaded there, with the key of management.
        """

        def of(name: str) -> Any:  # one wire form: the messages of the standard's package do for both
            return message(f"{OPEN_INFERENCE}.{name}Request")

        index = self.repository_index if has_control else self.registered_index
        load, unload = (self.load, self.unload) if has_control else (self.refuse_control, self.refuse_control)
        methods = [
            Method("ServerLive", self.server_live, of("ServerLive"), is_open=True),
            Method("ServerReady", self.server_ready, of("ServerReady"), is_open=True),
            Method("ModelReady", self.model_ready, of("ModelReady")),
            Method("ServerMetadata", self.server_metadata, of("ServerMetadata")),
            Method("ModelMetadata", self.model_metadata, of("ModelMetadata")),
            Method("ModelStatistics", self.model_statistics, of("ModelStatistics")),
            Method("ModelConfig", self.model_config, of("ModelConfig")),
            Method("RepositoryIndex", index, of("RepositoryIndex")),
            Method("RepositoryModelLoad", load, of("RepositoryModelLoad"), scope="management"),
            Method("RepositoryModelUnload", unload, of("RepositoryModelUnload"), scope="management"),
        ]
        if has_inference:
            methods += [
                Method("ModelInfer", self.model_infer, of("ModelInfer")),
                Method("ModelStreamInfer", self.model_stream_infer, of("ModelInfer"), tells_many=True, asks_many=True),
            ]
        name, scope = f"{package}.GRPCInferenceService", "inference" if has_inference else "management"
        return Service(name, tuple(methods), judge_open_inference, scope)

    # --- health and metadata --------------------------------------------------------------------------------------

    async def server_live(self, call: Call, asked: Any) -> Any:
        """True as long as there is an answer."""
        return _new("ServerLiveResponse", live=True)

    async def server_ready(self, call: Call, asked: Any) -> Any:
        """Whether every model can answer, as ``/ready``."""
        return _new("ServerReadyResponse", ready=self._inference.is_healthy)

    async def model_ready(self, call: Call, asked: Any) -> Any:
        """Whether the model can answer."""
        model = self._find(asked.name, asked.version)
        return _new("ModelReadyResponse", ready=model.has_ready_worker and self._inference.is_ready)

    async def server_metadata(self, call: Call, asked: Any) -> Any:
        """Name, version, extensions."""
        about = open_inference_models.server_metadata()
        return ParseDict(about, _new("ServerMetadataResponse"), ignore_unknown_fields=True)

    async def model_metadata(self, call: Call, asked: Any) -> Any:
        """Versions, inputs and outputs."""
        model = self._find(asked.name, asked.version)
        versions = [each.version for each in self._registry.versions(model.name)]
        about = await open_inference_models.model_metadata(model, versions)
        return ParseDict(about, _new("ModelMetadataResponse"), ignore_unknown_fields=True)

    async def model_statistics(self, call: Call, asked: Any) -> Any:
        """Of one model, or of all."""
        if asked.name and not asked.version:
            models = self._registry.versions(asked.name)
            if not models:
                raise ModelNotFoundError(f"Model not found: {asked.name}")
        elif asked.name:
            models = [self._find(asked.name, asked.version)]
        else:
            models = self._registry.all_models()
        is_whole = bool(asked.name) and not asked.version
        told = open_inference_models.statistics(models, self._metrics, has_whole_numbers=is_whole)
        return ParseDict(told, _new("ModelStatisticsResponse"), ignore_unknown_fields=True)

    async def model_config(self, call: Call, asked: Any) -> Any:
        """What Triton's ``config.pbtxt`` would say of the model."""
        told = await model_configuration(self._find(asked.name, asked.version))
        return ParseDict({"config": told}, _new("ModelConfigResponse"))

    # --- the models that there are --------------------------------------------------------------------------------

    async def registered_index(self, call: Call, asked: Any) -> Any:
        """All models with their states; with ``ready`` only those that can answer."""
        return _index(self._repository.registered(only_ready=asked.ready))

    async def repository_index(self, call: Call, asked: Any) -> Any:
        """The same, and what of the model store is not loaded."""
        return _index(await self._repository.index(only_ready=asked.ready, authorization=call.authorization))

    async def load(self, call: Call, asked: Any) -> Any:
        """Returns when the model can answer."""
        await self._repository.load(_asked_name(asked), _values_of(asked.parameters))
        return _new("RepositoryModelLoadResponse")

    async def unload(self, call: Call, asked: Any) -> Any:
        """Returns when it has finished its requests and is gone."""
        await self._repository.unload(_asked_name(asked), _values_of(asked.parameters))
        return _new("RepositoryModelUnloadResponse")

    async def refuse_control(self, call: Call, asked: Any) -> Any:
        """A port that is open to those who ask for predictions must not let them take models away."""
        raise model_control_elsewhere(self._management_address)

    def _find(self, name: str, version: str) -> Model:
        if not name:
            raise MissingParameterError("name")
        return self._registry.get(name, version or None)

    # --- inference ------------------------------------------------------------------------------------------------

    async def model_infer(self, call: Call, asked: Any) -> Any:
        """One request, one answer."""
        return _Encoded((await self._begin(call, asked).answer()).body)

    async def model_stream_infer(self, call: Call, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Answers in the order of the requests, each with its request's id; errors come as text beside it.

        A request without an id has its position in the stream, from 0, in place of one.
        """
        positions = itertools.count()

        def begin(asked: Any) -> Begun:
            request_id = new_id()
            position = next(positions)
            try:
                prediction: Prediction | ServeError = self._begin(call, asked, request_id)
            except ServeError as error:
                prediction = error
            return Begun("", self._stream_answer(prediction, asked.id or str(position), position, request_id))

        async for answer in self._streams.run(messages, begin):
            yield answer

    async def _stream_answer(
        self, prediction: Prediction | ServeError, id: str, position: int, request_id: str
    ) -> AsyncGenerator[Any, None]:
        try:
            if isinstance(prediction, ServeError):
                raise prediction
            response = message(f"{OPEN_INFERENCE}.ModelInferResponse").FromString((await prediction.answer()).body)
            response.id = id
            yield _new("ModelStreamInferResponse", infer_response=response)
        except ServeError as error:
            error = with_position(error, position)  # clients that show no answer beside an error show its text
            text = status_text(error, judge_open_inference(error), self._error_format, request_id)
            answer = _new("ModelStreamInferResponse", error_message=text)
            answer.infer_response.id = id
            yield answer

    def _begin(self, call: Call, asked: Any, request_id: str = "") -> Prediction:
        """Hands the request to its model.

        Raises:
            ServeError: it cannot be.
        """
        if not asked.model_name:
            raise MissingParameterError("model_name")
        version = asked.model_version or None
        model = self._registry.get(asked.model_name, version)
        request = call.request(headers=self._sequence_headers(asked), id=request_id, is_new=bool(request_id))
        prediction = Prediction(request, self._size_max)
        transport = GrpcTransport(asked, self._size_max)
        open_inference_models.infer(model, prediction.exchange, transport, version or "default")
        call.is_counted = True
        return prediction

    def _sequence_headers(self, asked: Any) -> Headers:
        """What the lane has to know about the sequence that the parameters name, as Triton's clients have it."""
        parameters = _values_of(asked.parameters)
        id = sequence_id(parameters)
        if not id:
            return []
        if not (id.isascii() and id.isprintable()):
            raise InputError("the parameter 'sequence_id' must be a number or printable ASCII text")
        starts = parameters.get("sequence_start") is True
        return [(self._id_key, id), *([(self._start_key, "true")] if starts else [])]


class _Encoded:
    """A message that is encoded already."""

    def __init__(self, body: Any):
        self._body = bytes(body)

    def SerializeToString(self) -> bytes:
        """As of every message."""
        return self._body


def _new(name: str, **fields: Any) -> Any:
    return message(f"{OPEN_INFERENCE}.{name}")(**fields)


def _index(rows: list[JsonObject]) -> Any:
    answer = _new("RepositoryIndexResponse")
    for row in rows:
        answer.models.add(**row)
    return answer


def _asked_name(asked: Any) -> str:
    if asked.repository_name:
        raise BadRequestError(f"There is no model repository {quoted(asked.repository_name)}; leave its name out.")
    if not asked.model_name:
        raise MissingParameterError("model_name")
    return str(asked.model_name)


class GrpcTransport(Transport):
    """That of a ``ModelInferRequest``.

    Args:
        size_max: bytes of an answer.
    """

    __slots__ = ("_asked", "_is_in_lists", "_size_max")
    bytes_as_base64 = True

    def __init__(self, asked: Any, size_max: int):
        self._asked = asked
        self._is_in_lists = not asked.raw_input_contents
        self._size_max = size_max

    @property
    def is_read_quick(self) -> bool:
        return not self._is_in_lists or all(
            len(_contents(each)) <= QUICK_VALUE_COUNT_MAX for each in self._asked.inputs if each.datatype in _CONTENTS
        )

    def read(self) -> InferRequest:
        """The request. Raw tensors look into its bytes. InputError if it is not of the protocol."""
        asked = self._asked
        raw = asked.raw_input_contents
        if raw and len(raw) != len(asked.inputs):
            raise InputError(
                f"raw_input_contents has {len(raw)} entries for {len(asked.inputs)} inputs; give one for each"
            )
        if not asked.inputs:
            raise InputError("the request has no inputs")
        inputs = []
        for index, tensor in enumerate(asked.inputs):
            data: Any
            if raw:
                if tensor.HasField("contents"):
                    name = quoted(tensor.name)
                    raise InputError(f"input {name} has contents beside raw_input_contents; give one of them")
                data = memoryview(raw[index])
            else:
                data = _read_contents(tensor)
            read = InferInput(tensor.name, tensor.datatype, tuple(tensor.shape), data, _parameters(tensor.parameters))
            check_input(read)
            inputs.append(read)
        outputs = [RequestedOutput(each.name, _parameters(each.parameters)) for each in asked.outputs]
        return InferRequest(inputs, id=asked.id, outputs=outputs, parameters=_parameters(asked.parameters))

    def is_encode_quick(self, request: InferRequest, outputs: list[InferOutput]) -> bool:
        return not self._is_in_lists or _are_few(outputs)

    def encode(self, request: InferRequest, response: InferResponse) -> Response:
        """The ``ModelInferResponse``, as the body of the answer. HandlerError if it is larger than it may be."""
        answer = _new("ModelInferResponse", model_name=response.model_name, model_version=response.model_version,
                      id=response.id)  # fmt: skip
        # Contents are all raw or all in lists; 16-bit numbers have no list.
        in_lists = self._is_in_lists and all(output.datatype in _CONTENTS for output in response.outputs)
        for output in response.outputs:
            entry = answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
            if in_lists:
                values = output.data if isinstance(output.data, list) else output.values()
                getattr(entry.contents, _CONTENTS[output.datatype]).extend(values)
            else:
                answer.raw_output_contents.append(bytes(output.raw()))
        body = answer.SerializeToString()
        if len(body) > self._size_max:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={self._size_max}; "
                "raise it in config.properties"
            )
        return Response(200, body)

    def of_copy(self, request: Request) -> GrpcTransport:
        asked = message(f"{OPEN_INFERENCE}.ModelInferRequest").FromString(bytes(request.body))
        return GrpcTransport(asked, self._size_max)

    def repetition(self, again: Callable[[Lane, Exchange], Pending]) -> Repetition:
        return Repetition(again, self._asked.SerializeToString, outputs_of)


def _are_few(outputs: list[InferOutput]) -> bool:
    return all(
        output.data.numel() <= QUICK_VALUE_COUNT_MAX if isinstance(output.data, torch.Tensor)
        else len(output.data) <= QUICK_VALUE_COUNT_MAX
        for output in outputs
    )  # fmt: skip


def _contents(tensor: Any) -> Any:
    return getattr(tensor.contents, _CONTENTS[tensor.datatype])


def _read_contents(tensor: Any) -> Any:
    if tensor.datatype not in _CONTENTS:
        if tensor.datatype in ("FP16", "BF16"):
            raise InputError(f"input {quoted(tensor.name)} is {tensor.datatype}, which goes as raw_input_contents only")
        return []  # an unknown datatype, which is refused by that name
    unread = [field.name for field, _ in tensor.contents.ListFields() if field.name != _CONTENTS[tensor.datatype]]
    if unread:
        raise InputError(
            f"input {quoted(tensor.name)} is {tensor.datatype}, whose values are {_CONTENTS[tensor.datatype]}; it has "
            f"{unread[0]}"
        )
    values = _contents(tensor)
    if tensor.datatype == "FP32":  # through memory: as Python's numbers they would take ten times as long
        return memoryview(array.array("f", values)).cast("B")
    if tensor.datatype == "FP64":
        return memoryview(array.array("d", values)).cast("B")
    return list(values)


def _parameters(parameters: Any) -> dict[str, Any]:
    for name in ("shared_memory_region", "classification"):
        if name in parameters:
            instead = ", shared memory; send the tensor in raw_input_contents" if name.startswith("shared") else ""
            raise InputError(f"the parameter {name!r} is of an extension that this server does not have{instead}")
    return _values_of(parameters)


def _values_of(parameters: Any) -> dict[str, Any]:
    return {name: getattr(each, each.WhichOneof("parameter_choice") or "string_param")
            for name, each in parameters.items()}  # fmt: skip


def outputs_of(body: bytes) -> list[Any]:
    """Shape and data of each output in an encoded ``ModelInferResponse``; any thread."""
    answer = message(f"{OPEN_INFERENCE}.ModelInferResponse").FromString(body)
    found = []
    for index, each in enumerate(answer.outputs):
        raw = answer.raw_output_contents
        data = memoryview(bytearray(raw[index])) if raw else _read_contents(each)
        output = InferInput(each.name, each.datatype, tuple(each.shape), data, {})
        value: Any
        if each.datatype == BYTES:
            value = [element if isinstance(element, str) else bytes(element) for element in elements_of(output)]
        else:
            value = tensor_of(output)
        found.append([output.shape, value])
    return found
