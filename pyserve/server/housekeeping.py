"""Looks every few seconds whether somebody has removed files of ours, and makes them again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

INTERVAL_S = 2.0
_STOP_S = 1.0


class Housekeeping:
    """A thread of its own: a disk that does not answer must not keep the supervisor from restarting a server.

    Args:
        tasks: called one after the other; without any there is no thread. What one cannot do it is asked to do again.
    """

    def __init__(self, tasks: Sequence[Callable[[], None]], interval_s: float = INTERVAL_S):
        self._tasks = tasks
        self._interval_s = interval_s
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeping", daemon=True)

    def start(self) -> None:
        if self._tasks:
            self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is made any more, or the disk does not answer."""
        self._is_stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        while not self._is_stopping.wait(self._interval_s):
            for task in self._tasks:
                try:
                    task()
                except OSError:
                    continue  # a full disk, say; what it costs is said by those who need the file
                except Exception:
                    log.exception("looking after our own files failed")
