"""HTTP/1.1 server protocol: bytes -> ``Request`` -> app -> ``Response`` -> bytes. No policy, no endpoints.

A connection reads heads and bodies in turn:

    HEAD ──head with a body──> BODY ──body complete──> HEAD
      └──────── last request, framing error, time out ────────> CLOSED   (input is thrown away)

Requests stand in a queue of exchanges until answered; answers are written from its front, so pipelined requests are
answered in order whatever order the app answers in. No task and no future is made for a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Callable
from typing import cast

from pyserve.errors import ServeError
from pyserve.http1.answer import JOINED_SIZE_MAX, told_error
from pyserve.http1.connections import Connections
from pyserve.http1.direct import DIRECT_SIZE_MIN, DirectBody
from pyserve.http1.errors import BodyTooLargeError, InvalidHttpError, SlowClientError
from pyserve.http1.head import Head, check_head_size, check_head_start
from pyserve.http1.incoming import Incoming, unread_request
from pyserve.http1.limits import Http1Limits
from pyserve.http1.output import Output
from pyserve.http1.peer import client_name, descriptor_of, probe_pause_s, unread_size
from pyserve.http1.timer import LazyTimer, StallTimer
from pyserve.log import about
from pyserve.request.body_budget import QUICK_SIZE_MAX, Account
from pyserve.request.exchange import Exchange
from pyserve.request.ids import new_id
from pyserve.request.messages import ExtraHeaders, Request

log = logging.getLogger("pyserve.http1")

_HEAD, _BODY, _CLOSED = range(3)
_BEGIN_SIZE_MAX = 1024  # of a head that is refused; its path is looked at


class Http1Protocol(asyncio.Protocol):
    """One connection. Loop thread only.

    Args:
        app: called with each complete request, on the loop; answers by ``Exchange.respond``, now or later.
        limits: of this connection.
        connections: the listener's register of connections.
        loop: the loop; the running one if not given.
    """

    def __init__(
        self, app: Callable[[Exchange], None], limits: Http1Limits, connections: Connections,
        loop: asyncio.AbstractEventLoop | None = None,
    ):  # fmt: skip
        # constant
        self._app = app
        self._limits = limits
        self._connections = connections
        self._loop = loop or asyncio.get_running_loop()
        # per connection
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until connection_made
        self._client = "unix"
        self._output = Output(connections, self._has_input)
        self._slots = self._output.slots
        self._timer = LazyTimer(self._loop, self._on_deadline)
        self._phase = _HEAD
        self._paused = False
        self._backlog = b""  # came after reading was paused
        self._eof = False
        self._probe_count = 0
        self._linger = False
        self._discarded = 0
        self._discarded_max = limits.linger_size_max
        # per request
        self._partial = bytearray()  # of a head
        self._blank_size = 0  # of empty lines before it
        self._head: Head | None = None  # of a request whose body is being read
        self._incoming: Incoming | None = None  # of a body
        self._account: Account | None = None  # of the client's address, once a body has not come with its head

    # transport -> protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = self._output.transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=JOINED_SIZE_MAX)
        self._client = client_name(transport.get_extra_info("peername"))
        self._stall = StallTimer(
            self._loop, self._transport, stall_s=self._limits.write_stall_s, rate_min=self._limits.body_rate_min
        )
        refusal = self._connections.add(self, descriptor_of(transport))
        if refusal is None:
            self._timer.set(self._loop.time() + self._limits.idle_timeout_s)
            if self._connections.draining:
                self.drain()
        elif not transport.is_closing():
            self._refuse(refusal)

    def data_received(self, data: bytes) -> None:
        if self._paused:
            self._backlog += data
        else:
            self._advance(data)
            if self._connections.draining:
                self.drain()

    def eof_received(self) -> bool:
        self._eof = True
        if not self._paused:
            self._on_eof()
        return True  # the answers still go out; the protocol closes after them

    def pause_writing(self) -> None:
        self._output.is_writable = False
        self._stall.watch()

    def resume_writing(self) -> None:
        self._output.is_writable = True
        if not self._transport.is_closing():
            self._stall.rest()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = _CLOSED
        self._timer.cancel()
        self._stall.cancel()
        self._connections.remove(self)
        self._abandon()
        self._output.close()

    def _abandon(self) -> None:
        """Nobody can be answered any more."""
        self._forget_request()
        exchanges = list(self._slots)
        self._slots.clear()
        for exchange in exchanges:
            self._release(exchange)
            exchange.disconnect()

    # the listener -> protocol

    def drain(self) -> None:
        """Closes once idle for a moment, else after the answers to what has been received.

        For a moment, since a client that has connected or was answered just now is likely to send a request.
        """
        if self._is_idle():
            last = self._timer.deadline - self._limits.idle_timeout_s
            self._timer.set(max(self._loop.time(), last + self._limits.quiet_s))

    def _is_idle(self) -> bool:
        return self._phase == _HEAD and not (self._slots or self._partial or self._paused)

    def abort(self) -> None:
        """Closes at once, whatever is under way."""
        self._transport.abort()

    # reading

    def _advance(self, data: bytes) -> None:
        start, size = 0, len(data)
        slots = self._slots
        try:
            while start < size and self._phase != _CLOSED:
                if self._incoming is not None:
                    start = self._take_body(self._incoming, data, start)
                elif len(slots) >= self._limits.pipeline_max or not self._output.is_writable:
                    break
                else:
                    start = self._take_head(data, start)
        except ServeError as error:
            self._refuse(error, data[start : start + _BEGIN_SIZE_MAX])
            return
        if self._phase == _CLOSED:
            if start < size:
                self._discard(size - start)
        elif self._incoming is not None:
            self.body_grew(self._incoming)
            if self._incoming.direct_size >= DIRECT_SIZE_MIN:
                DirectBody(self, self._transport, self._incoming, self._loop)
        elif start < size or len(slots) >= self._limits.pipeline_max:
            self._pause(data[start:])

    def body_grew(self, incoming: Incoming) -> None:
        """Some of the body has come; there is more to come."""
        self._timer.set(incoming.deadline(self._loop.time()))

    def body_came(self, incoming: Incoming) -> None:
        """All of a body has come that was read directly; the transport reads on when this is done with."""
        if incoming is self._incoming:
            self._transport.resume_reading()
            self._end_body(incoming)
            self._advance(b"")
            if self._connections.draining:
                self.drain()

    def _take_head(self, data: bytes, start: int) -> int:
        if self._partial:
            return self._extend_head(data, start)
        while data.startswith(b"\r\n", start):  # RFC 9112, 2.2: empty lines before a request are ignored
            start += 2
            self._count_blank()
        end = data.find(b"\r\n\r\n", start, start + self._limits.head_size_max)
        if end < 0:
            if start < len(data):
                check_head_size(data, start, end, self._limits)
                self._partial += memoryview(data)[start:]
                check_head_start(self._partial)
                self._timer.set(self._loop.time() + self._limits.head_timeout_s)
            return len(data)
        if end - start > self._limits.line_size_max:
            check_head_size(data, start, end, self._limits)
        end += 4
        head = self._connections.heads.read(data[start:end])
        body_end = end + head.length
        if body_end > len(data) or not head.is_simple or not self._is_quick(head.length):
            self._on_head(head, end - start)
            return end
        self._blank_size = 0
        self._complete(head, bytearray(data[end:body_end]), body_end - start, head.length)
        return body_end

    def _is_quick(self, size: int) -> bool:
        """Takes ``size`` bytes from the budget if a body of that size needs no state of its own."""
        limits = self._limits
        return size <= QUICK_SIZE_MAX and size <= limits.body_size_max and self._connections.budget.reserve_quick(size)

    def _extend_head(self, data: bytes, start: int) -> int:
        partial = self._partial
        if partial == b"\r":
            if data[start] != 0x0A:
                raise InvalidHttpError("the request does not begin with a method")
            partial.clear()
            self._count_blank()
            return start + 1
        known = len(partial)
        partial += memoryview(data)[start : start + self._limits.head_size_max - known]
        end = partial.find(b"\r\n\r\n", max(known - 3, 0))
        check_head_size(partial, 0, end, self._limits)
        if end < 0:
            check_head_start(partial, known)
            return len(data)
        end += 4
        head = self._connections.heads.read(bytes(memoryview(partial)[:end]))
        partial.clear()
        self._on_head(head, end)
        return start + end - known

    def _count_blank(self) -> None:
        self._blank_size += 2
        if self._blank_size > self._limits.line_size_max:
            raise InvalidHttpError("too many empty lines before the request")

    def _on_head(self, head: Head, size: int) -> None:
        self._blank_size = 0
        self._phase = _BODY
        self._head = head
        account = self._account
        if account is None:
            account = self._account = self._connections.budget.account(self._client)
        incoming = self._incoming = Incoming(head, size, self._limits, account, self._loop.time)
        if incoming.body.complete:
            self._end_body(incoming)
        elif incoming.continue_owed and not self._slots:
            self._write_continue(incoming)

    def _take_body(self, incoming: Incoming, data: bytes, start: int) -> int:
        end = incoming.feed(data, start)
        if incoming.body.complete:
            self._end_body(incoming)
        return end

    def _end_body(self, incoming: Incoming) -> None:
        self._incoming = self._head = None
        self._phase = _HEAD
        self._complete(incoming.head, incoming.body.content, incoming.wire_size, incoming.reserved, incoming)

    def _complete(
        self, head: Head, content: bytearray, wire_size: int, reserved: int, incoming: Incoming | None = None
    ) -> None:
        exchange = self._enter(head, content, wire_size, reserved, self._connections.clock())
        if incoming is None or self._is_wanted(incoming, exchange):
            self._run(exchange)

    def _enter(self, head: Head, content: bytearray, wire_size: int, reserved: int, arrived_at: int) -> Exchange:
        """The exchange of a request that is complete, in the queue."""
        request = Request(
            head.method, head.path, query=head.query, fields=head, body=content, client=self._client,
            id=head.id or new_id(), arrived_at=arrived_at, has_timing=head.has_timing,
        )  # fmt: skip
        if head.chunked:
            request.add_headers(ExtraHeaders(("content-length", str(len(content)))))  # as TorchServe's handlers have it
        exchange = Exchange(request, self._on_answer, head.keep_alive, wire_size, reserved)
        exchange.is_http11 = head.is_http11
        self._slots.append(exchange)
        self._timer.deadline = math.inf
        if not head.keep_alive:
            self._phase = _CLOSED
        return exchange

    def _run(self, exchange: Exchange) -> None:
        try:
            self._app(exchange)
        except Exception as error:
            self._respond_error(exchange, told_error(error, exchange.request, log))

    def _is_wanted(self, incoming: Incoming, exchange: Exchange) -> bool:
        refusal = incoming.refusal
        if refusal is not None:
            self._connections.refused[refusal.status] += 1
            self._respond_error(exchange, refusal)
            return False
        if incoming.reserved and self._account is not None:
            self._account.keep(exchange, incoming.reserved)
        return True

    def _respond_error(self, exchange: Exchange, error: ServeError) -> None:
        exchange.respond(self._connections.error_format.answer(error, exchange.request))

    def _refuse(self, error: ServeError, begin: bytes = b"") -> None:
        """Answers a request that cannot be read on, after those before it, and ends the connection.

        Args:
            begin: with what its head began, if it was not read and is not kept.
        """
        self._connections.refused[error.status] += 1
        if isinstance(error, BodyTooLargeError):
            # An honest client sends all of it before it reads; let it, as far as the time goes. Chunks tell no end.
            self._discarded_max = max(self._discarded_max, error.announced or sys.maxsize)
        request = unread_request(self._head, self._client, bytes(self._partial[:_BEGIN_SIZE_MAX]) or begin)
        self._forget_request()
        self._phase = _CLOSED
        self._timer.deadline = math.inf
        self._linger = not isinstance(error, SlowClientError)
        exchange = Exchange(request, self._on_answer)
        self._slots.append(exchange)
        self._respond_error(exchange, error)

    def _forget_request(self) -> None:
        self._partial.clear()
        self._backlog = b""
        self._head = None
        if self._incoming is not None:
            self._incoming.release()
            self._incoming = None

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > self._discarded_max:
            if self._slots:
                self._transport.pause_reading()
            else:
                self._close()

    def _pause(self, rest: bytes) -> None:
        self._paused = True
        self._backlog = rest
        self._timer.deadline = math.inf  # it is we who do not read
        self._transport.pause_reading()

    def _unpause(self) -> None:
        self._paused = False
        data, self._backlog = self._backlog, b""
        if self._partial:
            self._timer.set(self._loop.time() + self._limits.head_timeout_s)
        if data:
            self._advance(data)
        if not (self._paused or self._transport.is_closing()):
            self._transport.resume_reading()
        if self._eof and not self._paused:
            self._on_eof()

    def _on_eof(self) -> None:
        if self._phase == _CLOSED:
            if not self._slots:
                self._close()
        elif self._partial or self._phase == _BODY:
            self._refuse(InvalidHttpError("the connection ended within a request"))
        elif self._slots:
            self._slots[-1].keep_alive = False
            self._phase = _CLOSED
        else:
            self._close()
        if self._slots:
            self._timer.set(self._loop.time() + probe_pause_s(0))

    # writing

    def _on_answer(self, exchange: Exchange) -> None:
        if exchange.reserved:
            self._release(exchange)
        compression = self._connections.compression
        if compression is not None and compression.take(exchange, self._deliver):
            return
        self._deliver(exchange)

    def _deliver(self, exchange: Exchange) -> None:
        if self._slots and self._slots[0] is exchange:
            self._flush()
        if exchange.parts_size > self._limits.stream_backlog_max:
            log.warning("request %s: its client does not read the parts of the answer; the connection is reset",
                        exchange.request.id, extra=about(request_id=exchange.request.id))  # fmt: skip
            self._transport.abort()

    def _flush(self) -> None:
        """Writes the answers that are at the front of the queue."""
        if not self._output.flush():
            self._finish()
            return
        slots = self._slots
        if self._paused and self._output.is_writable and len(slots) <= self._limits.pipeline_max // 2:
            self._unpause()
        if slots or self._paused:
            return
        if self._phase == _HEAD:
            if not self._partial:
                self._timer.set(self._loop.time() + self._limits.idle_timeout_s)
        elif self._incoming is not None and self._incoming.continue_owed:
            self._write_continue(self._incoming)

    def _has_input(self) -> bool:
        return bool(self._partial or self._incoming or self._backlog or unread_size(self._transport))

    def _write_continue(self, incoming: Incoming) -> None:
        incoming.continue_owed = False
        self._output.write_continue()

    def _finish(self) -> None:
        """The last answer is written: closes so that the client can read it."""
        self._phase = _CLOSED
        self._forget_request()
        lingers = self._linger or self._discarded or self._connections.parting
        if self._eof or self._discarded > self._discarded_max or not lingers:
            self._close()
            return
        self._half_close()

    def _half_close(self) -> None:
        # Closing with unread input would reset the connection, and lose the answer perhaps.
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._end_output()
        limits = self._limits
        linger_s = limits.parting_linger_s if self._connections.parting else limits.linger_timeout_s
        self._timer.set(self._loop.time() + linger_s)
        self._stall.watch()

    def _end_output(self) -> None:
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _close(self) -> None:
        self._phase = _CLOSED
        self._timer.deadline = math.inf
        self._transport.close()
        self._stall.watch()

    # clocks

    def _probe(self) -> None:
        """Whether a client that sends no more has gone shows when it is sent something."""
        self._output.probe()
        self._probe_count += 1
        self._timer.set(self._loop.time() + probe_pause_s(self._probe_count))

    def _on_deadline(self) -> None:
        if self._eof and self._slots:
            self._probe()
        elif self._phase == _BODY:
            limits = self._limits
            self._refuse(SlowClientError(
                f"Request body came slower than {limits.body_rate_min} bytes/s or paused for {limits.body_stall_s:g} s."
            ))  # fmt: skip
        elif self._partial and self._phase == _HEAD:
            self._refuse(SlowClientError(f"Request head took longer than {self._limits.head_timeout_s:g} s."))
        elif self._phase == _HEAD and unread_size(self._transport):
            self._timer.set(self._loop.time() + self._limits.quiet_s)  # the loop has not come to read it yet
        elif self._phase == _HEAD and self._connections.draining:
            self._phase = _CLOSED
            self._half_close()
        else:
            self._close()

    def _release(self, exchange: Exchange) -> None:
        if self._account is not None:
            self._account.forget(exchange)
        self._connections.budget.release(exchange.reserved)
        exchange.reserved = 0
