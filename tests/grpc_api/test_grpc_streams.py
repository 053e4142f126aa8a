"""Calls in which both sides stream: answers in the order asked, bytes counted, and nothing that outlives its call."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import NamedTuple

import pytest

from pyserve.errors import OverloadedError
from pyserve.grpc_api.streams import STREAM_REQUESTS_MAX, Begun, Streams
from pyserve.request.body_budget import BodyBudget

HANG_S = 120


class Message(NamedTuple):
    """What a request is to `Streams`: something with a size."""

    name: str
    size: int = 10
    order: str = ""

    def ByteSize(self) -> int:
        return self.size


class Desk:
    """Answers each request once its name is let go; notes what began and what was given up."""

    def __init__(self) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.given_up: list[str] = []

    def begin(self, message: Message) -> Begun:
        self.gates[message.name] = asyncio.Event()
        return Begun(message.order, self._answer(message.name))

    async def _answer(self, name: str) -> AsyncGenerator[str, None]:
        try:
            await self.gates[name].wait()
            if name == "bad":
                raise RuntimeError("nobody expected this")
            if name == "none":
                return
            yield name
            if name == "several":
                yield "more"
        except (asyncio.CancelledError, GeneratorExit):
            self.given_up.append(name)
            raise

    def release(self, *names: str) -> None:
        for name in names:
            self.gates[name].set()


async def asked(*messages: Message, stays_open: bool = False) -> AsyncIterator[Message]:
    for message in messages:
        yield message
    if stays_open:
        await asyncio.Event().wait()


async def turns(count: int = 20) -> None:
    """Lets everything go as far as it can."""
    for _ in range(count):
        await asyncio.sleep(0)


def run(test: object) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))  # type: ignore[arg-type]


def collect(stream: AsyncIterator[str]) -> asyncio.Task[list[str]]:
    async def all_of() -> list[str]:
        return [each async for each in stream]

    return asyncio.ensure_future(all_of())


@pytest.mark.parametrize("stays_open", [False, True], ids=["client has said all", "client may say more"])
def test_a_stream_that_is_drained_ends_when_its_requests_are_answered(stays_open: bool) -> None:
    async def test() -> None:
        streams, desk = Streams(BodyBudget(100)), Desk()
        answers = collect(streams.run(asked(Message("a"), Message("b"), stays_open=stays_open), desk.begin))
        await turns()
        streams.drain()
        await turns()
        assert not answers.done()
        desk.release("b", "a")
        assert await answers == ["a", "b"]

    run(test())


def test_answers_leave_in_the_order_of_their_requests_however_they_come(seed: int) -> None:
    chance = random.Random(seed)

    async def test() -> None:
        desk, names = Desk(), [str(number) for number in range(200)]
        stream = Streams(BodyBudget(10_000)).run(asked(*map(Message, names)), desk.begin)
        got: list[str] = []

        async def take() -> None:
            async for each in stream:
                got.append(each)
                await turns(chance.randrange(4))

        taking = asyncio.ensure_future(take())
        released: set[str] = set()
        while len(released) < len(names):
            waiting = [name for name in desk.gates if name not in released]
            if waiting:
                released.add(chance.choice(waiting))
                desk.release(*released)
            await turns(1 + chance.randrange(4))
        await taking
        assert got == names

    run(test())


def test_a_request_without_an_answer_or_with_several_keeps_its_place() -> None:
    async def test() -> None:
        desk = Desk()
        messages = asked(*(Message(name) for name in ("a", "none", "several", "b")))
        answers = collect(Streams(BodyBudget(100)).run(messages, desk.begin))
        for name in ("b", "several", "none"):
            await turns()
            desk.release(name)
        await turns()
        assert not answers.done()
        desk.release("a")
        assert await answers == ["a", "several", "more", "b"]

    run(test())


def test_requests_of_another_order_do_not_wait() -> None:
    async def test() -> None:
        desk, got = Desk(), []
        messages = asked(Message("a1", order="a"), Message("b1", order="b"), Message("a2", order="a"))

        async def take() -> None:
            async for each in Streams(BodyBudget(100)).run(messages, desk.begin):
                got.append(each)

        taking = asyncio.ensure_future(take())
        await turns()
        desk.release("a2", "b1")
        await turns()
        assert got == ["b1"]
        desk.release("a1")
        await taking
        assert got == ["b1", "a1", "a2"]

    run(test())


def test_an_answer_that_is_held_back_keeps_its_place_and_its_room() -> None:
    async def test() -> None:
        budget, desk = BodyBudget(100_000), Desk()
        names = [str(number) for number in range(STREAM_REQUESTS_MAX + 1)]
        answers = collect(Streams(budget).run(asked(*map(Message, names)), desk.begin))
        await turns()
        desk.release(*names[1:-1])
        await turns()
        assert len(desk.gates) == STREAM_REQUESTS_MAX and budget.size == 10 * STREAM_REQUESTS_MAX
        desk.release("0")
        await turns()
        desk.release(names[-1])
        assert await answers == names
        await turns()
        assert budget.size == 0

    run(test())


def test_a_client_that_goes_gives_up_answers_that_are_held_back() -> None:
    async def test() -> None:
        budget, desk = BodyBudget(100), Desk()
        answers = collect(Streams(budget).run(asked(Message("a"), Message("b"), stays_open=True), desk.begin))
        await turns()
        desk.release("b")
        await turns()
        answers.cancel()
        await asyncio.wait([answers])
        await turns()
        assert sorted(desk.given_up) == ["a", "b"] and budget.size == 0

    run(test())


def test_an_error_that_nobody_expected_ends_the_call(caplog: pytest.LogCaptureFixture) -> None:
    """A request without an answer would leave its client waiting."""

    async def test() -> None:
        budget, desk = BodyBudget(100), Desk()
        answers = collect(Streams(budget).run(asked(Message("a"), Message("bad"), stays_open=True), desk.begin))
        await turns()
        desk.release("bad")
        with pytest.raises(RuntimeError, match="nobody expected this"):
            await answers
        await turns()
        assert desk.given_up == ["a"] and budget.size == 0

    run(test())


def test_no_more_is_read_than_there_is_room_for() -> None:
    async def test() -> None:
        budget, desk = BodyBudget(25), Desk()
        messages = asked(*(Message(name) for name in "abcd"))
        answers = collect(Streams(budget).run(messages, desk.begin))
        await turns()
        assert list(desk.gates) == ["a", "b"] and budget.size == 20
        desk.release("a")
        await turns()
        assert list(desk.gates) == ["a", "b", "c"]
        desk.release("c")
        await turns()
        assert list(desk.gates) == ["a", "b", "c"]  # c's answer waits for b's
        desk.release("b")
        await turns()
        desk.release("d")
        assert await answers == ["a", "b", "c", "d"]
        await turns()
        assert budget.size == 0

    run(test())


def test_a_stream_that_finds_no_room_at_all_is_refused() -> None:
    async def test() -> None:
        budget, desk = BodyBudget(25), Desk()
        budget.size = 20  # others'
        with pytest.raises(OverloadedError) as raised:
            await collect(Streams(budget).run(asked(Message("a")), desk.begin))
        assert raised.value.detail == {"reason": "body budget", "body_budget_size": 25}
        assert not desk.gates and budget.size == 20

    run(test())


def test_a_client_that_goes_gives_up_its_requests_and_their_room() -> None:
    async def test() -> None:
        budget, desk = BodyBudget(100), Desk()
        answers = collect(Streams(budget).run(asked(Message("a"), Message("b"), stays_open=True), desk.begin))
        await turns()
        assert budget.size == 20
        answers.cancel()
        await asyncio.wait([answers])
        await turns()
        assert sorted(desk.given_up) == ["a", "b"] and budget.size == 0

    run(test())
