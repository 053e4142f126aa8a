"""HTTP/1.1: what a connection understands does not depend on how its bytes are cut, and each request has one answer.

An input is two bytes, which say how the rest is cut, under which limits, and when answers are given, and then what the
client sends before it closes its side.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import Any

from pyserve.http1.connections import Connections
from pyserve.http1.head import HeadReader
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from tests.support.fakes import FakeLoop, FakeTransport
from tests.support.http1_wire import Answer, without_request_id

SMALL = Http1Limits(
    line_size_max=64, head_size_max=200, header_count_max=4, body_size_max=20, chunk_count_max=5, pipeline_max=4,
    chunk_overhead_size_max=60, body_budget_size=40,
)  # fmt: skip
# Longer than every time limit of a connection.
_LONG_S = 10_000.0


class _Failures(logging.Handler):
    """A protocol that catches an exception of its own logs it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@dataclass
class _Connection:
    """One connection to an app that answers at once, or when nothing more is read."""

    limits: Http1Limits
    answers_late: bool
    order: random.Random
    exchanges: list[Exchange] = field(default_factory=list)
    open: list[Exchange] = field(default_factory=list)
    written: list[tuple[Request, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop = FakeLoop()
        self.connections = Connections(self.limits, wall_clock=lambda: 0.0, clock=self.loop.monotonic_ns)
        self.connections.on_answer = lambda request, status, _: self.written.append((request, status))
        protocol = Http1Protocol(self._app, self.limits, self.connections, self.loop)
        self.transport = FakeTransport(self.loop, protocol)
        protocol.connection_made(self.transport)

    def _app(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        self.open.append(exchange)
        if not self.answers_late:
            self.answer_all()

    def answer_all(self) -> None:
        self.order.shuffle(self.open)
        waiting, self.open = self.open, []
        for exchange in waiting:
            request = exchange.request
            exchange.respond(Response(200, bytes(request.body) or f"{request.method} {request.path}".encode()))

    def send(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            rest = piece
            while rest and not self.transport.closed:
                if not self.transport.reading:
                    self.answer_all()
                    self.loop.advance()
                if not self.transport.reading:
                    return  # it reads no more
                self.transport.deliver(rest[: max(1, len(rest))])
                rest = b""
        while self.open:
            self.answer_all()
            self.loop.advance()

    @property
    def verdict(self) -> tuple[Any, ...]:
        requests = [
            (r.method, r.path, r.query, r.headers, bytes(r.body), exchange.protocol_bytes)
            for exchange in self.exchanges
            for r in (exchange.request,)
        ]
        answers = [
            (answer.status, answer.headers.get("connection"), without_request_id(answer.body))
            for answer in self.answers()
            if answer.status >= 200
        ]
        return requests, answers, self.transport.closed or self.transport.eof_written

    def answers(self) -> list[Answer]:
        """What was written, cut by the requests that it answers: of HEAD's answers nobody sends the body."""
        output, answers = self.transport.output, []
        written = iter(self.written)
        while output:
            head, blank, output = output.partition(b"\r\n\r\n")
            assert blank, f"half an answer: {head!r}"
            first, *lines = head.decode("latin-1").split("\r\n")
            version, status, reason = first.split(" ", 2)
            assert version == "HTTP/1.1"
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            size = 0
            if status != "100":
                request, noted = next(written)
                assert noted == int(status), "another status than was noted"
                size = 0 if request.method == "HEAD" else int(headers["content-length"])
            assert len(output) >= size, "half a body"
            answers.append(Answer(int(status), reason, headers, lines, output[:size]))
            output = output[size:]
        assert next(written, None) is None, "an answer was noted and not written"
        return answers

    def check_counts(self) -> None:
        refused = sum(self.connections.refused.values())
        assert len(self.written) == len(self.exchanges) + refused, "a request without an answer, or with two"
        assert all(exchange.answered for exchange in self.exchanges)

    def check_end(self) -> None:
        """The client sends no more, and time passes: nothing may stay."""
        if not self.transport.closed and self.transport.reading:
            if not self.transport.protocol.eof_received():
                self.transport.close()
            self.loop.advance()
        self.check_counts()
        self.loop.advance(_LONG_S)
        assert self.transport.closed, "the connection stays open"
        assert self.connections.budget.size == 0, "bytes of the body budget stay taken"
        assert len(self.connections) == 0
        assert self.loop.timer_count == 0, "a timer stays"
        self.answers()


def check(data: bytes) -> None:
    failures = _Failures()
    logger = logging.getLogger("pyserve.http1")
    logger.addHandler(failures)
    propagates, logger.propagate = logger.propagate, False
    try:
        _check(data[:2], data[2:])
    finally:
        logger.removeHandler(failures)
        logger.propagate = propagates
    assert not failures.texts, failures.texts[0]


def _check(how: bytes, sent: bytes) -> None:
    how = how.ljust(2, b"\0")
    limits = SMALL if how[0] & 1 else Http1Limits()
    chance = random.Random(how)
    ways = [[sent], _cut(sent, chance), [sent[i : i + 1] for i in range(len(sent))] if len(sent) < 600 else [sent]]
    verdicts = []
    for number, pieces in enumerate(ways):
        connection = _Connection(limits, answers_late=bool(how[0] & 2), order=chance)
        if number == 1:  # nor may it show who reads plain heads
            connection.connections.heads = HeadReader(limits, read_plain=None)
        connection.send(pieces)
        connection.check_counts()
        verdicts.append(connection.verdict)
        connection.check_end()
    assert verdicts[1] == verdicts[0], f"understood otherwise when cut as {ways[1]!r}"
    assert verdicts[2] == verdicts[0], "understood otherwise byte by byte"


def _cut(sent: bytes, chance: random.Random) -> list[bytes]:
    ends = sorted(chance.randrange(len(sent) + 1) for _ in range(chance.randrange(1, 8)))
    return [sent[begin:end] for begin, end in zip([0, *ends], [*ends, len(sent)], strict=True) if end > begin]
