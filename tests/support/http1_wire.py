"""One HTTP/1.1 connection without sockets, for the tests of ``pyserve.http1``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from tests.support.fakes import FakeLoop, FakeTransport


def echo(exchange: Exchange) -> None:
    """Answers with the body, or with the target if there is none."""
    request = exchange.request
    exchange.respond(Response(200, bytes(request.body) or f"{request.method} {request.path}".encode()))


@dataclass
class Answer:
    status: int
    reason: str
    headers: dict[str, str]
    lines: list[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def cause(self) -> str:
        """Why the protocol refused the request."""
        return str(self.json.get("detail", {}).get("reason", ""))


def parse_answers(output: bytes, *, bodyless: bool = False) -> list[Answer]:
    """Splits what a server wrote. Fails if anything is left over."""
    answers = []
    while output:
        head, blank, output = output.partition(b"\r\n\r\n")
        assert blank, f"half an answer: {head!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert version == "HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = 0 if bodyless or status == "100" else int(headers.get("content-length", 0))
        assert len(output) >= size
        answers.append(Answer(int(status), reason, headers, lines, output[:size]))
        output = output[size:]
    return answers


_REQUEST_ID = re.compile(rb'"request_id": "[^"]*"')  # drawn anew for each


def without_request_id(body: bytes) -> bytes:
    """The body of an error, without what is another one each time."""
    return _REQUEST_ID.sub(b"", body)


@dataclass
class Wire:
    """A connection to an app.

    Attributes:
        exchanges: what the app was called with.
    """

    app: Callable[[Exchange], None] | None = echo
    limits: Http1Limits = field(default_factory=Http1Limits)
    connections: Connections | None = None
    loop: FakeLoop = field(default_factory=FakeLoop)
    peername: Any = ("127.0.0.1", 43090)

    def __post_init__(self) -> None:
        self.exchanges: list[Exchange] = []
        if self.connections is None:
            self.connections = Connections(self.limits, wall_clock=lambda: 0.0, clock=self.loop.monotonic_ns)
        self.protocol = Http1Protocol(self._call, self.limits, self.connections, self.loop)
        self.transport = FakeTransport(self.loop, self.protocol, self.peername)
        self.protocol.connection_made(self.transport)

    def _call(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        if self.app is not None:
            self.app(exchange)

    def send(self, *pieces: bytes) -> Wire:
        """Delivers segments, as long as the protocol reads."""
        for piece in pieces:
            if not self.transport.closed:
                assert self.transport.reading, "delivered while reading is paused"
                self.transport.deliver(piece)
        return self

    def send_eof(self) -> Wire:
        if not self.transport.protocol.eof_received():
            self.transport.close()
        self.loop.advance()
        return self

    def advance(self, seconds: float) -> Wire:
        self.loop.advance(seconds)
        return self

    @property
    def answers(self) -> list[Answer]:
        return parse_answers(self.transport.output)

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]

    @property
    def ended(self) -> bool:
        """Whether the client has been told that nothing more comes."""
        return self.transport.closed or self.transport.eof_written

    @property
    def verdict(self) -> tuple[Any, ...]:
        """All that must not depend on how the bytes were cut into segments."""
        answers = [
            (answer.status, answer.headers.get("connection"), without_request_id(answer.body))
            for answer in self.answers
        ]
        requests = [
            (r.method, r.path, r.query, r.headers, bytes(r.body), exchange.protocol_bytes)
            for exchange in self.exchanges
            for r in [exchange.request]
        ]
        return answers, requests, self.ended


def cuts(data: bytes) -> list[list[bytes]]:
    """``data`` byte by byte, and cut in two at every position."""
    return [[data[i : i + 1] for i in range(len(data))], *([data[:i], data[i:]] for i in range(1, len(data)))]


def send_every_way(data: bytes, **wiring: Any) -> Wire:
    """Sends ``data`` whole, byte by byte and cut in two everywhere; fails unless the verdict is always the same."""
    whole = Wire(**wiring).send(data)
    for pieces in cuts(data):
        wire = Wire(**wiring).send(*pieces)
        assert wire.verdict == whole.verdict, f"cut as {pieces!r}"
    return whole
