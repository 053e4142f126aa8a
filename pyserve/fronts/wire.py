"""What the messages between front ends and the engine process are, and how their heads are written and read.

    front end → engine     REQUEST, or ROW; CANCEL of one; REFUSED, CONNECTIONS, TIMES and NATIVE (counts);
                           LISTENING, DRAINED
    engine → front end     ANSWER, or STREAM, PART..., END or ABORT; ROW_ANSWER or AGAIN; OPEN, PAUSE, PARTING, CLOSE,
                           DRAIN; TABLE

A ticket is a request's number; `flags` of an answer is its status. A request crosses when it is complete, and each end
keeps what is the same in many heads, so that it is made and read once.

A ROW is a request whose body is the tensor that its model takes, as the last TABLE describes it (`rows.py`), and whose
flags say what is made of the output (`outputs.AS_TEXT`). The engine answers with the output's row, or AGAIN: the
request has to come as it was, under the same ticket, since the table is another one by now, or since there is something
to be said that only the endpoints know. They say it of the output that the engine has kept, if the model has run.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

from pyserve.errors import ServeError
from pyserve.fronts.channel import LinkFiles, RubbishError
from pyserve.http1.head import HeadReader
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from pyserve.request.ids import REQUEST_ID
from pyserve.request.messages import TIMING_HEADERS, HeaderList, Request, Response, SharedHeaders
from pyserve.telemetry.stage_times import BOUNDS_S

# As native code has them, too (csrc/front_ring.h): 2, 7, 26 and 27.
REQUEST, CANCEL, REFUSED, CONNECTIONS, LISTENING, DRAINED, ROW, TIMES, NATIVE = range(1, 10)
ANSWER, STREAM, PART, END, ABORT, OPEN, PAUSE, PARTING, CLOSE, ROW_ANSWER, AGAIN, TABLE, DRAIN = range(17, 30)

_FIXED = struct.Struct("<QQBB")  # arrived_at, bytes on the wire, listener, whether HTTP/1.1
# Before that, of a ROW: generation of the table, place in it.
_ROW = struct.Struct("<QQ")
_ROW_FIXED = struct.Struct("<QQQQBB")
_HEAD_END = b"\r\n\r\n"  # of a head as it came; in no other are there carriage returns
_CLIENT_SIZE_MAX = 128
_COUNT_MAX = 1 << 32  # of one message
# Heads that are remembered, and the longest of them.
_KNOWN_MAX = 1024
_KNOWN_SIZE_MAX = 2048

FILE_COUNT = len(LinkFiles._fields) + 1  # that the engine greets with: those of the link, and the ledger's
HELLO = struct.Struct("<4sBB32s")  # magic, version, which front end, the secret
MAGIC, VERSION = b"PSVF", 5


class ToldTimes(NamedTuple):
    """What a front end did for requests of a model that crossed as tensors: how often it took how long.

    Attributes:
        preprocess, postprocess: counts for each of `stage_times.BOUNDS_S` and above, and the sum in s.
    """

    name: str
    version: str
    preprocess: tuple[list[int], float]
    postprocess: tuple[list[int], float]

    def write(self) -> bytes:
        """As the body of TIMES."""
        return json.dumps(self).encode()

    @classmethod
    def read(cls, body: bytes | bytearray) -> ToldTimes:
        """The inverse. RubbishError if it is none."""
        try:
            name, version, *stages = json.loads(body)
            told = cls(name, version, *((counts, float(total_s)) for counts, total_s in stages))
            is_right = type(name) is str and type(version) is str and all(map(_is_histogram, told[2:]))
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise RubbishError(f"times that cannot be read: {error}") from None
        if not is_right:
            raise RubbishError("times that no front end tells")
        return told


def _is_histogram(told: tuple[object, float]) -> bool:
    counts, total_s = told
    return (
        type(counts) is list and len(counts) == len(BOUNDS_S) + 1
        and all(type(count) is int and 0 <= count < _COUNT_MAX for count in counts)
        and 0 <= total_s < _COUNT_MAX
    )  # fmt: skip


class _Known(NamedTuple):
    """What is the same in many requests."""

    method: str
    path: str
    query: str
    fields: HeaderList
    has_timing: bool


class RequestWriter:
    """Writes the heads of requests. One for each front end."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str, str], bytes] = {}

    def head(self, exchange: Exchange, listener: int) -> bytes:
        """The head of ``exchange.request``, which came to the listener of this number."""
        request = exchange.request
        key = (request.method, request.path, request.query, request.header_text)
        known = self._known.get(key)
        if known is None:
            known = "\n".join(key).encode()
            if len(known) <= _KNOWN_SIZE_MAX:
                if len(self._known) >= _KNOWN_MAX:
                    self._known.clear()
                self._known[key] = known
        fixed = _FIXED.pack(request.arrived_at, exchange.protocol_bytes, listener, exchange.is_http11)
        return b"%b%b\n%b\n%b" % (fixed, request.id.encode(), request.client.encode(), known)

    def row_head(self, exchange: Exchange, listener: int, generation: int, route: int) -> bytes:
        """The head of a ROW, for the route of a table: left as it came, if that is known, since it is seldom read."""
        request = exchange.request
        came = request.head_bytes
        if came is None:
            return _ROW.pack(generation, route) + self.head(exchange, listener)
        fixed = _ROW_FIXED.pack(
            generation, route, request.arrived_at, exchange.protocol_bytes, listener, exchange.is_http11
        )
        return b"%b%b\n%b\n%b" % (fixed, request.id.encode(), request.client.encode(), came)


