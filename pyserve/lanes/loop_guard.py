"""An archive's own code on the event loop (``isolation: thread``): while it runs, nothing else in the process does.

limit reached   a signal raises HandlerTimeout in it, if it is in Python
GRACE_S later   the process ends, and the supervisor starts another: nobody is answered by this one any more
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from pyserve.worker.failure import HandlerTimeout

T = TypeVar("T")

log = logging.getLogger(__name__)

# How often the call that runs is looked at; slack of its limit.
LOOK_S = 0.5
GRACE_S = 5.0
EXIT_HELD_UP = 6
# Not one that has a name, nor that of worker processes or of native runs.
_NUMBER = signal.SIGRTMIN + 9


class LoopGuard:
    """Of the main thread, where the loop runs. In other threads it does nothing.

    Args:
        leave: ends the process.
        is_on: else it does nothing at all: the process and its signals are somebody else's.
    """

    def __init__(self, leave: Callable[[int], object] = os._exit, *, is_on: bool = True):
        self._leave = leave
        self._is_on = is_on
        self._current: tuple[float, float, str] | None = None  # since when, limit, whose; s
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T], limit_s: float, label: str) -> T:
        """What ``call`` returns.

        Raises:
            HandlerTimeout: it took longer than ``limit_s``.
        """
        if self._thread is None and not self._start():
            return call()
        self._current = time.monotonic(), limit_s, label
        try:
            try:
                return call()
            finally:
                self._current = None
        except HandlerTimeout:
            self._current = None  # it may have come in the line above
            raise

    def _start(self) -> bool:
        if not self._is_on or threading.current_thread() is not threading.main_thread():
            return False
        signal.signal(_NUMBER, self._interrupt)
        self._thread = threading.Thread(target=self._watch, name="loop-guard", daemon=True)
        self._thread.start()
        return True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """On the main thread, between two of its instructions: the call is still that one, or none."""
        current = self._current
        if current is not None and time.monotonic() - current[0] >= current[1]:
            raise HandlerTimeout("the call went on past response_timeout")

    def _watch(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while True:
            time.sleep(LOOK_S)
            current = self._current
            if current is None:
                continue
            since, limit_s, label = current
            over_s = time.monotonic() - since - limit_s
            if over_s >= GRACE_S:
                log.critical("the code of %s has held up the whole server for %.1f s and cannot be interrupted: "
                             "another process takes this one's place", label, over_s + limit_s)  # fmt: skip
                self._leave(EXIT_HELD_UP)
            elif over_s >= 0:
                signal.pthread_kill(main, _NUMBER)
