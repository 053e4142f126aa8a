"""What the protocol does about requests that are under way natively, with a native part that is played by hand."""

from __future__ import annotations

from typing import Any

from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import Call, FastProtocol
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from tests.support.fakes import FakeLoop, FakeTransport
from tests.support.http1_wire import parse_answers

REQUEST = b"POST /m HTTP/1.1\r\nHost: a\r\nx-request-id: an-id\r\nContent-Length: 3\r\n\r\nabc"


class Played:
    """A native part, and a lane that answers what is taken over when the test says so."""

    def __init__(self) -> None:
        self.is_ready = False
        self.is_busy = False
        self.arrived_at = self.answered_at = 0
        self.is_lane_there = True
        self.protocol: Any = None
        self.write: Any = None
        self.cancelled: list[str] = []
        self.exchanges: list[Exchange] = []

    def receive(self, data: bytes) -> None:
        if self.is_ready and not self.is_busy and data == REQUEST:
            self.is_busy = True
            self.protocol._connections.budget.reserve(3)
        else:
            self.is_ready = False
            self.protocol.received(data)

    def open(self, protocol: object, write: Any, client: str) -> None:
        self.protocol, self.write = protocol, write

    def close(self) -> tuple[Any, str] | None:
        told = (self, "default") if self.is_busy else None
        self.is_busy = False
        return told

    def hand_over(self) -> tuple[Any, Call] | None:
        if not self.is_busy:
            return None
        self.is_busy = False
        return self if self.is_lane_there else None, (self.protocol, 0, REQUEST, "default", 7)

    def take_over_call(self, call: Call) -> None:
        self.exchanges.append(call[0].adopt(call[1], call[2]))

    def row_cancelled(self, url_version: str) -> None:
        self.cancelled.append(url_version)

    def answer(self, now: float) -> None:
        self.is_busy = False
        self.answered_at = int(now * 1e9)
        self.protocol._connections.budget.release(3)
        self.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


class Stage:
    """A connection with a native part."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.native = Played()
        self.asked: list[Exchange] = []
        self.limits = Http1Limits()
        self.connections = Connections(self.limits, clock=self.loop.monotonic_ns)
        self.protocol = FastProtocol(self.asked.append, self.limits, self.connections, self.native, self.loop)
        self.transport = FakeTransport(self.loop, self.protocol)
        self.protocol.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.transport.protocol.data_received(data)
        self.loop.advance()

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in parse_answers(self.transport.output)]


def test_the_protocols_own_requests_come_before_native_ones() -> None:
    stage = Stage()
    stage.send(REQUEST[:-1])
    assert not stage.native.is_ready
    stage.send(REQUEST[-1:])
    stage.send(REQUEST)
    assert len(stage.asked) == 2 and not stage.native.is_busy
    for exchange in stage.asked:
        exchange.respond(Response(200, b"1"))
    assert stage.native.is_ready
    stage.send(REQUEST)
    assert stage.native.is_busy and len(stage.asked) == 2


def test_what_comes_behind_a_native_request_stands_behind_it() -> None:
    stage = Stage()
    stage.send(REQUEST)
    stage.send(REQUEST)
    [first], [second] = stage.native.exchanges, stage.asked
    assert first.request.id == "an-id" and bytes(first.request.body) == b"abc" and first.reserved == 3
    second.respond(Response(202))
    assert stage.statuses == []
    first.respond(Response(201))
    assert stage.statuses == [201, 202] and stage.connections.budget.size == 0 and stage.native.is_ready


def test_a_request_whose_lane_has_gone_is_asked_for_again() -> None:
    stage = Stage()
    stage.send(REQUEST)
    stage.native.is_lane_there = False
    stage.protocol.eof_received()
    [exchange] = stage.asked
    exchange.respond(Response(503))
    assert stage.statuses == [503] and stage.transport.closed and stage.connections.budget.size == 0


def test_again_is_as_if_it_had_come_now() -> None:
    stage = Stage()
    stage.send(REQUEST)
    stage.native.is_busy = False
    stage.connections.budget.release(3)
    stage.protocol.again(REQUEST)
    assert stage.connections.budget.size == 3
    stage.asked[0].respond(Response(200))
    assert stage.statuses == [200] and stage.connections.budget.size == 0


def test_a_native_request_holds_no_connection_for_idle() -> None:
    stage = Stage()
    idle_s = stage.limits.idle_timeout_s
    stage.loop.advance(idle_s - 1)
    stage.send(REQUEST)
    stage.loop.advance(10 * idle_s)
    assert not stage.transport.closed
    stage.native.answer(stage.loop.now)
    stage.loop.advance(idle_s - 1)
    assert not stage.transport.closed
    stage.loop.advance(2)
    assert stage.transport.closed and stage.loop.timer_count == 0


def test_draining_waits_for_a_moment_after_the_last_native_answer() -> None:
    stage = Stage()
    stage.loop.advance(60)
    stage.send(REQUEST)
    stage.native.answer(stage.loop.now)
    stage.connections.start_drain()
    stage.loop.advance(stage.limits.quiet_s / 2)
    assert not (stage.transport.eof_written or stage.transport.closed)
    stage.loop.advance(stage.limits.quiet_s)
    assert stage.transport.eof_written or stage.transport.closed


def test_draining_takes_over_what_runs() -> None:
    stage = Stage()
    stage.send(REQUEST)
    stage.connections.start_drain()
    assert not stage.native.is_busy and not stage.native.is_ready
    stage.native.exchanges[0].respond(Response(200, b"1"))
    [answer] = parse_answers(stage.transport.output)
    assert answer.headers["connection"] == "close" and not stage.native.is_ready


def test_a_client_that_hangs_up_is_counted_by_the_lane() -> None:
    stage = Stage()
    stage.send(REQUEST)
    stage.transport.lose()
    assert stage.native.cancelled == ["default"]


def test_a_client_that_does_not_read_is_the_protocols() -> None:
    stage = Stage()
    stage.protocol.pause_writing()
    assert not stage.native.is_ready
    stage.protocol.resume_writing()
    assert stage.native.is_ready


def test_a_connection_too_many_is_never_native() -> None:
    stage = Stage()
    connections = Connections(Http1Limits(connection_count_max=1), clock=stage.loop.monotonic_ns)
    natives = [Played(), Played()]
    for native in natives:
        protocol = FastProtocol(stage.asked.append, connections.limits, connections, native, stage.loop)
        protocol.connection_made(FakeTransport(stage.loop, protocol))
    assert [native.is_ready for native in natives] == [True, False]
