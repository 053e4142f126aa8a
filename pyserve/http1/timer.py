"""Deadlines that are moved on every request and almost never pass."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


def _ignore() -> None:
    """Of a timer that is no more."""


class LazyTimer:
    """Calls ``expired`` once ``deadline`` has passed.

    Moving the deadline later costs one assignment: the timer under it stays, and looks again when it fires.

    Attributes:
        deadline: seconds of ``loop.time()``, or infinity. May be set later, or to infinity, by plain assignment.
    """

    __slots__ = ("_expired", "_handle", "_handle_at", "_loop", "deadline")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]):
        self._loop = loop
        self._expired = expired
        self._handle: asyncio.TimerHandle | None = None
        self._handle_at = math.inf
        self.deadline = math.inf

    def set(self, deadline: float) -> None:
        """Moves the deadline, earlier or later."""
        self.deadline = deadline
        if deadline < self._handle_at:
            if self._handle is not None:
                self._handle.cancel()
            self._handle_at = deadline
            self._handle = self._loop.call_at(deadline, self._fire)

    def cancel(self) -> None:
        """Never calls ``expired`` again."""
        self.deadline = math.inf
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._handle_at = -math.inf
        self._expired = _ignore  # which holds the connection that holds this timer

    def _fire(self) -> None:
        self._handle = None
        self._handle_at = math.inf
        if self._loop.time() >= self.deadline:
            self.deadline = math.inf
            self._expired()
        elif self.deadline != math.inf:
            self.set(self.deadline)


class StallTimer:
    """Cuts off a client that does not read what waits for it. Loop thread only.

    Args:
        transport: whose write buffer is watched.
        stall_s: time in which the client must take ``rate_min`` bytes per second of what waits.
    """

    __slots__ = ("_loop", "_rate_min", "_stall_s", "_timer", "_transport", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, *, stall_s: float, rate_min: int):
        self._loop = loop
        self._transport = transport
        self._stall_s = stall_s
        self._rate_min = rate_min
        self._waiting = 0
        self._timer = LazyTimer(loop, self._look)

    def watch(self) -> None:
        """Begins to watch if bytes are waiting."""
        self._waiting = self._transport.get_write_buffer_size()
        if self._waiting:
            self._timer.set(self._loop.time() + self._stall_s)

    def rest(self) -> None:
        """The client has read enough."""
        self._timer.deadline = math.inf

    def cancel(self) -> None:
        """Never looks again."""
        self._timer.cancel()

    def _look(self) -> None:
        left = self._transport.get_write_buffer_size()
        if left and self._waiting - left < self._rate_min * self._stall_s:
            self._transport.abort()
        else:
            self.watch()
