"""Triton's generate extension: one JSON object in, one out, or one for each part as server-sent events.

    POST /v2/models/m/generate          {"text_input": "Once", "parameters": {"count": 3}}
    {"model_name": "m", "model_version": "1.0", "text_output": "upon a time"}

A handler of an archive's own gets the object as it came, as a JSON body of ``/predictions``; what it answers or yields
is ``text_output``. For a built-in handler members of the object, and of ``parameters``, are inputs by their names;
``text_input`` is the one of a handler that takes texts.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

from pyserve.api import open_inference_models as models
from pyserve.api.coded_bodies import CodedBodies
from pyserve.api.event_streams import EVENT_STREAM, event, one_line
from pyserve.api.inference import PREDICT_HEADER, Undoing
from pyserve.api.kserve_requests import names_of_inputs
from pyserve.api.open_inference import InferInput, InferOutput, InferRequest, InferResponse, check_input, quoted
from pyserve.api.open_inference_json import outputs_in_json
from pyserve.api.open_inference_rest import QUICK_JSON_SIZE_MAX, QUICK_VALUE_COUNT_MAX, json_values
from pyserve.api.transport import Transport
from pyserve.errors import HandlerError, InputError, JsonObject, ServeError
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.request.datatypes import BYTES, datatype_of
from pyserve.request.exchange import Exchange, Part
from pyserve.request.json_body import parse_json
from pyserve.request.messages import ErrorFormat, ExtraHeaders, Request, Response
from pyserve.request.relay import Relay

JSON = "application/json"
TEXT_INPUT, TEXT_OUTPUT = "text_input", "text_output"
# Answers of more bytes are not made on the loop.
_QUICK_SIZE_MAX = 64 << 10
_EVENTS = f"{EVENT_STREAM}; charset=utf-8"
_HEADERS = ExtraHeaders(PREDICT_HEADER, ("url_path", ""))


class Generate:
    """The endpoints. Loop thread only.

    Args:
        response_size_max: bytes of an answer.
    """

    def __init__(self, registry: Registry, bodies: CodedBodies, error_format: ErrorFormat, response_size_max: int):
        self._registry = registry
        self._bodies = bodies
        self._error_format = error_format
        self._size_max = response_size_max

    def endpoint(self, *, streams: bool) -> Callable[..., Undoing]:
        """``generate``, or ``generate_stream``."""

        async def run(exchange: Exchange, model_name: str, model_version: str | None = None) -> None:
            model = self._registry.get(model_name, model_version)
            request = exchange.request
            if self._bodies.are_undone(request, model, has_tensors=True):
                await self._bodies.undo(exchange, lambda: None)
            told = await _read(request)
            if exchange.disconnected:
                return
            version = model_version or "default"
            if model.built_in_handler is not None:
                transport = GenerateTransport(told, model, self._size_max, streams=streams)
                models.infer(model, exchange, transport, version)
                return
            if request.content_type != JSON:
                request.replace_headers(("content-type",), [("Content-Type", JSON)])
            request.add_headers(_HEADERS)
            kind = GeneratedEvents if streams else GeneratedObject
            answer = kind(exchange, model, told, self._error_format, self._size_max)
            model.predict(answer.exchange, version)

        return run


async def _read(request: Request) -> JsonObject:
    """The object that was sent.

    Raises:
        InputError: it is none.
    """
    if len(request.body) <= QUICK_JSON_SIZE_MAX:
        told = parse_json(request.body)
    else:
        told = await asyncio.to_thread(parse_json, request.body, in_slices=True)
    if not isinstance(told, dict):
        raise InputError('the request needs a JSON object such as {"text_input": "...", "parameters": {}}')
    if not isinstance(told.get("parameters", {}), dict):
        raise InputError('"parameters" must be an object of names and values')
    if not isinstance(told.get("id", ""), str):
        raise InputError('"id" must be a string')
    return told


# --- handlers of an archive's own -------------------------------------------------------------------------------------


class GeneratedObject(Relay):
    """All that a handler answers, as one object."""

    def __init__(
        self, outer: Exchange, model: Model, told: JsonObject, error_format: ErrorFormat, size_max: int
    ):  # fmt: skip
        super().__init__(outer)
        self._about = {"model_name": model.name, "model_version": model.version}
        self._about |= {"id": told["id"]} if told.get("id") else {}
        self._error_format = error_format
        self._size_max = size_max
        self._parts: list[bytes] = []
        self._size = 0

    def whole(self, response: Response) -> None:
        if response.status >= 300 or response.error is not None:
            self.outer.respond(response)
            return
        self._answer([b"".join((response.body, *response.tail))])

    def begin(self, head: Response) -> None:
        """Its parts are kept."""

    def part(self, part: Part) -> None:
        self._parts.append(bytes(part))
        self._size += len(self._parts[-1])
        if self._size > self._size_max:
            self.leave()
            self._refuse(HandlerError(
                f"the parts of the answer have more than max_response_size={self._size_max} bytes; ask for "
                "generate_stream, or raise it in config.properties"
            ))  # fmt: skip

    def end(self) -> None:
        self._answer(self._parts)

    def fail(self, failure: Response | None) -> None:
        if failure is not None:
            self.outer.respond(failure)
        else:
            self._refuse(HandlerError("Prediction failed"))

    def _answer(self, parts: list[bytes]) -> None:
        if sum(map(len, parts)) <= _QUICK_SIZE_MAX:
            self.outer.respond(self._made(parts))
            return
        making = asyncio.get_running_loop().run_in_executor(None, self._made, parts)
        making.add_done_callback(lambda made: self.outer.respond(made.result()))

    def _made(self, parts: list[bytes]) -> Response:
        """The answer, or an error. Any thread."""
        try:
            return self._encoded(parts)
        except ServeError as error:
            return self._error_format.answer(error, self.outer.request)
        except RecursionError:
            nested = HandlerError("the handler's answer is nested too deeply; answer with less in it")
            return self._error_format.answer(nested, self.outer.request)

    def _encoded(self, parts: list[bytes]) -> Response:
        said = [generated(part) for part in parts]
        texts = [each[TEXT_OUTPUT] for each in said if set(each) == {TEXT_OUTPUT}]
        if len(said) == 1:
            answer = said[0]
        elif len(texts) == len(said) and all(isinstance(each, str) for each in texts):
            answer = {TEXT_OUTPUT: "".join(texts)}
        else:
            raise HandlerError(
                f"the handler answered in {len(said)} parts that are more than texts; ask for generate_stream"
            )
        return Response(200, _dump(answer | self._about), content_type=JSON)

    def _refuse(self, error: ServeError) -> None:
        self.outer.respond(self._error_format.answer(error, self.outer.request))


class GeneratedEvents(GeneratedObject):
    """Each part that a handler yields is an event with an object."""

    def begin(self, head: Response) -> None:
        self.outer.start_stream(Response(head.status, b"", content_type=_EVENTS, headers={"X-Accel-Buffering": "no"}))

    def part(self, part: Part) -> None:
        try:
            self.outer.write(self._event(bytes(part)))
        except ServeError as error:
            self.leave()
            self.fail(self._error_format.answer(error, self.outer.request))

    def end(self) -> None:
        self.outer.end_stream()

    def fail(self, failure: Response | None) -> None:
        self.outer.end_stream(event(one_line(failure)))

    def _encoded(self, parts: list[bytes]) -> Response:
        return Response(200, b"".join(self._event(part) for part in parts), content_type=_EVENTS)

    def _event(self, part: bytes) -> bytes:
        return event(_dump(generated(part) | self._about).decode())


def generated(part: bytes) -> JsonObject:
    """What a handler answered, as members of the answer: an object with ``text_output`` as it is, outputs of the Open
    Inference Protocol by their names, any other text as ``text_output``.

    Raises:
        HandlerError: it is no text.
    """
    if part[:1] == b"{":
        if b'"outputs"' in part and (outputs := outputs_in_json(part)):
            return {output.name: _value_of(output) for output in outputs}
        if b'"text_output"' in part:
            try:
                told = json.loads(part, parse_constant=lambda name: None)  # JSON has no word for them
            except (ValueError, RecursionError):
                told = None
            if isinstance(told, dict) and TEXT_OUTPUT in told:
                return told
    try:
        return {TEXT_OUTPUT: part.decode()}
    except UnicodeDecodeError:
        raise HandlerError("the handler's answer is not text; ask for it at /predictions") from None


# --- built-in handlers ------------------------------------------------------------------------------------------------


class GenerateTransport(Transport):
    """That of one object for a built-in handler.

    Args:
        told: the object.
        size_max: bytes of an answer.
        streams: the answer is an event.
    """

    __slots__ = ("_is_quick", "_size_max", "_streams", "_takes_texts", "_told", "_wanted")

    def __init__(self, told: JsonObject, model: Model, size_max: int, *, streams: bool):
        self._told = told
        self._size_max = size_max
        self._streams = streams
        specs = models.specs_of(model)
        self._takes_texts = specs is None
        # Name, datatype and rank of a row of each input.
        self._wanted = [(TEXT_INPUT, BYTES, 0)]
        if specs is not None:
            self._wanted = [
                (name, datatype_of(spec.torch_dtype), len(spec.sizes))
                for name, spec in zip(names_of_inputs(specs), specs, strict=True)
            ]

    @property
    def is_read_quick(self) -> bool:
        return all(not isinstance(value, list) for value in self._told.values())

    def read(self) -> InferRequest:
        told, parameters = self._told, self._told.get("parameters", {})
        names = [name for name, _, _ in self._wanted]
        unread = [name for name in told if name not in (*names, "id", "parameters")]
        if unread:
            raise InputError(
                f"the request has a member {quoted(unread[0])} that nothing reads; the model's inputs are "
                f"{', '.join(map(repr, names))}"
            )
        inputs = []
        for name, datatype, rank in self._wanted:
            if name not in told and name not in parameters:
                raise InputError(f"the request has no {name!r}; the model's inputs are {', '.join(map(repr, names))}")
            inputs.append(_tensor(name, datatype, rank, told.get(name, parameters.get(name))))
        rest = {name: value for name, value in parameters.items() if name not in names}
        return InferRequest(inputs, id=told.get("id", ""), parameters=rest)

    def is_encode_quick(self, request: InferRequest, outputs: list[InferOutput]) -> bool:
        return all(math.prod(output.shape) <= QUICK_VALUE_COUNT_MAX for output in outputs)

    def encode(self, request: InferRequest, response: InferResponse) -> Response:
        answer: JsonObject = {"model_name": response.model_name, "model_version": response.model_version}
        answer |= {"id": response.id} if response.id else {}
        is_text = self._takes_texts and len(response.outputs) == 1 and response.outputs[0].datatype == BYTES
        for output in response.outputs:
            answer[TEXT_OUTPUT if is_text else output.name] = _value_of(output)
        body = _dump(answer)
        if len(body) > self._size_max:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={self._size_max}; "
                "raise it in config.properties"
            )
        if self._streams:
            return Response(200, event(body.decode()), content_type=_EVENTS)
        return Response(200, body, content_type=JSON)

    def of_copy(self, request: Request) -> GenerateTransport:
        return self  # nothing of it is changed


def _tensor(name: str, datatype: str, rank: int, value: Any) -> InferInput:
    """One row, or as many as the value has in a list around them."""
    shape: list[int] = []
    at = value
    while isinstance(at, list):
        shape.append(len(at))
        at = at[0] if at else None
    data = value
    if len(shape) == rank:
        shape, data = [1, *shape], [value]
    elif rank == 0 and datatype == BYTES and len(shape) != 1:
        raise InputError(f"{name!r} must be a string, or a list of strings")
    if datatype == BYTES and not all(isinstance(each, str) for each in data):
        raise InputError(f"{name!r} must be a string, or a list of strings")
    if not shape:
        raise InputError(f"{name!r} must be a list of numbers")
    tensor = InferInput(name, datatype, tuple(shape), data)
    check_input(tensor)
    return tensor


def _value_of(output: InferOutput) -> Any:
    values = json_values(output)
    return values[0] if len(values) == 1 else values


def _dump(value: JsonObject) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")
