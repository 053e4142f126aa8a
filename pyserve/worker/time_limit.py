"""A time limit for calls of the archive's code in the main thread of a process."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from pyserve.worker.failure import HandlerTimeout

# Zero would stop the timer.
_AT_ONCE_S = 1e-6


class TimeLimit:
    """A time that may be over.

    Attributes:
        is_over: whether what ran was interrupted.
    """

    is_over = False

    def check(self) -> None:
        """Raises HandlerTimeout if it is over: code that caught the first one must not continue."""
        if self.is_over:
            raise HandlerTimeout("the time is over")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[TimeLimit]:
    """Raises HandlerTimeout, once, in what runs within when the time is over, as soon as that is in Python.

    In other threads than the main one nothing is interrupted.
    """
    limit = TimeLimit()
    if threading.current_thread() is not threading.main_thread():
        yield limit
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        limit.is_over = True
        raise HandlerTimeout("the call went on past its time")

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield limit
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if remaining:  # the archive's code has set one of its own before
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - began), _AT_ONCE_S), interval)
