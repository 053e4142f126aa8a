"""A front end's side of requests of the Open Inference Protocol that cross as tensors: binary ones, and JSON.

Of JSON the numbers are read where they lie. The rest of the body, with a word of our own in their place, is what many
requests have in common, and is read once for all of them. Nobody can send that word, so the numbers are the data
exactly if it stands there.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import struct
from typing import Any, Protocol

from pyserve import _front
from pyserve.fronts.outputs import AS_DESCRIBED_BYTES, AS_TEXT, DATATYPES, Body, Output, Row
from pyserve.request import quick_json
from pyserve.request.messages import Request, Response
from pyserve.tensor_types import JSON, RAW

JSON_SIZE_HEADER = "inference-header-content-length"
# Requests without their numbers that are remembered, and the longest of them.
_KNOWN_MAX = 256
_KNOWN_SIZE_MAX = 1024
_REQUEST_MEMBERS = frozenset({"id", "inputs", "outputs", "parameters"})
_INPUT_MEMBERS = frozenset({"data", "datatype", "name", "parameters", "shape"})
_DATA = re.compile(rb'"data"[ \t\n\r]*:[ \t\n\r]*(?=\[[ \t\n\r]*(\[)?)')
_BEHIND_DATA = b"]}]}"
_HERE = secrets.token_hex(16)
_HERE_JSON = json.dumps(_HERE).encode()


class Route(Protocol):
    """What is the same of a model by all protocols; see `rows.Route`."""

    place: int
    size: int
    kind: str
    answer_size_max: int

    def takes_json(self, body: Body) -> bool:
        """Whether ``body`` is short enough to be read here, where JSON is decoded at all."""


class Infer:
    """The same model by the Open Inference Protocol."""

    def __init__(self, route: Route, entry: dict[str, Any]):
        self._route = route
        self._input: str = entry["input"]
        self._shape = [1, *entry["shape"]]
        self._flat_shape = [math.prod(self._shape)]
        self._datatype: str = entry["datatype"]
        self._answer = {"model_name": entry["name"], "model_version": entry["version"]}
        self._output: str = entry["output"]
        self._known: dict[bytes, tuple[str, bool] | None] = {}

    def row_of(self, request: Request) -> Row | None:
        """A request to ``/v2/models/NAME/infer``; None if it has to go as it is."""
        if request.header("content-encoding"):
            return None
        told = request.header(JSON_SIZE_HEADER)
        return self._binary(request, told) if told else self._in_json(request)

    def _binary(self, request: Request, told: str) -> Row | None:
        body, route = request.body, self._route
        if not (told.isascii() and told.isdigit() and len(told) < 8):
            return None
        size = int(told)
        if size != len(body) - route.size or size > _KNOWN_SIZE_MAX:
            return None
        return self._row(bytes(memoryview(body)[:size]), memoryview(body)[size:])

    def _in_json(self, request: Request) -> Row | None:
        body, route = request.body, self._route
        if not route.takes_json(body) or body[:64].lstrip()[:1] != b"{":
            return None
        found = _DATA.search(body)
        if found is None or found.end() > _KNOWN_SIZE_MAX:
            return None
        begin = found.end()
        read = _front.read_item_at(body, begin, route.kind, self._shape if found[1] else self._flat_shape)
        if read is None or begin + len(body) - read[1] > _KNOWN_SIZE_MAX:
            return None
        item, end = read
        return self._row(b"".join((body[:begin], _HERE_JSON, body[end:])), item)

    def _row(self, head: bytes, item: bytes | memoryview) -> Row | None:
        """Args:
            head: all of the request but its numbers.
        """  # fmt: skip
        try:
            known = self._known[head]
        except KeyError:
            known = self._read(head)
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[head] = known
        if known is None:
            return None
        request_id, is_binary = known

        def encode(output: Output, row: bytes) -> Response | None:
            return self.encode(output, row, request_id, is_binary=is_binary)

        return Row(self._route.place, item, encode, AS_DESCRIBED_BYTES if is_binary else AS_TEXT)

    def _read(self, head: bytes) -> tuple[str, bool] | None:
        """The request's id and whether its answer is binary; None if it is not plainly one that is for this model."""
        value = quick_json.read(head, 8)
        if type(value) is not dict or not value.keys() <= _REQUEST_MEMBERS:
            return None
        inputs, request_id = value.get("inputs"), value.get("id", "")
        if type(inputs) is not list or len(inputs) != 1 or type(inputs[0]) is not dict or type(request_id) is not str:
            return None
        [entry] = inputs
        name = entry.get("name")
        is_ours = (
            entry.keys() <= _INPUT_MEMBERS and self._is_data(entry, is_json=_HERE_JSON in head)
            and type(name) is str and name and name == (self._input or name)
            and entry.get("datatype") == self._datatype and _are_sizes(entry.get("shape"), self._shape)
        )  # fmt: skip
        if not is_ours:
            return None
        is_binary = _wants_binary(value, self._output)
        return None if is_binary is None else (request_id, is_binary)

    def _is_data(self, entry: dict[str, Any], *, is_json: bool) -> bool:
        """Whether an input's data is what was taken for it: the numbers in JSON, or all bytes behind it."""
        if is_json:
            return entry.get("data") == _HERE and "parameters" not in entry
        parameters = entry.get("parameters")
        return (
            "data" not in entry and type(parameters) is dict and parameters.keys() == {"binary_data_size"}
            and _are_sizes(list(parameters.values()), [self._route.size])
        )  # fmt: skip

    def asked(self, description: bytes) -> tuple[str, bool] | None:
        """What the JSON of a binary request asks for: its id, and whether the answer is binary; None if it has to go as
        it is."""  # fmt: skip
        return None if _HERE_JSON in description else self._read(description)

    def frame(self, output: Output, request_id: str, *, is_binary: bool) -> tuple[Response, bytes, bytes]:
        """The head of an answer, and what stands in its body before and behind the numbers: bytes, or with commas."""
        size = struct.calcsize(f"={output.kind}") * math.prod(output.shape)
        if not is_binary:
            text = self._text(output, request_id, data=[])
            return Response(200, content_type=JSON), text[: -len(_BEHIND_DATA)], text[-len(_BEHIND_DATA) :]
        text = self._text(output, request_id, parameters={"binary_data_size": size})
        return _binary_answer(text), text, b""

    def encode(self, output: Output, row: bytes, request_id: str, *, is_binary: bool) -> Response | None:
        """An answer; None if the endpoints have to make it."""
        if is_binary:
            text = self._text(output, request_id, parameters={"binary_data_size": len(row)})
        else:
            try:
                values = Output(output.kind, (math.prod(output.shape),), output.raw_headers).values(row)
            except ValueError:
                return None
            text = self._text(output, request_id, data=values)
        if len(text) + (len(row) if is_binary else 0) > self._route.answer_size_max:
            return None
        if not is_binary:
            return Response(200, text, content_type=JSON)
        answer = _binary_answer(text)
        answer.tail = (row,)
        return answer

    def _text(self, output: Output, request_id: str, **rest: Any) -> bytes:
        entry = {"name": self._output, "datatype": DATATYPES[output.kind], "shape": [1, *output.shape], **rest}
        head: dict[str, Any] = {"id": request_id} if request_id else {}
        head |= {**self._answer, "outputs": [entry]}
        return json.dumps(head, separators=(",", ":")).encode()


def _binary_answer(text: bytes) -> Response:
    return Response(200, text, content_type=RAW, headers={"Inference-Header-Content-Length": str(len(text))})


def _are_sizes(told: object, wanted: list[int]) -> bool:
    return type(told) is list and told == wanted and all(type(size) is int for size in told)


def _wants_binary(value: dict[str, Any], output: str) -> bool | None:
    """Whether the one output is to be binary; None if the request says something else, too."""
    parameters = value.get("parameters", {})
    if type(parameters) is not dict or not parameters.keys() <= {"binary_data_output"}:
        return None
    wanted: object = parameters.get("binary_data_output", False)
    outputs = value.get("outputs", [])
    if type(outputs) is not list or len(outputs) > 1:
        return None
    for entry in outputs:
        if type(entry) is not dict or not entry.keys() <= {"name", "parameters"} or entry.get("name") != output:
            return None
        own = entry.get("parameters", {})
        if type(own) is not dict or not own.keys() <= {"binary_data"}:
            return None
        wanted = own.get("binary_data", wanted)
    return wanted if type(wanted) is bool else None
