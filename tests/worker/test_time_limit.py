"""A time limit around the archive's code, and the timers that such code has of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from pyserve.worker.failure import HandlerTimeout
from pyserve.worker.time_limit import time_limit

LIMIT_S = 60.0


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Grows with each alarm."""
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    try:
        yield seen
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait_for(seen: list[int], count: int) -> None:
    end = time.monotonic() + LIMIT_S
    while len(seen) < count and time.monotonic() < end:
        time.sleep(0.001)
    assert len(seen) >= count


def test_what_runs_too_long_is_interrupted(alarms: list[int]) -> None:
    with pytest.raises(HandlerTimeout), time_limit(0.01) as limit:
        time.sleep(LIMIT_S)
    assert limit.is_over
    with pytest.raises(HandlerTimeout):
        limit.check()
    assert alarms == []
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_timer_that_was_set_before_goes_off_afterwards(alarms: list[int]) -> None:
    signal.setitimer(signal.ITIMER_REAL, 3600, 0.001)
    with time_limit(LIMIT_S):
        assert alarms == []
    remaining, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 3600 - LIMIT_S < remaining <= 3600
    assert interval == pytest.approx(0.001)
    # One that would have gone off meanwhile does so at once.
    while True:
        alarms.clear()
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.001)
        with time_limit(LIMIT_S):
            before = list(alarms)
            time.sleep(0.03)
            assert alarms == before
        if not before:  # else it went off before the limit began: this process was kept waiting
            break
    wait_for(alarms, 2)
