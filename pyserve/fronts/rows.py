"""A front end's side of requests that cross as tensors: bodies are decoded here, answers encoded.

    Table.row_of(request) ──> Row: the tensor's bytes, and who encodes the answer ──> Row.encode(head, row) ──> Response

Only what is plainly right is decoded here. Of anything else nothing is said: the request goes to the engine as it is,
whose endpoints have all of the rules and all of the words. What is answered here is to the byte what they would answer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from pyserve import _front
from pyserve.fronts.infer import Infer
from pyserve.fronts.outputs import AS_BYTES, AS_TEXT, Body, Output, Row, RowTimes
from pyserve.request import json_encoding
from pyserve.request.messages import Request, Response, json_response
from pyserve.tensor_types import JSON, RAW, is_decoded, may_be_read, media_type, takes_raw, wants_raw

# Text of JSON that is read here without others waiting too long.
TEXT_SIZE_MAX = 256 << 10
# A tensor goes in one piece, which keeps others from the ring.
SIZE_MAX = 1 << 20
_KNOWN_MAX = 256
_KNOWN_SIZE_MAX = 1024
_BEARER = re.compile(r"Bearer\s+(\S+)\s*", re.IGNORECASE)
_MEMBER = r'[ \t\n\r]*\{[ \t\n\r]*"(?:%s)"[ \t\n\r]*:[ \t\n\r]*'
_MEMBER_END = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")
_INSTANCES_END = re.compile(rb"[ \t\n\r]*\][ \t\n\r]*\}[ \t\n\r]*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")
# In a checkout whose extensions were built before there was the native one it is Python's.
_may_be_read = getattr(_front, "may_be_read", may_be_read)


class Route:
    """One model under one kind of path.

    Args:
        place: in the table.
        entry: as `tensors.Tensors` describes it.
        answer_size_max: bytes.

    Attributes:
        size: bytes of a tensor.
        kind: of its numbers, as in ``struct``.
        times: of what is done here.
    """

    def __init__(self, place: int, entry: dict[str, Any], answer_size_max: int):
        self.place = place
        self.size: int = entry["size"]
        self.kind: str = entry["kind"]
        self.answer_size_max = answer_size_max
        self.times = RowTimes()
        self._shape: list[int] = entry["shape"]
        self._takes_json: bool = entry["takes_json"]
        names = ["data"] + ([entry["input"]] if _PLAIN_NAME.fullmatch(entry["input"]) else [])
        self._member = re.compile((_MEMBER % "|".join(map(re.escape, names))).encode())
        self._instances = re.compile((_MEMBER % "instances").encode() + rb"\[")
        self._kinds: dict[tuple[str, str], tuple[bool, bool] | None] = {}
        self.infer = Infer(self, entry)

    def takes_json(self, body: Body) -> bool:
        """Whether ``body`` is short enough to be read here, where JSON is decoded at all."""
        return self._takes_json and len(body) <= TEXT_SIZE_MAX

    def read_json(self, body: Body) -> bytes | None:
        """Nested lists of one item, also as ``{"data": lists}``; None if they are not plainly that."""
        if not self.takes_json(body):
            return None
        wrapped = self._member.match(body)
        if wrapped is not None:
            return self._read_member(body, wrapped.end(), _MEMBER_END)
        item: bytes | None = _front.read_item(body, self.kind, self._shape)
        return item

    def _read_member(self, body: Body, begin: int, then: re.Pattern[bytes]) -> bytes | None:
        """The item that begins there, if ``then`` is all that follows it."""
        read = _front.read_item_at(body, begin, self.kind, self._shape)
        return read[0] if read is not None and then.fullmatch(body, read[1]) else None

    def row_of(self, request: Request) -> Row | None:
        """A request to ``/predictions``; None if it has to go as it is."""
        types = request.header("content-type"), request.header("accept")
        try:
            told = self._kinds[types]
        except KeyError:
            told = self._note_kind(types)
        if told is None or request.header("content-encoding"):
            return None
        is_json, answers_raw = told
        body = request.body
        encode, form = (self.raw, AS_BYTES) if answers_raw else (self.json, AS_TEXT)
        if not is_json:
            if len(body) != self.size or _may_be_read(types[0], body):
                return None
            return Row(self.place, body, encode, form, None if answers_raw else self.times)
        began = time.monotonic()
        item = self.read_json(body)
        if item is None:
            return None
        return Row(self.place, item, encode, form, self.times, time.monotonic() - began)

    def instances_row_of(self, request: Request) -> Row | None:
        """A request to ``/v1/models/NAME:predict`` of one instance; None if it has to go as it is."""
        body = request.body
        if not self.takes_json(body) or request.header("content-encoding"):
            return None
        began = time.monotonic()
        found = self._instances.match(body)
        item = None if found is None else self._read_member(body, found.end(), _INSTANCES_END)
        if item is None:
            return None
        return Row(self.place, item, self.predictions, AS_TEXT, self.times, time.monotonic() - began)

    def form(self, content_type: str, accept: str) -> tuple[bool, bool] | None:
        """Whether the body is JSON and whether the answer is bytes; None if a request has to go as it is."""
        return self._note_kind((content_type, accept))

    def _note_kind(self, types: tuple[str, str]) -> tuple[bool, bool] | None:
        content_type, accept = types
        media = media_type(content_type)
        told: tuple[bool, bool] | None = None
        if "event-stream" in accept.lower():
            told = None
        elif media == JSON:
            told = True, wants_raw(content_type, accept)
        elif takes_raw(content_type, accept):
            told = False, True
        elif not is_decoded(media) and "json" not in media:
            told = False, False
        if len(content_type) + len(accept) <= _KNOWN_SIZE_MAX:
            if len(self._kinds) >= _KNOWN_MAX:
                self._kinds.clear()
            self._kinds[types] = told
        return told

    def raw(self, output: Output, row: bytes) -> Response | None:
        """The bytes."""
        return Response(200, row, content_type=RAW, reason="", headers=output.raw_headers)

    def json(self, output: Output, row: bytes) -> Response | None:
        """Nested lists."""
        try:
            body = json_encoding.dump(output.values(row))
        except ValueError:
            return None
        if len(body) > self.answer_size_max:
            return None
        return Response(200, body, content_type=JSON, reason="")

    def predictions(self, output: Output, row: bytes) -> Response | None:
        """Nested lists, as the one of the predictions."""
        try:
            answer = json_response({"predictions": [output.values(row)]})
        except ValueError:
            return None
        return answer if len(answer.body) <= self.answer_size_max else None


class Table:
    """What the engine takes as tensors, by path.

    Attributes:
        generation: the engine's number of it.
        routes: what the engine said of each model under each kind of path, and what was made of that.
    """

    def __init__(self, told: bytes = b"", answer_size_max: int = 0):
        """ValueError or KeyError if it cannot be read."""
        value: dict[str, Any] = json.loads(told) if told else {"generation": 0, "entries": []}
        self.generation: int = value["generation"]
        self._key: dict[str, Any] | None = value.get("key")
        self.routes: list[tuple[dict[str, Any], Route]] = []
        self._rows_of: dict[str, Callable[[Request], Row | None]] = {}
        self._outputs: dict[bytes, Output] = {}
        self._times: dict[tuple[str, str], RowTimes] = {}
        for place, entry in enumerate(value["entries"]):
            if entry["size"] > SIZE_MAX:
                continue
            route = Route(place, entry, answer_size_max)
            name, version = entry["name"], entry["version"]
            is_default = entry["is_default"]
            route.times = self._times.setdefault((name, version), route.times)
            self.routes.append((entry, route))
            self._rows_of[f"/predictions/{name}" if is_default else f"/predictions/{name}/{version}"] = route.row_of
            v2 = f"/v2/models/{name}/infer" if is_default else f"/v2/models/{name}/versions/{version}/infer"
            self._rows_of[v2] = route.infer.row_of
            if is_default:
                self._rows_of[f"/v1/models/{name}:predict"] = route.instances_row_of

    def row_of(self, request: Request) -> Row | None:
        """``request`` as a tensor; None if it has to go to the engine as it is."""
        row_of = self._rows_of.get(request.path)
        if row_of is None or request.method != "POST" or request.has_timing or request.query or not request.body:
            return None
        if self._key is not None and not self._is_key(self._key, request.header("authorization")):
            return None
        return row_of(request)

    @property
    def has_key(self) -> bool:
        """Whether requests have to show one."""
        return self._key is not None

    def passes_until(self, authorization: str) -> float | None:
        """Until when requests with this ``Authorization`` are let in, s since the epoch; None if they are not."""
        key = self._key
        if key is None or not self._is_key(key, authorization):
            return None
        return math.inf if key["expires_at"] is None else float(key["expires_at"])

    def _is_key(self, key: dict[str, Any], authorization: str) -> bool:
        """Whether a request shows the key; what is wrong with another one the engine says."""
        given = _BEARER.fullmatch(authorization.strip())
        if given is None or (key["expires_at"] is not None and time.time() >= key["expires_at"]):
            return False
        digest = hashlib.sha256(given[1].encode("utf-8", "surrogateescape")).hexdigest()
        return hmac.compare_digest(digest, key["digest"])

    def take_times(self) -> Iterator[tuple[str, str, RowTimes]]:
        """Names and versions with what was noted of them since the last time."""
        for (name, version), times in self._times.items():
            if times.is_new:
                yield name, version, times.take()

    def has_times_of(self, ids: set[int]) -> bool:
        """Whether one of these, by their ``id``, is a model's of this table."""
        return any(id(times) in ids for times in self._times.values())

    def output(self, head: bytes) -> Output:
        """What the head of an answer says. ValueError if it is none."""
        known = self._outputs.get(head)
        if known is None:
            if len(self._outputs) >= _KNOWN_MAX:
                self._outputs.clear()
            known = self._outputs[head] = Output.read(head)
        return known
