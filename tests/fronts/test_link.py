"""What the engine takes from a front end, and what it does with one that sends what none would."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, cast

import pytest

from pyserve.errors import ServeError
from pyserve.fronts import wire
from pyserve.fronts.channel import Channel, RubbishError
from pyserve.fronts.link import Link
from pyserve.fronts.shares import Shares
from pyserve.http1.head import HeadReader
from pyserve.http1.limits import Http1Limits
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response
from pyserve.telemetry.stage_times import BOUNDS_S

SHARES = Shares(
    process_count=2, body_budget_size=1000, connection_count_max=10, in_flight_max=3, body_size_max=900,
    answer_size_max=1000, waiting_size_max=5000,
)  # fmt: skip


class Ring:
    """Stands in for a channel: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int, bytes, bytes]] = []
        self.waiting_size = 0
        self.given_up = ""

    def send(self, kind: int, flags: int, ticket: int, head: bytes = b"", body: Any = b"") -> None:
        self.sent.append((kind, flags, ticket, head, bytes(body)))

    def send_parts(self, kind: int, flags: int, ticket: int, head: bytes, parts: Any) -> None:
        self.send(kind, flags, ticket, head, b"".join(map(bytes, parts)))

    def give_up(self, reason: str) -> None:
        self.given_up = reason


class Stand:
    """A link, the exchanges that came through it, and what went back."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.ring = Ring()
        self.budget = BodyBudget(1000)
        self.refused: Counter[int] = Counter()
        self.changes = 0
        self.link = Link(0, [self.exchanges.append], self.budget, SHARES, self.refused, ErrorFormat(), self._change)
        self.link.channel = cast(Channel, self.ring)

    def _change(self) -> None:
        self.changes += 1

    def ask(self, ticket: int, body: bytes = b"", listener: int = 0) -> None:
        request = Request("POST", "/predictions/m", id=f"id-{ticket}", client="127.0.0.1:1")
        head = wire.RequestWriter().head(Exchange(request, lambda each: None), listener)
        self.link.take(wire.REQUEST, 0, ticket, head, bytearray(body))


@pytest.fixture
def stand() -> Stand:
    return Stand()


def test_a_request_is_answered_under_its_number(stand: Stand) -> None:
    stand.ask(7, b"in")
    [exchange] = stand.exchanges
    assert (exchange.request.body, exchange.request.id) == (bytearray(b"in"), "id-7")
    exchange.respond(Response(201, b"out"))
    [(kind, status, ticket, head, body)] = stand.ring.sent
    assert (kind, status, ticket, body) == (wire.ANSWER, 201, 7, b"out")
    assert wire.read_answer(status, head, body).status == 201
    assert stand.link.in_flight == 0 and stand.changes == 1


def test_parts_go_back_one_by_one(stand: Stand) -> None:
    stand.ask(1)
    exchange = stand.exchanges[0]
    exchange.start_stream(Response(200, b"a"))
    exchange.write(b"b")
    exchange.end_stream(b"c")
    assert [(kind, body) for kind, _, _, _, body in stand.ring.sent] == [
        (wire.STREAM, b""), (wire.PART, b"a"), (wire.PART, b"b"), (wire.PART, b"c"), (wire.END, b""),
    ]  # fmt: skip
    assert stand.link.in_flight == 0


def test_a_stream_that_fails_is_aborted(stand: Stand) -> None:
    stand.ask(1)
    stand.exchanges[0].start_stream(Response(200, b"a"))
    stand.exchanges[0].abort_stream()
    assert stand.ring.sent[-1][0] == wire.ABORT and stand.link.in_flight == 0


def test_a_client_that_hangs_up_cancels(stand: Stand) -> None:
    stand.ask(1, b"x" * 900)
    calls: list[int] = []
    stand.exchanges[0].on_disconnect = lambda: calls.append(1)
    stand.link.take(wire.CANCEL, 0, 1, b"", b"")
    stand.link.take(wire.CANCEL, 0, 1, b"", b"")
    stand.exchanges[0].respond(Response(200))
    assert calls == [1] and stand.link.in_flight == 0 and not stand.ring.sent
    stand.ask(2, b"x" * 900)  # there is room again


def test_a_front_end_that_goes_cancels_all_of_its_requests(stand: Stand) -> None:
    stand.ask(1), stand.ask(2)
    calls: list[int] = []
    for exchange in stand.exchanges:
        exchange.on_disconnect = lambda: calls.append(1)
    stand.link.lose()
    assert calls == [1, 1] and stand.link.in_flight == 0


def test_what_bodies_grow_by_is_given_back_with_the_answer(stand: Stand) -> None:
    for answers in (True, False):
        stand.ask(1, b"x")
        assert stand.budget.reserve(500)
        stand.exchanges[-1].reserved += 500
        if answers:
            stand.exchanges[-1].respond(Response(200))
        else:
            stand.link.take(wire.CANCEL, 0, 1, b"", b"")
        assert stand.budget.size == 0


@pytest.mark.parametrize("answer", [Response(99), Response(600), Response(cast(int, "x")), Response(2**40)])
def test_a_status_that_there_is_not_is_left_to_the_protocol(stand: Stand, answer: Response) -> None:
    stand.ask(1)
    stand.exchanges[0].respond(answer)
    assert stand.ring.sent[0][1] in (0, 99)  # which it refuses


def test_an_answer_without_bytes_is_an_error(stand: Stand) -> None:
    stand.ask(1)
    stand.exchanges[0].respond(Response(200, cast(bytes, 17)))
    assert stand.ring.sent[0][:3] == (wire.ANSWER, 500, 1)


def test_a_front_end_that_reads_nothing_is_given_up(stand: Stand) -> None:
    stand.ask(1)
    stand.ring.waiting_size = SHARES.waiting_size_max + 1
    stand.exchanges[0].respond(Response(200))
    assert stand.ring.given_up


def test_refusals_are_counted(stand: Stand) -> None:
    stand.link.take(wire.REFUSED, 400, 3, b"", b"")
    stand.link.take(wire.REFUSED, 400, 1, b"", b"")
    assert stand.refused == {400: 4}


def test_more_than_a_front_end_lets_in_is_rubbish(stand: Stand) -> None:
    stand.ask(1, b"x" * 900)
    with pytest.raises(RubbishError, match="more requests at once"):
        stand.ask(2, b"x" * 101)
    stand.ask(2), stand.ask(3)
    with pytest.raises(RubbishError, match="more requests at once"):
        stand.ask(4)


def test_a_number_is_one_requests(stand: Stand) -> None:
    stand.ask(1)
    with pytest.raises(RubbishError, match="one number"):
        stand.ask(1)


@pytest.mark.parametrize(
    "message",
    [(wire.ANSWER, 200, 1, b"", b""), (wire.OPEN, 0, 0, b"", b""), (63, 0, 0, b"", b""),
     (wire.REFUSED, 7, 1, b"", b""), (wire.REQUEST, 0, 1, b"rubbish", bytearray())],
)  # fmt: skip
def test_what_front_ends_do_not_send_is_rubbish(stand: Stand, message: tuple[int, int, int, bytes, Any]) -> None:
    with pytest.raises(RubbishError):
        stand.link.take(*message)
    assert not stand.exchanges


def test_a_listener_that_there_is_not_is_rubbish(stand: Stand) -> None:
    with pytest.raises(RubbishError, match="no client"):
        stand.ask(1, listener=1)


def test_an_app_that_fails_answers_all_the_same() -> None:
    def fail(exchange: Exchange) -> None:
        raise RuntimeError("planted")

    stand = Stand()
    stand.link._apps = [fail]
    stand.ask(1)
    assert stand.ring.sent[0][:3] == (wire.ANSWER, 500, 1) and b"planted" not in stand.ring.sent[0][4]


class Rows:
    """Stands in for the engine's part: one request that came as a tensor."""

    def __init__(self, lane: Any) -> None:
        self.count, self.size, self.request_count = 1, 16, 1
        self.cancelled: list[int] = []
        self._lane = lane

    def cancel(self, ticket: int) -> tuple[Any, str] | None:
        if not self.count:
            return None
        self.cancelled.append(ticket)
        self.count = 0
        return self._lane, "default"

    def close(self) -> list[tuple[Any, str]]:
        left = [(self._lane, "default")] * self.count
        self.count = 0
        return left


