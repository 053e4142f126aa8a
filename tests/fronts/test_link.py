"""What the engine takes from a front end, and what it does with one that sends what none would."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from pyserve.fronts import wire
from pyserve.fronts.channel import Channel, RubbishError
from pyserve.fronts.link import Link
from pyserve.fronts.shares import Shares
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response

SHARES = Shares(
    body_budget_size=1000, connection_count_max=10, in_flight_max=3, body_size_max=900, answer_size_max=1000,
    waiting_size_max=5000,
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
