"""The loop's lateness is counted, and what held it is named; with a clock of the test's own."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType

import pytest

from pyserve.telemetry import loop_watch
from pyserve.telemetry.loop_watch import BEAT_S, LoopWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Iterator[tuple[LoopWatch, Clock]]:
    clock = Clock()
    loop = asyncio.new_event_loop()

    async def make() -> LoopWatch:
        return LoopWatch(clock)

    watch = loop.run_until_complete(make())
    watch._set_next()
    yield watch, clock
    watch.stop()
    loop.close()


def beat(watch: LoopWatch, clock: Clock, late_s: float, *, is_looked_at: bool = False) -> None:
    clock.now = watch._due + late_s
    if is_looked_at:
        watch.look()
    watch._beat()


def samples(watch: LoopWatch) -> dict[str, float]:
    return {
        sample.name + sample.labels.get("le", ""): sample.value for each in watch.families() for sample in each.samples
    }


def test_lateness_is_counted(watch: tuple[LoopWatch, Clock]) -> None:
    for late_s in (0.0, 0.0005, 0.015, 0.03, 0.3):
        beat(*watch, late_s)
    found = samples(watch[0])
    assert found["pyserve_event_loop_stalls_total"] == 2
    assert found["pyserve_event_loop_lag_seconds_count"] == 5
    assert found["pyserve_event_loop_lag_seconds_bucket0.02"] == 3
    assert found["pyserve_event_loop_lag_seconds_sum"] == pytest.approx(0.3455)


def test_the_longest_is_named_once_in_a_while(
    watch: tuple[LoopWatch, Clock], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_watch, "_place", lambda frame: f"place {frame}" if frame else "")
    one, clock = watch
    places = iter(["first", "second", "third", "fourth"])
    monkeypatch.setattr(one, "_frames", lambda: {threading.get_ident(): next(places)})
    with caplog.at_level(logging.WARNING, "pyserve.telemetry.loop_watch"):
        beat(one, clock, 0.05, is_looked_at=True)  # too short for a line
        assert not caplog.records
        beat(one, clock, 0.15, is_looked_at=True)
        beat(one, clock, 0.4, is_looked_at=True)  # too soon for another line
        beat(one, clock, 0.2, is_looked_at=True)
        assert [record.args[:2] for record in caplog.records] == [(pytest.approx(150), "place second")]
        clock.now += 60
        one._set_next()
        beat(one, clock, 0.0)
    assert [record.args[:2] for record in caplog.records][1:] == [(pytest.approx(400), "place third")]


def test_what_nobody_saw_is_told_so(watch: tuple[LoopWatch, Clock], caplog: pytest.LogCaptureFixture) -> None:
    one, clock = watch
    one.look()  # of the beat before
    beat(one, clock, 0.0)
    with caplog.at_level(logging.WARNING, "pyserve.telemetry.loop_watch"):
        beat(one, clock, 1.0)
    assert "none of the server's code" in caplog.text


def test_the_innermost_function_of_ours_is_the_place() -> None:
    def ours(then: object) -> FrameType:
        return sys._getframe()

    # A frame of the package, with one of the standard library's below it.
    code = compile("def hold(call):\n    return call()\n", str(loop_watch._PACKAGE / "lanes/native.py"), "exec")
    space: dict[str, object] = {}
    exec(code, space)
    frame = space["hold"](lambda: [sys._getframe()][0])  # type: ignore[operator]
    assert loop_watch._place(frame) == "pyserve/lanes/native.py:2 in hold"
    assert loop_watch._place(ours(None)) == ""
    assert loop_watch._place(None) == ""


def test_it_runs_beside_a_loop_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> LoopWatch:
        watch = LoopWatch()
        watch.start()
        while sum(watch._counts) < 2:  # noqa: ASYNC110
            await asyncio.sleep(BEAT_S)
        watch.stop()
        return watch

    watch = asyncio.run(run())
    for thread in threading.enumerate():
        if thread.name == "loop-watch":
            thread.join(30)
            assert not thread.is_alive()
    assert watch._has_ended.is_set()


class Picture:
    """Something large."""


def test_nothing_that_threads_had_in_hand_is_kept(watch: tuple[LoopWatch, Clock]) -> None:
    has_it, may_end = threading.Event(), threading.Event()
    pictures: list[weakref.ref[Picture]] = []

    def work() -> None:
        picture = Picture()
        pictures.append(weakref.ref(picture))
        has_it.set()
        may_end.wait()

    worker = threading.Thread(target=work)
    worker.start()
    has_it.wait()
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        watch[0].look()
        may_end.set()
        worker.join()
        assert pictures[0]() is None
    finally:
        if is_enabled:
            gc.enable()
