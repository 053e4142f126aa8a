"""The Open Inference Protocol in HTTP: JSON, and the binary extension, where tensors follow the JSON as they are.

Inference-Header-Content-Length: 120
{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}]}<16 bytes>
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyserve.api.open_inference import (
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    RequestedOutput,
    check_input,
    quoted,
)
from pyserve.api.transport import Transport
from pyserve.body_kind import begins_as_object
from pyserve.errors import HandlerError, InputError
from pyserve.json_array import JsonArray
from pyserve.request.json_body import parse_json
from pyserve.request.json_pieces import dump_in_slices
from pyserve.request.messages import Request, Response

JSON_SIZE_HEADER = "Inference-Header-Content-Length"
JSON = "application/json"
BINARY = "application/octet-stream"
# JSON of this many bytes is read in less than 50 us.
QUICK_JSON_SIZE_MAX = 4096
QUICK_VALUE_COUNT_MAX = 1024
# Members that say something here. A client that sends another one means something by it.
_REQUEST_MEMBERS = frozenset({"id", "inputs", "model_name", "model_version", "outputs", "parameters"})
_INPUT_MEMBERS = frozenset({"data", "datatype", "name", "parameters", "shape"})
_OUTPUT_MEMBERS = frozenset({"name", "parameters"})
# Extensions that another server has, and that would change the answer: better refused than ignored.
_NOT_HERE = ("classification", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


RawInput = Callable[[memoryview], InferInput]


def has_no_json(request: Request) -> bool:
    """Whether the whole body is the one input, see `raw_input`."""
    return request.header(JSON_SIZE_HEADER).strip() == "0"


def is_infer_request(request: Request) -> bool:
    """Whether a body is meant to be of this protocol; else it is what TorchServe would bring to the handler."""
    return bool(request.header(JSON_SIZE_HEADER)) or begins_as_object(request.body)


def json_size(request: Request) -> int:
    """Bytes of the body that are JSON.

    Raises:
        InputError: the header that says so is wrong.
    """
    text = request.header(JSON_SIZE_HEADER).strip()
    if not text:
        return len(request.body)
    if not (text.isascii() and text.isdigit()) or not 0 < int(text[:20]) <= len(request.body):
        raise InputError(
            f"{JSON_SIZE_HEADER} is {text[:40]!r}; it must be the size of the JSON at the beginning of the body, 1 to "
            f"{len(request.body)} bytes"
        )
    return int(text)


class RestTransport(Transport):
    """That of a request in HTTP.

    Args:
        size_max: bytes of an answer.
        raw_input: makes the one input of a body that has no JSON.
    """

    __slots__ = ("_raw_input", "_request", "_size_max")
    passes_others = True

    def __init__(self, request: Request, size_max: int, raw_input: RawInput | None = None):
        self._request = request
        self._size_max = size_max
        self._raw_input = raw_input

    @property
    def is_read_quick(self) -> bool:
        told = self._request.header(JSON_SIZE_HEADER)
        size = int(told) if told.isascii() and told.isdigit() and len(told) < 10 else len(self._request.body)
        return size <= QUICK_JSON_SIZE_MAX

    def read(self) -> InferRequest:
        """The request. Binary tensors look into its body. InputError if it is not of the protocol."""
        body = self._request.body
        if self._raw_input is not None:
            return InferRequest([self._raw_input(memoryview(body))])
        size = json_size(self._request)
        told = body if size == len(body) else body[:size]
        value = parse_json(told, in_slices=True, takes_arrays=True, array_member="data")
        if not isinstance(value, dict) or not isinstance(value.get("inputs"), list) or not value["inputs"]:
            raise InputError('the request needs {"inputs": [{"name", "shape", "datatype", "data"}, ...]}')
        _check_members(value, _REQUEST_MEMBERS, "the request")
        binary = memoryview(body)[size:]
        at = 0
        inputs = []
        for entry in value["inputs"]:
            tensor, at = _read_input(entry, binary, at)
            inputs.append(tensor)
        if at != binary.nbytes:
            raise InputError(
                f"the body has {binary.nbytes} bytes after its JSON, but its inputs name {at} as their data"
            )
        outputs = [] if value.get("outputs") is None else value["outputs"]
        if not isinstance(outputs, list) or not all(isinstance(each, dict) and _name(each) for each in outputs):
            raise InputError('"outputs" must be a list of objects with the "name" of an output each')
        for each in outputs:
            _check_members(each, _OUTPUT_MEMBERS, f"output {quoted(each['name'])}")
        request_id = value.get("id", "")
        return InferRequest(
            inputs,
            id=request_id if isinstance(request_id, str) else json.dumps(request_id),
            outputs=[RequestedOutput(each["name"], _parameters(each)) for each in outputs],
            parameters=_parameters(value),
        )

    def is_encode_quick(self, request: InferRequest, outputs: list[InferOutput]) -> bool:
        return all(
            wants_binary(request, output.name) or math.prod(output.shape) <= QUICK_VALUE_COUNT_MAX for output in outputs
        )

    def encode(self, request: InferRequest, response: InferResponse) -> Response:
        """The answer: JSON, and after it the outputs that are to be binary.

        Raises:
            InputError: an output has no form in JSON.
            HandlerError: the answer is larger than it may be.
        """
        entries: list[dict[str, Any]] = []
        parts: list[bytes | memoryview] = [b""]
        for output in response.outputs:
            entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
            if wants_binary(request, output.name):
                raw = output.raw()
                entry["parameters"] = {"binary_data_size": len(raw)}
                parts.append(raw)
            else:
                entry["data"] = json_values(output)
            entries.append(entry)
        head: dict[str, Any] = {"id": response.id} if response.id else {}
        head |= {"model_name": response.model_name, "model_version": response.model_version, "outputs": entries}
        parts[0] = dump_in_slices(head, _compact)
        size = sum(len(part) for part in parts)
        if size > self._size_max:
            raise HandlerError(
                f"the answer has {size} bytes, more than max_response_size={self._size_max}; "
                "raise it in config.properties"
            )
        if len(parts) == 1:
            return Response(200, parts[0], content_type=JSON)
        answer = Response(200, parts[0], content_type=BINARY, headers={JSON_SIZE_HEADER: str(len(parts[0]))})
        answer.tail = parts[1:]
        return answer

    def of_copy(self, request: Request) -> RestTransport:
        return RestTransport(request, self._size_max, self._raw_input)


def _read_input(entry: Any, binary: memoryview, at: int) -> tuple[InferInput, int]:
    if not isinstance(entry, dict) or not _name(entry):
        raise InputError('each of "inputs" must be an object with a "name"')
    name, shape, datatype = entry["name"], entry.get("shape"), entry.get("datatype")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape) or not isinstance(datatype, str):
        raise InputError(f'input {quoted(name)} needs a "shape", such as [1, 4], and a "datatype", such as "FP32"')
    _check_members(entry, _INPUT_MEMBERS, f"input {quoted(name)}")
    parameters = _parameters(entry)
    size = parameters.get("binary_data_size")
    data: Any = entry.get("data")
    if size is not None:
        if type(size) is not int or not 0 <= size <= binary.nbytes - at:
            raise InputError(
                f'input {quoted(name)} has "binary_data_size" {quoted(str(size))}, but {binary.nbytes - at} bytes are '
                "left in the body"
            )
        if data is not None:
            raise InputError(f'input {quoted(name)} has both "data" and "binary_data_size"')
        data = binary[at : at + size]
        at += size
    elif not isinstance(data, (list, JsonArray)):
        raise InputError(f'input {quoted(name)} needs "data", a list of values, or the parameter "binary_data_size"')
    tensor = InferInput(name, datatype, tuple(shape), data, parameters)
    check_input(tensor)
    return tensor, at


def _check_members(entry: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    unknown = [name for name, value in entry.items() if name not in known and value is not None]
    if unknown:
        raise InputError(f"{what} has a member {quoted(unknown[0])} that nothing reads; it may have {_listed(known)}")


def _listed(names: frozenset[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _name(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("name"), str) and bool(entry["name"])


def _parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError('"parameters" must be an object')
    for name in _NOT_HERE:
        if parameters.get(name):
            instead = ""
            if name.startswith("shared_memory"):
                instead = ", shared memory; send the tensor in the body, as binary data"
            raise InputError(f"the parameter {name!r} is of an extension that this server does not have{instead}")
    return {name: each.values() if isinstance(each, JsonArray) else each for name, each in parameters.items()}


def wants_binary(request: InferRequest, name: str) -> bool:
    """Whether an output is to be sent as it is, after the JSON."""
    for output in request.outputs:
        if output.name == name and "binary_data" in output.parameters:
            return output.parameters["binary_data"] is True
    return request.parameters.get("binary_data_output") is True


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def json_values(output: InferOutput) -> list[Any]:
    """The data flat, as JSON has it; numbers that it has no word for are None. Raises as `InferOutput.values`."""
    values = output.values()
    data = output.data
    if isinstance(data, torch.Tensor) and data.is_floating_point() and not bool(torch.isfinite(data).all()):
        return [value if math.isfinite(value) else None for value in values]  # JSON has no word for these
    return values
