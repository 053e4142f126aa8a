"""Threads of this process that run code which does not come to an end.

Nothing ends a thread from outside. Where asking it to stop does not help, it is given up: something else takes its
place, and nobody waits for it. It still has a core, so there must not be many: beyond a limit, or when nothing in the
process has to do with it any more, another process is to take this one's place, see `server.main`.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


def stuck_max(configured: int, cpus: int) -> int:
    """How many threads may be stuck; half of the CPUs, at least one, if ``configured`` is 0."""
    return configured or max(1, cpus // 2)


class StuckThreads:
    """Counts them.

    Args:
        count_max: with more of them the process is to be replaced.
        native_count: gives how many workers of the native engine are lost.

    Attributes:
        replacement: has the reason, once the process is to be replaced.
    """

    def __init__(self, count_max: int = 1, native_count: Callable[[], int] = lambda: 0):
        self.replacement: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._count_max = count_max
        self._native_count = native_count
        self._others: dict[object, str] = {}

    @property
    def count(self) -> int:
        """How many there are now."""
        return self._native_count() + len(self._others)

    def add(self, thread: object, what: str) -> None:
        """A thread of Python's is stuck.

        Args:
            thread: what `discard` will name.
            what: it runs, for the log.
        """
        self._others[thread] = what
        self.look(what)

    def add_leaving(self, thread: object, what: str) -> None:
        """As `add`, while the process ends or the thread is about to: nothing follows from it."""
        self._others[thread] = what

    @property
    def what(self) -> list[str]:
        """What they run, for the log."""
        native = self._native_count()
        return [*self._others.values(), *([f"{native} native workers"] if native else [])]

    def discard(self, thread: object) -> None:
        """It has come to its end after all; or never was stuck."""
        self._others.pop(thread, None)

    def look(self, what: str) -> None:
        """To be called after each loss, of ``what``."""
        if self.count > self._count_max:
            self._replace(f"{self.count} threads are stuck, the last one in {what}, and stuck_threads_max is "
                          f"{self._count_max}")  # fmt: skip

    def abandon(self, what: str) -> None:
        """A stuck thread is left behind by ``what``, which nobody asks for any more."""
        self._replace(f"a thread is stuck in {what}, which is not served any more")

    def _replace(self, reason: str) -> None:
        if not self.replacement.done():
            self.replacement.set_result(reason)