class Lane:
    def __init__(self) -> None:
        self.cancelled: list[str] = []

    def row_cancelled(self, url_version: str) -> None:
        self.cancelled.append(url_version)


def row_head(*headers: tuple[str, str]) -> bytes:
    request = Request("POST", "/predictions/m", id="row-1", client="127.0.0.1:1", headers=list(headers))
    return wire.RequestWriter().row_head(Exchange(request, lambda each: None), 0, 7, 0)[16:]


def test_a_tensor_that_failed_is_answered_as_the_request_that_it_would_have_been() -> None:
    stand = Stand()
    exchange = stand.link.adopt(5, row_head())
    assert exchange is not None and exchange.request.path == "/predictions/m" and exchange.request.id == "row-1"
    assert stand.link.in_flight == 1
    error = ErrorFormat().answer(ServeError("no"), exchange.request)
    exchange.respond(error)
    assert [frame[:3] for frame in stand.ring.sent] == [(wire.ANSWER, error.status, 5)] and not stand.link.in_flight


class Output:
    """Stands in for the output of a model."""

    def __init__(self) -> None:
        self.is_free = False

    def let_go(self) -> None:
        self.is_free = True


def test_an_output_that_is_for_endpoints_waits_for_the_request_to_come_again() -> None:
    stand, output = Stand(), Output()
    exchange = stand.link.adopt(5, row_head())
    assert exchange is not None
    exchange.keep(output)
    assert [frame[:3] for frame in stand.ring.sent] == [(wire.AGAIN, 1, 5)] and stand.link.in_flight == 1
    stand.ask(5)
    [came] = stand.exchanges
    assert came.kept is output and output.is_free and stand.link.in_flight == 1
    assert stand.link.request_count == 0, "it was counted as the tensor that it was"
    came.respond(Response(200, b"in some form"))
    assert stand.ring.sent[1][:3] == (wire.ANSWER, 200, 5) and not stand.link.in_flight
    stand.ask(5)
    assert stand.exchanges[1].kept is None


