"""Memory that batches have left free in the C library's heaps goes back to the system while no batches come.

Each heap keeps what the threads on it needed at once, for the next batch: that spares page faults. But with several
workers it is several times what runs at once, and no other process has any use of it. Loop thread only.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# Without a batch; the first one behind it pays for its pages again, some milliseconds for a large network.
REST_S = 30.0

_trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda padding: 0)  # only glibc has it


class MemoryAtRest:
    """Gives it back once for each time of rest.

    Args:
        rest_s: how long no batch has come then, or up to twice as long.
        trim: gives it back; any thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, rest_s: float = REST_S, trim: Callable[[int], int] = _trim
    ):  # fmt: skip
        self._loop = loop
        self._rest_s = rest_s
        self._trim = trim
        self._timer: asyncio.TimerHandle | None = None
        self._has_run = False

    def note_batch(self) -> None:
        """A batch has come to its end."""
        self._has_run = True
        if self._timer is None:
            self._timer = self._loop.call_later(self._rest_s, self._look)

    def close(self) -> None:
        """Nothing is given back any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._has_run:
            self._has_run = False
            self._timer = self._loop.call_later(self._rest_s, self._look)
        else:
            self._loop.run_in_executor(None, self._trim, 0)  # takes milliseconds, without the lock of Python
