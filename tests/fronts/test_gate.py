"""A front end's door and the engine's gate, in one process: how they find each other, and what they do alone."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pyserve.errors import ConfigError
from pyserve.fronts import wire
from pyserve.fronts.door import Door
from pyserve.fronts.gate import _KEEPING_MAX, Gate
from pyserve.fronts.meeting import Meeting, Way
from pyserve.fronts.shared_budget import SharedBudget
from pyserve.fronts.shares import Shares
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from pyserve.request.messages import TIMEOUT_HEADER, ErrorFormat, Request, Response

SHARES = Shares(
    process_count=3, body_budget_size=1 << 20, connection_count_max=10, in_flight_max=100, body_size_max=1 << 20,
    answer_size_max=1 << 24, waiting_size_max=1 << 22,
)  # fmt: skip


async def until(condition: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 120
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "waited in vain"
        await asyncio.sleep(0.002)


def echo(exchange: Exchange) -> None:
    exchange.respond(Response(200, bytes(exchange.request.body) or exchange.request.path.encode()))


class Client:
    """What one front end is asked, and what it answers."""

    def __init__(self, meeting: Meeting, number: int):
        self.events: list[str] = []
        self.answers: list[tuple[int, bytes]] = []
        self.bodies = SHARES.new_budget()
        handed = meeting.for_front_end(number)
        self.door = Door(
            Way.of(handed), SHARES, ErrorFormat(), on_open=self.opened,
            on_parting=lambda: self.events.append("parting"), on_close=lambda: self.events.append("close"),
            on_drain=lambda: self.events.append("drain"), bodies=self.bodies,
        )  # fmt: skip
        self.door.connections = [Connections(Http1Limits())]
        self.door.start()

    def opened(self) -> None:
        self.events.append("open")
        self.door.tell_listening()

    def ask(self, body: bytes = b"", limit_ms: str = "") -> Exchange:
        headers = [(TIMEOUT_HEADER, limit_ms)] if limit_ms else []
        request = Request("POST", "/path", body=bytearray(body), id="x", client="127.0.0.1:1", headers=headers,
                          arrived_at=time.monotonic_ns(), has_timing=bool(limit_ms))  # fmt: skip
        exchange = Exchange(request, self._deliver)
        try:
            self.door.app(0)(exchange)
        except Exception as error:
            self.answers.append((error.status, b""))  # type: ignore[attr-defined]
        return exchange

    def _deliver(self, exchange: Exchange) -> None:
        assert exchange.response is not None
        self.answers.append((exchange.response.status, bytes(exchange.response.body)))


def new_gate(meeting: Meeting, count: int = 2) -> Gate:
    again = Meeting(meeting.sock.dup(), meeting.secret)
    again.sock.setblocking(False)
    return Gate(again, count, SHARES, SharedBudget(SHARES.body_budget_size, count + 1), ErrorFormat())


@asynccontextmanager
async def meeting_of(count: int) -> AsyncIterator[tuple[Meeting, list[Client]]]:
    meeting = Meeting.make()
    clients = [Client(meeting, number) for number in range(count)]
    try:
        yield meeting, clients
    finally:
        for client in clients:
            client.door.stop()
        meeting.sock.close()


def test_front_ends_may_be_there_before_the_engine_and_outlive_it() -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, clients):
            clients[0].ask()
            assert clients[0].answers == [(503, b"")]
            for _ in range(2):
                gate = new_gate(meeting)
                await gate.open([echo])
                for client in clients:
                    client.answers.clear()
                    client.ask(b"a" * 300_000)
                    client.ask()
                    await until(lambda client=client: len(client.answers) == 2)
                    assert sorted(client.answers) == [(200, b"/path"), (200, b"a" * 300_000)]
                gate.close()
                await until(lambda: all(client.door._channel is None for client in clients))
                clients[1].ask()
                assert clients[1].answers[-1] == (503, b"")
            assert clients[0].events == ["open", "open"]

    asyncio.run(run())


def test_what_the_engine_leaves_unanswered_is_answered_by_the_front_end() -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            waiting: list[Exchange] = []
            gate = new_gate(meeting, 1)
            await gate.open([waiting.append])
            exchanges = [client.ask() for _ in range(3)]
            await until(lambda: len(waiting) == 3)
            waiting[1].respond(Response(200, b"in time"))
            gate.close()
            await until(lambda: len(client.answers) == 3)
            assert [status for status, _ in client.answers] == [200, 503, 503]
            assert exchanges[0].answered and b"started again" in client.answers[1][1]

    asyncio.run(run())


def test_a_client_that_goes_cancels_in_the_engine() -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            waiting: list[Exchange] = []
            gate = new_gate(meeting, 1)
            await gate.open([waiting.append])
            exchange = client.ask()
            await until(lambda: waiting)
            exchange.disconnect()
            await until(lambda: waiting[0].disconnected)
            gate.close()

    asyncio.run(run())


def test_an_engine_that_makes_room_for_another_loses_nothing() -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            waiting: list[Exchange] = []
            gate = new_gate(meeting, 1)
            await gate.open([waiting.append])
            client.ask()
            await until(lambda: waiting)
            pausing = asyncio.ensure_future(gate.drain(keeps_sockets=True))
            await until(lambda: not client.door._is_open)
            client.ask(b"held")
            client.ask(b"gone").disconnect()
            assert not client.answers and not pausing.done()
            waiting[0].respond(Response(200, b"late"))
            await pausing
            await until(lambda: client.answers == [(200, b"late")])
            gate.close()
            await until(lambda: client.door._channel is None)
            client.ask(b"held too")
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            await until(lambda: len(client.answers) == 3)
            assert client.answers[1:] == [(200, b"held"), (200, b"held too")]
            gate.close()
            await until(lambda: client.door._channel is None)
            client.ask()  # of one that ends without a word nothing is held
            assert client.answers[-1] == (503, b"")

    asyncio.run(run())


def test_what_is_held_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.fronts.door.HOLDING_S", 0.01)

    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            await gate.drain(keeps_sockets=True)
            await until(lambda: not client.door._is_open)
            client.ask()
            await until(lambda: [status for status, _ in client.answers] == [503])
            gate.close()

    asyncio.run(run())


def test_what_is_held_waits_no_longer_than_its_client() -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            await gate.drain(keeps_sockets=True)
            await until(lambda: not client.door._is_open)
            asked = [client.ask(limit_ms=limit_ms) for limit_ms in ("1", "86400000", "never", "1")]
            asked[3].disconnect()
            await until(lambda: client.answers)
            assert asked[0].answered and [status for status, _ in client.answers] == [503]
            assert len(client.door._held) == 2
            gate.close()
            await until(lambda: client.door._channel is None)
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            await until(lambda: len(client.answers) == 3)
            assert [status for status, _ in client.answers] == [503, 200, 200]
            gate.close()

    asyncio.run(run())


def test_one_that_never_comes_does_not_keep_the_others_from_being_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pyserve.fronts.gate.LISTENING_S", 2.0)

    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            gate = new_gate(meeting, 3)
            await gate.open([echo])
            client.ask()
            await until(lambda: client.answers == [(200, b"/path")])
            for number in (1, 2):
                assert f"front end {number} does not listen after 2 s" in caplog.text
            assert "front end 0 does not" not in caplog.text
            late = Client(meeting, 2)
            await until(lambda: late.events == ["open"])
            late.ask()
            await until(lambda: late.answers == [(200, b"/path")])
            late.door.stop()
            gate.close()

    asyncio.run(run())


def test_an_engine_to_which_no_front_end_comes_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.fronts.gate.LISTENING_S", 0.1)

    async def run() -> None:
        async with meeting_of(0) as (meeting, _):
            gate = new_gate(meeting, 2)
            with pytest.raises(ConfigError, match="none of 2 front ends listens after"):
                await gate.open([echo])
            gate.close()

    asyncio.run(run())


def test_draining_waits_for_the_front_ends() -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            draining = asyncio.ensure_future(gate.drain(keeps_sockets=False))
            await until(lambda: "drain" in client.events)
            assert not draining.done()
            client.door.tell_drained()
            await draining
            gate.close()

    asyncio.run(run())


def test_counts_of_what_front_ends_refuse_are_added_up() -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, clients):
            gate = new_gate(meeting)
            await gate.open([echo])
            for client in clients:
                client.door.connections[0].refused[400] += 2
                client.ask()
            await until(lambda: gate.refused == {400: 4})
            samples = {(each.name, each.labels["front_end"]): each.value
                       for family in gate.families() for each in family.samples}  # fmt: skip
            assert samples["pyserve_front_end_requests_total", "1"] == 1
            gate.close()

    asyncio.run(run())


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", None, wire.HELLO.pack(wire.MAGIC, 1, 0, bytes(32))])
def test_strangers_are_turned_away_and_disturb_nobody(said: bytes | None) -> None:
    async def run() -> None:
        async with meeting_of(1) as (meeting, [client]):
            gate = new_gate(meeting, 1)
            await gate.open([echo])
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(meeting.sock.getsockname())
            stranger.setblocking(False)
            # One that knows the secret, but is no front end that there is.
            stranger.send(wire.HELLO.pack(wire.MAGIC, 1, 9, meeting.secret) if said is None else said)
            if said:
                await until(lambda: _is_closed(stranger))
            client.ask()
            await until(lambda: client.answers == [(200, b"/path")])
            stranger.close()
            gate.close()

    asyncio.run(run())


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_one_that_writes_rubbish_loses_its_own_requests_only() -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, [hostile, other]):
            waiting: list[Exchange] = []
            gate = new_gate(meeting)
            await gate.open([waiting.append])
            hostile.ask()
            other.ask()
            await until(lambda: len(waiting) == 2)
            channel = hostile.door._channel
            assert channel is not None
            os.pwrite(channel._files.memory, os.urandom(1 << 16), 0)
            os.eventfd_write(channel._files.engine_wake, 1)
            await until(lambda: any(each.disconnected for each in waiting))
            alive = next(each for each in waiting if not each.disconnected)
            alive.respond(Response(200, b"unharmed"))
            await until(lambda: other.answers == [(200, b"unharmed")])
            await until(lambda: hostile.events == ["open", "open"])  # it may try again
            gate.close()

    asyncio.run(run())


def test_a_front_end_that_goes_gives_back_what_it_held_of_the_budget() -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, [first, second]):
            gate = new_gate(meeting)
            await gate.open([echo])
            whole = SHARES.body_budget_size
            assert first.bodies.reserve(whole - 100_000) and not second.bodies.reserve(200_000)
            first.door.stop()
            await until(lambda: second.bodies.reserve(whole - 1000))
            gate.close()

    asyncio.run(run())


def test_what_front_ends_hold_counts_with_the_next_engine_too() -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, [first, second]):
            gate = new_gate(meeting)
            await gate.open([echo])
            assert first.bodies.reserve(SHARES.body_budget_size - 100_000)
            gate.close()
            await until(lambda: first.door._channel is second.door._channel is None)
            assert not second.bodies.reserve(200_000)  # without an engine as well
            gate = new_gate(meeting)
            await gate.open([echo])
            assert not second.bodies.reserve(200_000)
            assert not gate._budget.reserve(200_000)
            first.bodies.release(600_000)
            assert second.bodies.reserve(200_000)
            gate.close()

    asyncio.run(run())


@pytest.mark.parametrize("rubbish", [SHARES.body_budget_size + 1, 2**64 - 1])
def test_one_that_says_that_it_holds_more_than_there_is_is_cut_off(rubbish: int) -> None:
    async def run() -> None:
        async with meeting_of(2) as (meeting, [hostile, other]):
            gate = new_gate(meeting)
            await gate.open([echo])
            assert hostile.bodies._ledger is not None
            hostile.bodies._lease = rubbish  # it says so at each look
            await until(lambda: "open" in hostile.events[1:])
            hostile.bodies._lease = 0
            await until(lambda: other.bodies.reserve(SHARES.body_budget_size - 1000))
            assert other.events == ["open"]
            gate.close()

    asyncio.run(run())


def test_one_that_keeps_what_it_has_no_bodies_for_is_cut_off_once_others_want_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyserve.fronts.link.RING_SIZE", 0)

    async def run() -> None:
        async with meeting_of(2) as (meeting, [hostile, other]):
            gate = new_gate(meeting)
            await gate.open([echo])
            account = other.bodies.account("127.0.0.1:1")
            hostile.bodies.charge(SHARES.body_budget_size)
            for _ in range(100):
                gate._looking.cancel()
                gate._look()
            assert hostile.events == ["open"], "nobody wants it"
            assert not account.take(200_000)
            for _ in range(_KEEPING_MAX):
                gate._looking.cancel()
                gate._look()
            assert hostile.door._channel is not None and hostile.door._channel.is_open
            gate._looking.cancel()
            gate._look()
            await until(lambda: 0 not in gate._links)
            assert account.take(200_000)
            gate.close()

    asyncio.run(run())
