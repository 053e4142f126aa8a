"""Calls of archives' own code in the server that do not come to an end: interrupted, or their threads replaced."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from pyserve.errors import DeadlineError
from pyserve.lanes import loop_guard, preprocess_pool
from pyserve.lanes.loop_guard import EXIT_HELD_UP, LoopGuard
from pyserve.lanes.preprocess_pool import LimitedCall, PreprocessPool
from pyserve.lanes.stuck import StuckThreads
from pyserve.worker.failure import HandlerTimeout

HANG_S = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (preprocess_pool, loop_guard):
        monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(preprocess_pool, "GRACE_S", 0.05)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))


def spin(until: threading.Event) -> str:
    while not until.is_set():
        pass
    return "ended"


async def each_answers(pool: PreprocessPool, count: int = 20) -> None:
    """Each of the pool's threads answers."""
    futures = [asyncio.wrap_future(pool.submit(LimitedCall(lambda n=n: n, 60, "m"))) for n in range(count)]
    assert await asyncio.gather(*futures) == list(range(count))


def test_a_call_in_python_is_interrupted_and_its_thread_goes_on() -> None:
    async def test() -> None:
        stuck = StuckThreads()
        pool = PreprocessPool(1, stuck)
        over = threading.Event()
        try:
            for _ in range(5):
                result = await asyncio.wrap_future(pool.submit(LimitedCall(lambda: spin(over), 0.05, "m 1.0")))
                assert isinstance(result, DeadlineError) and "limit response_timeout=0.05 s" in result.message
                await each_answers(pool)
            assert stuck.count == 0 and len(pool._threads) == 1
        finally:
            over.set()
            pool.shutdown()

    run(test())


def test_a_thread_that_cannot_be_interrupted_is_replaced_and_comes_back_without_a_trace() -> None:
    async def test() -> None:
        stuck = StuckThreads(count_max=1)
        pool = PreprocessPool(1, stuck)
        held = [threading.Event(), threading.Event()]
        before = threading.active_count()
        try:
            futures = []
            for event in held:
                futures.append(asyncio.wrap_future(pool.submit(LimitedCall(event.wait, 0.05, "m 1.0"))))
                await each_answers(pool)  # only another thread can answer these
            assert stuck.count == 2 and stuck.what == ["preprocess of m 1.0"] * 2
            assert stuck.replacement.result().startswith("2 threads are stuck, the last one in preprocess of m 1.0")
            for event in held:
                event.set()
            assert not [each for each in await asyncio.gather(*futures) if not isinstance(each, (bool, DeadlineError))]
            while stuck.count or threading.active_count() > before:  # noqa: ASYNC110 - threads end by themselves
                await asyncio.sleep(0.01)
            await each_answers(pool)
        finally:
            pool.shutdown()

    run(test())


def test_a_call_that_ends_as_it_is_interrupted_harms_no_other() -> None:
    async def test() -> None:
        pool = PreprocessPool(2, StuckThreads(count_max=1000))
        ends_at = [0.0004 * n for n in range(60)]

        def last(seconds: float) -> str:
            end = time.monotonic() + 0.01 + seconds
            while time.monotonic() < end:
                pass
            return "ended"

        try:
            for seconds in ends_at:
                result = await asyncio.wrap_future(pool.submit(LimitedCall(lambda s=seconds: last(s), 0.01, "m")))
                assert result == "ended" or isinstance(result, DeadlineError)
                await each_answers(pool, 4)
        finally:
            pool.shutdown()

    run(test())


def test_what_was_not_begun_is_cancelled_when_the_pool_is_shut() -> None:
    async def test() -> None:
        stuck = StuckThreads()
        pool = PreprocessPool(1, stuck)
        event = threading.Event()
        pool.submit(LimitedCall(event.wait, 60, "m 1.0"))
        while not pool._threads[0].current[0]:  # noqa: ASYNC110 - a thread takes it
            await asyncio.sleep(0)
        waiting = pool.submit(LimitedCall(lambda: 1, 60, "m 1.0"))
        pool.shutdown()
        assert waiting.cancelled() and stuck.what == ["preprocess of m 1.0"] and not stuck.replacement.done()
        with pytest.raises(RuntimeError):
            pool.submit(lambda: 1)
        event.set()

    run(test())


def test_code_on_the_loop_is_interrupted_at_its_limit_and_not_later() -> None:
    guard = LoopGuard()
    never = threading.Event()
    with pytest.raises(HandlerTimeout):
        guard.run(lambda: spin(never), 0.05, "m 1.0")
    assert guard.run(lambda: "quick", 60, "m 1.0") == "quick"
    for n in range(40):  # it ends as it is interrupted
        end = time.monotonic() + 0.01 + n * 0.0005

        def last(end: float = end) -> str:
            while time.monotonic() < end:
                pass
            return "ended"

        with contextlib.suppress(HandlerTimeout):
            assert guard.run(last, 0.01, "m 1.0") == "ended"
        sum(range(1000))  # where a late one would be raised


def test_code_on_the_loop_that_cannot_be_interrupted_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_guard, "GRACE_S", 0.05)
    left = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    def hold() -> None:
        # As C code that looks at no signals: it goes on after each interruption.
        while not left.is_set():
            with contextlib.suppress(HandlerTimeout):
                left.wait(0.01)

    guard = LoopGuard(leave)
    with contextlib.suppress(HandlerTimeout):
        guard.run(hold, 0.01, "m 1.0")
    assert set(codes) == {EXIT_HELD_UP}
