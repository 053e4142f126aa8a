"""Stand-ins for the event loop, the clock and the transport, all driven by hand. No test that uses them waits."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any


class FakeTimer:
    """What ``call_at`` returns."""

    def __init__(self, when: float, callback: Callable[..., object], args: tuple[Any, ...]):
        self.when = when
        self.callback = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeLoop(asyncio.AbstractEventLoop):
    """A loop whose clock stands still until ``advance`` is called."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now

    def monotonic_ns(self) -> int:
        """The same clock for code that reads ``time.monotonic_ns``."""
        return int(self.now * 1e9)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        timer = FakeTimer(when, callback, args)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        return self.call_at(self.now + delay, callback, *args)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        return self.call_at(-math.inf, callback, *args)

    def advance(self, seconds: float = 0.0) -> None:
        """Moves the clock, calling on the way what falls due, at the time it falls due."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, when)
                timer.callback(*timer.args)
        self.now = end

    @property
    def timer_count(self) -> int:
        """Timers that would still fire."""
        return sum(not timer.cancelled for _, _, timer in self._timers)


class FakeTransport(asyncio.Transport):
    """Collects what is written. With ``stalled`` the peer reads nothing until ``take`` is called.

    Attributes:
        writes: each buffer given to ``write``.
        eof_written, closed, aborted, reading: what the protocol did to the connection.
    """

    def __init__(self, loop: FakeLoop, protocol: asyncio.Protocol, peername: Any = ("127.0.0.1", 43090)):
        super().__init__({"peername": peername})
        self.loop = loop
        self.protocol: Any = protocol
        self.writes: list[bytes | bytearray | memoryview] = []
        self.eof_written = False
        self.closed = False
        self.aborted = False
        self.reading = True
        self.stalled = False
        self._lost = False
        self._waiting = 0
        self._high = 64 * 1024

    @property
    def output(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.eof_written:
            raise RuntimeError("write after write_eof")
        if self.closed:
            return
        self.writes.append(data)
        if self.stalled:
            before = self._waiting
            self._waiting += len(data)
            if before <= self._high < self._waiting:
                self.protocol.pause_writing()

    def writelines(self, parts: Iterable[bytes | bytearray | memoryview]) -> None:
        for part in parts:
            self.write(part)

    def take(self, size: int) -> None:
        """The peer reads ``size`` bytes of what waits."""
        before = self._waiting
        self._waiting = max(0, before - size)
        if before > self._high // 4 >= self._waiting:
            self.protocol.resume_writing()
        if self.closed and not self._waiting:
            self._lose(None)

    def lose(self, error: Exception | None = None) -> None:
        """The connection breaks."""
        self.closed = True
        self._lose(error)
        self.loop.advance()

    def close(self) -> None:
        self.closed = True
        if not self._waiting:
            self._lose(None)

    def abort(self) -> None:
        self.closed = self.aborted = True
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self.loop.call_soon(self.protocol.connection_lost, error)

    def write_eof(self) -> None:
        self.eof_written = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def deliver(self, data: bytes) -> None:
        """A segment comes from the peer, to whatever kind of protocol reads."""
        rest = memoryview(data)
        while rest and not self.closed:
            assert self.reading, "delivered while reading is paused"
            size = len(rest)
            if isinstance(self.protocol, asyncio.BufferedProtocol):
                place = self.protocol.get_buffer(size)
                size = min(size, len(place))
                place[:size] = rest[:size]
                del place
                self.protocol.buffer_updated(size)
            else:
                self.protocol.data_received(bytes(rest))
            rest = rest[size:]
            self.loop.advance()

    def get_write_buffer_size(self) -> int:
        return self._waiting

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high if high is not None else self._high
