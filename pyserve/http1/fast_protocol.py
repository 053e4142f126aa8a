"""HTTP/1.1 where native code answers plain requests: what it does not take, and all else, is `Http1Protocol`'s.

    transport ──> FastConnection (csrc/bindings_fast_path.h) ──> taken: a lane or a ring, and then the transport
                        └── not taken ──> received ──> Http1Protocol

One request of a connection may be under way natively, and only while the protocol has none. Before anything else
happens on the connection it is taken over: it becomes an exchange in the protocol's queue, as if it had always been
there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request

# Connection, a ticket, the request as it came, and what else its owner wants to know.
Call = tuple[Any, ...]


class CallOwner(Protocol):
    """The lane that a request runs in, or the door through which it went."""

    def take_over_call(self, call: Call) -> None:
        """Answers it from here on, as all others."""

    def row_cancelled(self, url_version: str) -> None:
        """The client of one has hung up."""


class NativeConnection(Protocol):
    """What is asked of `_core.FastConnection` and `_front.FastConnection`."""

    is_ready: bool

    @property
    def receive(self) -> Callable[[bytes], None]: ...
    @property
    def is_busy(self) -> bool: ...
    @property
    def arrived_at(self) -> int: ...
    @property
    def answered_at(self) -> int: ...
    def open(self, protocol: object, write: Callable[[bytes], None], client: str) -> None: ...
    def close(self) -> tuple[CallOwner | None, str] | None: ...
    def hand_over(self) -> tuple[CallOwner | None, Call] | None: ...


class FastExchange(Exchange):
    """Of a request that was under way natively, and that only endpoints can answer.

    Args:
        run: has its endpoint answer it, with the output of its model, as if it had come now.
    """

    __slots__ = ("_run", "kept")
    keeps_output = True

    def __init__(
        self, request: Request, deliver: Callable[[Exchange], None], protocol_bytes: int, reserved: int,
        run: Callable[[Exchange], None],
    ):  # fmt: skip
        super().__init__(request, deliver, True, protocol_bytes, reserved)
        self.kept: Any = None
        self._run = run

    def keep(self, output: Any) -> None:
        """Its model has run."""
        self.kept = output
        self.on_disconnect = None
        self._run(self)
        output.let_go()


class FastProtocol(Http1Protocol):
    """One connection. Loop thread only.

    Args:
        native: its native part.
    """

    def __init__(
        self, app: Callable[[Exchange], None], limits: Http1Limits, connections: Connections,
        native: NativeConnection, loop: asyncio.AbstractEventLoop | None = None,
    ):  # fmt: skip
        super().__init__(app, limits, connections, loop)
        self._native = native
        # Transports keep what they find here.
        self.data_received = native.receive  # type: ignore[method-assign, assignment]

    # transport -> protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._native.open(self, self._transport.write, self._client)
        self._make_ready()

    def received(self, data: bytes) -> None:
        """What the native part does not take."""
        self.take_over()
        super().data_received(data)
        if self._native.is_ready:  # said by what was answered at once; there may be more behind that in `data`
            self._make_ready()

    def eof_received(self) -> bool:
        self._native.is_ready = False
        self.take_over()
        return super().eof_received()

    def pause_writing(self) -> None:
        self._native.is_ready = False
        super().pause_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        cancelled = self._native.close()
        if cancelled is not None and cancelled[0] is not None:
            cancelled[0].row_cancelled(cancelled[1])
        super().connection_lost(exc)

    def drain(self) -> None:
        self._native.is_ready = False
        self.take_over()
        if self._is_idle():
            self._timer.deadline = max(self._timer.deadline, self._rests_until())
        super().drain()

    # requests that were under way natively

    def take_over(self) -> None:
        """Makes an exchange of the request that is under way natively, if there is one."""
        handed = self._native.hand_over()
        if handed is None:
            return
        owner, call = handed
        if owner is None:  # its lane has ended
            self._run(self._exchange_of(call[2]))
        else:
            owner.take_over_call(call)

    def adopt(self, ticket: int, data: bytes, id: str = "") -> Exchange:
        """The exchange of a request that was taken natively; whoever calls this sees to its answer.

        Args:
            ticket: 1 if its lane is to keep the output for an endpoint, which makes the answer; else 0.
            id: that it has been given already.
        """
        self._native.is_ready = False
        exchange = self._exchange_of(data)
        if id:
            exchange.request.id = id
        if ticket:
            self._slots.pop()
            exchange = FastExchange(exchange.request, self._on_answer, len(data), exchange.reserved, self._run)
            self._slots.append(exchange)
        return exchange

    def again(self, data: bytes) -> None:
        """A request that was taken natively, and comes to no answer there, as if it had come now."""
        content_size = len(data) - self._head_end(data)
        self._connections.budget.charge(content_size)
        self._run(self._exchange_of(data))

    def _exchange_of(self, data: bytes) -> Exchange:
        end = self._head_end(data)
        head = self._connections.heads.read(data[:end])
        content = bytearray(data[end:])
        return self._enter(head, content, len(data), len(content), self._native.arrived_at)

    @staticmethod
    def _head_end(data: bytes) -> int:
        return data.index(b"\r\n\r\n") + 4

    # what the native part does to the protocol's own times

    def _make_ready(self) -> None:
        """Has the native part look at what comes next, if nothing is under way here, not even half of a request."""
        may_be_ready = self._is_idle() and self._output.is_writable and not (self._eof or self._connections.draining)
        self._native.is_ready = may_be_ready and not self._transport.is_closing()

    def _flush(self) -> None:
        super()._flush()
        self._make_ready()

    def _rests_until(self) -> float:
        """Until when it may be idle, for the sake of what was answered natively; s of the loop's time."""
        answered_at = self._native.answered_at
        return answered_at / 1e9 + self._limits.idle_timeout_s if answered_at else 0.0

    def _on_deadline(self) -> None:
        now = self._loop.time()
        if self._native.is_busy:
            self._timer.set(now + self._limits.idle_timeout_s)
        elif self._is_idle() and not (self._eof or self._connections.draining) and now < self._rests_until():
            self._timer.set(self._rests_until())
        else:
            super()._on_deadline()


class FastTlsProtocol(FastProtocol, Http1TlsProtocol):
    """The same where the transport speaks TLS."""
