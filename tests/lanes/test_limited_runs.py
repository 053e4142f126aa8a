"""Calls that run a network outside of its workers: a run that does not come to an end ends the call."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve import _core
from pyserve.lanes import limited_runs as module
from pyserve.lanes.limited_runs import EndlessError, limited_runs
from pyserve.lanes.stuck import StuckThreads
from tests.support.held import ENDLESS, Endless, Held, new_hold
from tests.support.networks import save_script

HANG_S = 60
ITEM, POISON = [torch.ones(1, 4)], [torch.full((1, 4), ENDLESS)]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))


def loaded(network: torch.nn.Module, folder: Path) -> Any:
    return _core.TorchModel.load(str(save_script(network, folder / "m.pt")), ITEM)


async def limited(call: Callable[[], Any], stuck: StuckThreads, **options: Any) -> Any:
    return await limited_runs(call, limit_s=0.2, stuck=stuck, label="m 1.0", **options)


def test_what_ends_in_time_is_returned_or_raised(tmp_path: Path) -> None:
    async def test() -> None:
        model, stuck = loaded(Endless(), tmp_path), StuckThreads()
        assert torch.equal(await limited(lambda: model.run(ITEM), stuck), ITEM[0] * 2)
        with pytest.raises(ZeroDivisionError):
            await limited(lambda: 1 // 0, stuck)
        assert await limited(threading.current_thread, stuck) is not threading.current_thread()

    run(test())


def test_an_endless_run_is_ended_and_the_call_makes_no_other(tmp_path: Path) -> None:
    async def test() -> None:
        model, stuck = loaded(Endless(), tmp_path), StuckThreads()
        ran: list[str] = []

        def call() -> None:
            for name, inputs in (("item", ITEM), ("poison", POISON), ("item again", ITEM), ("poison again", POISON)):
                with contextlib.suppress(RuntimeError):  # as trials do, which go on
                    model.run(inputs)
                    ran.append(name)

        with pytest.raises(EndlessError, match=r"m 1\.0: its forward did not .* startup_timeout=0\.2 s"):
            await limited(call, stuck)
        assert ran == ["item"] and stuck.count == 0
        assert torch.equal(await asyncio.to_thread(model.run, ITEM), ITEM[0] * 2)  # elsewhere it runs as ever

    run(test())


def test_errors_that_say_what_to_do_else_pass(tmp_path: Path) -> None:
    async def test() -> None:
        model, stuck = loaded(Endless(), tmp_path), StuckThreads()

        def call() -> None:
            try:
                model.run(POISON)
            except RuntimeError as error:
                raise LookupError("elsewhere") from error

        with pytest.raises(LookupError):
            await limited(call, stuck, passes=(LookupError,))
        with pytest.raises(EndlessError):
            await limited(call, stuck)

    run(test())


def test_a_thread_that_cannot_be_ended_is_counted_until_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.05)

    async def test() -> None:
        model, stuck, hold = loaded(Held(), tmp_path), StuckThreads(count_max=0), new_hold()
        try:
            with pytest.raises(EndlessError):
                await limited(lambda: model.run(POISON), stuck)
            assert stuck.what == ["loading m 1.0"]
            assert stuck.replacement.result().startswith("1 threads are stuck, the last one in loading m 1.0")
        finally:
            hold.release()
        while stuck.count:  # noqa: ASYNC110 - the thread ends by itself
            await asyncio.sleep(0.01)

    run(test())


def test_the_log_says_that_a_run_takes_long_before_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LONG_S", 0.0)

    async def test() -> None:
        model, stuck, hold = loaded(Held(), tmp_path), StuckThreads(), new_hold()
        call = asyncio.ensure_future(limited_runs(lambda: model.run(POISON), limit_s=3600, stuck=stuck, label="m 1.0"))
        while "m 1.0: its forward has run for" not in caplog.text:  # noqa: ASYNC110 - the log is nobody's to wait for
            await asyncio.sleep(0.01)
        hold.release()
        await call

    run(test())


def test_whoever_gives_up_waiting_leaves_a_thread_that_is_told_to_end(tmp_path: Path) -> None:
    async def test() -> None:
        model, stuck = loaded(Endless(), tmp_path), StuckThreads()
        call = asyncio.ensure_future(limited_runs(lambda: model.run(POISON), limit_s=60, stuck=stuck, label="m"))
        await asyncio.sleep(0.2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while stuck.count:  # noqa: ASYNC110 - the thread ends by itself
            await asyncio.sleep(0.01)
        assert not stuck.replacement.done()

    run(test())