def test_a_request_that_comes_again_before_its_model_has_run_is_rubbish() -> None:
    stand = Stand()
    assert stand.link.adopt(5, row_head()) is not None
    with pytest.raises(RubbishError, match="one number"):
        stand.ask(5)


@pytest.mark.parametrize("goes", ["client", "front end"])
def test_a_client_that_goes_before_its_request_comes_again_is_counted(goes: str) -> None:
    stand, gone = Stand(), []
    exchange = stand.link.adopt(5, row_head())
    assert exchange is not None
    exchange.on_disconnect = lambda: gone.append(goes)
    exchange.keep(Output())
    if goes == "client":
        stand.link.take(wire.CANCEL, 0, 5, b"", b"")
    else:
        stand.link.lose()
    assert gone == [goes] and not stand.link.in_flight


@pytest.mark.parametrize(
    "head",
    [b"", b"x" * 10, row_head(("x-server-timing", "1")), row_head()[:-2] + b"\r\n\r\n",
     row_head(("x-request-timeout-ms", "5")), row_head(("x-request-timeout-ms", "")),
     row_head(("x-request-timeout-ms", "5"), ("X-Server-Timing", "1"))],
)  # fmt: skip
def test_a_tensor_whose_head_no_front_end_writes_ends_the_link(head: bytes) -> None:
    stand = Stand()
    assert stand.link.adopt(5, head) is None and stand.ring.given_up


def test_tensors_count_and_are_cancelled() -> None:
    stand, lane = Stand(), Lane()
    stand.link.rows = cast(Any, Rows(lane))
    assert (stand.link.in_flight, stand.link.request_count, stand.link.tensor_count) == (1, 1, 1)
    stand.link.take(wire.CANCEL, 0, 9, b"", b"")
    assert cast(Any, stand.link.rows).cancelled == [9] and lane.cancelled == ["default"]
    stand.link.take(wire.CANCEL, 0, 9, b"", b"")
    stand.link.rows = cast(Any, Rows(lane))
    stand.link.lose()
    assert lane.cancelled == ["default"] * 2


COUNTS = [0] * (len(BOUNDS_S) + 1)


def test_times_are_those_that_were_told() -> None:
    stand = Stand()
    told: list[wire.ToldTimes] = []
    stand.link.on_times = told.append
    times = wire.ToldTimes("m", "1.0", ([*COUNTS[:-1], 7], 0.5), (COUNTS, 0.0))
    stand.link.take(wire.TIMES, 0, 0, b"", times.write())
    assert told == [times]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"[]", b'["m", "1.0"]', b"\xff", b"[" * 9000, b'["m", "1.0", 5, 6]',
        b'["m", "1.0", [[], 0], [[], 0]]',
        json.dumps(["m", 1, [COUNTS, 0], [COUNTS, 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [COUNTS[1:], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [[*COUNTS, 0], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [[-1, *COUNTS[1:]], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [[True, *COUNTS[1:]], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [[1.0, *COUNTS[1:]], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [[2**40, *COUNTS[1:]], 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, -1], [COUNTS, 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, float("nan")], [COUNTS, 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, float("inf")], [COUNTS, 0]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, "1"], [COUNTS, 10**400]]).encode(),
        json.dumps(["m", "1.0", [COUNTS, 0], [COUNTS, 0], [COUNTS, 0]]).encode(),
    ],
)  # fmt: skip
def test_times_that_no_front_end_tells_are_rubbish(stand: Stand, body: bytes) -> None:
    told: list[wire.ToldTimes] = []
    stand.link.on_times = told.append
    with pytest.raises(RubbishError):
        stand.link.take(wire.TIMES, 0, 0, b"", body)
    assert not told


def test_a_head_is_sent_as_it_came() -> None:
    came = b"POST /predictions/m HTTP/1.1\r\nHost: a\r\nX-A: b\r\n\r\n"
    head = HeadReader(Http1Limits()).read(came)
    request = Request("POST", head.path, fields=head, id="row-1", client="127.0.0.1:1")
    written = wire.RequestWriter().row_head(Exchange(request, lambda each: None, protocol_bytes=60), 0, 7, 0)
    assert written.endswith(came)
    read, listener, size, is_http11 = wire.RequestReader(1).read(written[16:], bytearray(), 1)
    assert (read.method, read.path, read.headers) == ("POST", "/predictions/m", [("Host", "a"), ("X-A", "b")])
    assert (read.id, read.client, listener, size, is_http11) == ("row-1", "127.0.0.1:1", 0, 60, True)