class RequestReader:
    """Reads what a `RequestWriter` has written, or somebody who pretends to be one."""

    def __init__(self, listener_count: int):
        self._listener_count = listener_count
        self._known: dict[bytes, _Known] = {}
        self._heads = HeadReader(Http1Limits())

    def read(self, head: bytes, body: bytearray, now: int) -> tuple[Request, int, int, bool]:
        """The request, the number of its listener, its bytes on the wire, and whether its client speaks HTTP/1.1.

        Args:
            now: ns of the clock of ``Request.arrived_at``; nothing arrived later.

        Raises:
            RubbishError: no front end writes that.
        """
        try:
            arrived_at, wire_size, listener, is_http11 = _FIXED.unpack_from(head)
            id, client, text = head[_FIXED.size :].split(b"\n", 2)
            known = self._read_head(text) if text.endswith(_HEAD_END) else self._known.get(text) or self._read(text)
            request = Request(
                known.method, known.path, query=known.query, fields=known.fields, body=body, client=client.decode(),
                id=id.decode(), arrived_at=min(arrived_at, now), has_timing=known.has_timing,
            )  # fmt: skip
        except (struct.error, ValueError, ServeError) as error:
            raise RubbishError(f"a request that cannot be read: {error}") from None
        if listener >= self._listener_count or len(client) > _CLIENT_SIZE_MAX or not REQUEST_ID.match(request.id):
            raise RubbishError("a request that no client can have sent")
        return request, listener, wire_size, bool(is_http11)

    def _read_head(self, text: bytes) -> _Known:
        head = self._heads.read(text)
        return _Known(head.method, head.path, head.query, HeaderList(head.headers), head.has_timing)

    def _read(self, text: bytes) -> _Known:
        method, path, query, *rest = text.decode().split("\n", 3)
        fields = rest[0].split("\n") if rest and rest[0] else []
        if len(fields) % 2:
            raise RubbishError("a header without a value")
        headers = list(zip(fields[::2], fields[1::2], strict=True))
        has_timing = any(name.lower() in TIMING_HEADERS for name in fields[::2])
        known = _Known(method, path, query, HeaderList(headers), has_timing)
        if len(text) <= _KNOWN_SIZE_MAX:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[text] = known
        return known


_PLAIN_HEADS: dict[tuple[str | None, str | None], bytes] = {}
_SHARED_HEADS: dict[bytes, tuple[str | None, str | None, SharedHeaders]] = {}


def answer_head(response: Response) -> bytes:
    """All of ``response`` but its status and body. What a handler has put there is not looked at."""
    key = (response.content_type, response.reason)
    headers = response.headers
    if headers:
        pairs = list(headers.items())
        return json.dumps([*key, type(headers) is SharedHeaders, pairs], default=_not_text).encode()
    try:
        known = _PLAIN_HEADS.get(key)
    except TypeError:  # no texts; the protocol will refuse them
        return json.dumps([*key, False, []], default=_not_text).encode()
    if known is None:
        known = json.dumps([*key, True, []], default=_not_text).encode()
        if len(_PLAIN_HEADS) < _KNOWN_MAX and len(known) <= _KNOWN_SIZE_MAX:
            _PLAIN_HEADS[key] = known
    return known


def _not_text(value: object) -> int:
    """What stands for something that is no text, where only texts can be sent: no text either."""
    return 0


def read_answer(status: int, head: bytes, body: bytes) -> Response:
    """What `answer_head` was made of, with ``body``.

    Raises:
        RubbishError: the head is no such one.
    """
    known = _SHARED_HEADS.get(head)
    if known is None:
        try:
            content_type, reason, is_shared, pairs = json.loads(head)
            headers: Any = SharedHeaders(pairs) if is_shared else dict(pairs)
        except (ValueError, TypeError) as error:
            raise RubbishError(f"an answer that cannot be read: {error}") from None
        if not is_shared or len(head) > _KNOWN_SIZE_MAX:
            return Response(status, body, content_type=content_type, reason=reason, headers=headers)
        if len(_SHARED_HEADS) >= _KNOWN_MAX:
            _SHARED_HEADS.clear()
        known = _SHARED_HEADS[head] = content_type, reason, headers
    content_type, reason, shared = known
    return Response(status, body, content_type=content_type, reason=reason, headers=shared)
