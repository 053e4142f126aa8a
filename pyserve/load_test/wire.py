"""The load generator's sockets: a bare HTTP/1.1 client protocol on uvloop, and the loop that drives a ``Load``.

Light on purpose: request bytes are built once per file, connections are kept alive, there is no task, future or
timer per request.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import httptools

from pyserve.load_test.load import Load, Plan
from pyserve.load_test.recording import NEVER, NS_PER_S, Recording

SWEEP_S = 0.05  # how exactly a timeout is met, and how often a refused connection is tried again
SAMPLE_SIZE_MAX = 2000  # bytes kept of an error's body
CLOCK_MONOTONIC = 1
TFD_NONBLOCK_CLOEXEC = 0o2004000
TFD_TIMER_ABSTIME = 1


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        host: a resolved address; with a ``port`` of 0 the path of a unix socket.
        server_name: for TLS certificates.
    """

    host: str
    port: int
    server_name: str = ""
    tls: ssl.SSLContext | None = None


def request_bytes(method: str, path: str, host: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    """The whole request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method not in ("GET", "HEAD", "OPTIONS"):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class HttpWire(asyncio.Protocol):
    """One keep-alive connection with at most one request under way. Loop thread only."""

    __slots__ = (
        "_body",
        "_keep_alive",
        "_load",
        "_parser",
        "_size",
        "_status",
        "_transport",
        "intended",
        "is_busy",
        "sent_at",
    )

    def __init__(self, load: Load):
        self.intended = 0
        self.sent_at = 0
        self.is_busy = False
        self._load: Load | None = load
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._size = 0
        self._status = 0
        self._keep_alive = True
        self._body = b""

    # The load's side.

    def send(self, payload: bytes) -> None:
        self._size = 0
        if self._transport is not None:
            self._transport.write(payload)

    def close(self) -> None:
        self._load = None  # nothing that still arrives is reported
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclass
        if self._load is None or self._load.is_done:
            self._transport.abort()
        else:
            self._load.connected(self)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            # httptools also objects to bytes after an answer that ended the connection; nothing waits for those.
            if self._load is not None and self.is_busy:
                self._load.failed(self, "protocol")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._load is None:
            return
        if self.is_busy:
            self._load.failed(self, "reset")
        else:
            self._load.lost(self)

    # httptools' side.

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        # Read here: after the message is complete the parser gives wrong values.
        self._keep_alive = self._parser.should_keep_alive()
        self._body = b""

    def on_body(self, body: bytes) -> None:
        if self._status >= 300 and len(self._body) < SAMPLE_SIZE_MAX:
            self._body += body

    def on_message_complete(self) -> None:
        if self._status < 200 or self._load is None:
            return
        if self._status >= 300:
            samples = self._load.recording.samples
            samples.setdefault(str(self._status), self._body[:SAMPLE_SIZE_MAX].decode("utf-8", "replace").strip())
        if not self.is_busy:
            self._load.lost(self)  # an answer nobody asked for; the connection cannot be trusted
            return
        self._load.answered(self, self._status, self._size, self._keep_alive)


class Alarm:
    """Calls back at a time of ``time.monotonic_ns()``, to some 50 us where Linux' timerfd exists.

    The event loop's own timers have steps of a millisecond, which is longer than a fast server needs for an answer,
    and spinning instead would take a core from it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]):
        self._loop = loop
        self._callback = callback
        self._fd = -1
        self._timer: asyncio.TimerHandle | None = None
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK_CLOEXEC)
        if self._fd >= 0:
            loop.add_reader(self._fd, self._on_expired)

    def set(self, at: int) -> None:
        """Fires once at ``at`` (ns), or at once if that has passed. Replaces the time set before."""
        if self._fd >= 0:
            seconds, ns = divmod(max(at, 1), NS_PER_S)
            self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, struct.pack("@qqqq", 0, 0, seconds, ns), None)
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, (at - time.monotonic_ns()) / NS_PER_S), self._callback)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_expired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._callback()


class Driver:
    """Runs one ``Load`` over real sockets on the running event loop."""

    def __init__(self, plan: Plan, target: Target, payloads: list[bytes], recording: Recording):
        self._loop = asyncio.get_running_loop()
        self._target = target
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm = Alarm(self._loop, self._on_due)
        self.load = Load(plan, payloads, recording, connect=self._connect, now=time.monotonic_ns, on_done=self._on_done)

    async def run(self, start_at: int = 0) -> None:
        """From ``start_at`` (ns, now if it has passed) until the plan is carried out or ``load.stop`` was called."""
        await asyncio.sleep(max(0.0, (start_at - time.monotonic_ns()) / NS_PER_S))
        cpu_before, began_at = time.process_time(), time.monotonic()
        self.load.start()
        self._set_alarm()
        try:
            while not self._done.done():
                await asyncio.wait([self._done], timeout=SWEEP_S)
                self.load.sweep()
        finally:
            self._alarm.close()
            for task in self._tasks:
                task.cancel()
        passed = time.monotonic() - began_at
        self.load.recording.cpu_share = (time.process_time() - cpu_before) / max(passed, 1e-9)

    def _on_due(self) -> None:
        self.load.on_due()
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self.load.next_due != NEVER:
            self._alarm.set(self.load.next_due)

    def _on_done(self) -> None:
        for wire in list(self.load.wires):
            wire.close()
        if not self._done.done():
            self._done.set_result(None)

    def _connect(self) -> None:
        task = self._loop.create_task(self._open())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self) -> None:
        target = self._target
        try:
            await asyncio.wait_for(self._opening(target), self.load.plan.timeout / NS_PER_S)
        except ConnectionRefusedError:
            self.load.connect_failed("refused")
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            self.load.connect_failed("timeout")
        except ConnectionError:
            self.load.connect_failed("reset")
        except OSError as error:
            self.load.recording.samples.setdefault("connect", str(error))
            self.load.connect_failed("connect")

    async def _opening(self, target: Target) -> None:
        if not target.port:
            await self._loop.create_unix_connection(lambda: HttpWire(self.load), target.host)
            return
        await self._loop.create_connection(
            lambda: HttpWire(self.load), target.host, target.port, ssl=target.tls,
            server_hostname=target.server_name if target.tls else None,
        )  # fmt: skip
