"""One HTTP request of an ASGI server: what comes by `receive` becomes an exchange, and its answer goes out by `send`.

Heads, bodies and answers are read, limited and written by what does so for sockets (`pyserve.http1`). The connection is
the server's: its framing, its keeping, its date.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pyserve.embedding.http_scope import Scope, client_of, has_framing, head_bytes
from pyserve.errors import ServeError
from pyserve.http1.answer import told_error
from pyserve.http1.connections import Connections
from pyserve.http1.errors import InvalidHttpError, SlowClientError
from pyserve.http1.head import Head, check_head_size
from pyserve.http1.incoming import Incoming, unread_request
from pyserve.log import about
from pyserve.request.exchange import Exchange
from pyserve.request.ids import new_id
from pyserve.request.messages import ExtraHeaders, Request, Response

log = logging.getLogger("pyserve.asgi")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# What is of the connection, which the server has.
_SERVERS_NAMES = (b"connection", b"date", b"transfer-encoding")


class AbortedAnswerError(Exception):
    """An answer cannot be completed: the server is to end the connection, so that nobody takes what came for all."""


class _GoneError(Exception):
    """The client has hung up."""


class HttpCall:
    """Loop thread only; `run` once.

    Args:
        app: answers the request.
        connections: what it shares with the others of its listener.
    """

    def __init__(
        self, app: Callable[[Exchange], None], connections: Connections, scope: Scope, receive: Receive, send: Send
    ):
        self._app = app
        self._connections = connections
        self._scope = scope
        self._receive = receive
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._client = client_of(scope)
        self._account = connections.budget.account(self._client)
        self._head: Head | None = None
        self._incoming: Incoming | None = None
        self._exchange: Exchange | None = None
        self._news = asyncio.Event()  # something of the answer is there, or nobody waits for it any more
        self._task = asyncio.current_task()

    async def run(self) -> None:
        """Returns when the answer was sent, or nobody waits for it.

        Raises:
            AbortedAnswerError: a part of it was sent, and the rest will not come.
        """
        refusal = self._connections.add(self)
        watching: asyncio.Task[None] | None = None
        try:
            await self._begin(refusal)
            if not self._news.is_set():
                watching = self._loop.create_task(self._watch())
            await self._answer()
        except _GoneError:
            pass
        finally:
            if watching is not None:
                watching.cancel()
            if self._incoming is not None:
                self._incoming.release()
            if self._exchange is not None:
                self._hang_up(self._exchange)
            self._connections.remove(self)

    # of `connections.Connection`

    def drain(self) -> None:
        """It ends with its answer anyhow."""

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()

    # --- the request ----------------------------------------------------------------------------------------------

    async def _begin(self, refusal: ServeError | None) -> None:
        """Reads the request and has it answered, now or later."""
        try:
            if refusal is not None:
                raise refusal
            content = await self._read()
        except ServeError as error:
            self._connections.refused[error.status] += 1
            request = unread_request(self._head, self._client, self._beginning())
            exchange = self._exchange = Exchange(request, self._on_answer)
            self._respond_error(exchange, error)
            return
        head, incoming = self._head, self._incoming
        assert head is not None and incoming is not None
        self._incoming = None
        request = Request(
            head.method, head.path, query=head.query, fields=head, body=content, client=self._client,
            id=head.id or new_id(), arrived_at=self._connections.clock(), has_timing=head.has_timing,
        )  # fmt: skip
        if head.chunked:
            request.add_headers(ExtraHeaders(("content-length", str(len(content)))))
        exchange = Exchange(request, self._on_answer, protocol_bytes=incoming.wire_size, reserved=incoming.reserved)
        exchange.is_http11 = head.is_http11
        self._exchange = exchange
        if incoming.refusal is not None:
            self._connections.refused[incoming.refusal.status] += 1
            self._respond_error(exchange, incoming.refusal)
            return
        if incoming.reserved:
            self._account.keep(exchange, incoming.reserved)
        try:
            self._app(exchange)
        except Exception as error:
            self._respond_error(exchange, told_error(error, request, log))

    async def _read(self) -> bytearray:
        """The body; sets ``_head`` and ``_incoming``.

        Raises:
            ServeError: the request is refused.
            _GoneError: its client has gone.
        """
        limits, scope = self._connections.limits, self._scope
        is_framed = has_framing(scope)
        message = None if is_framed else await self._next(limits.body_stall_s)
        has_body = message is not None and bool(message.get("body") or message.get("more_body"))
        data = head_bytes(scope, is_chunked=has_body)
        check_head_size(data, 0, data.find(b"\r\n\r\n", 0, limits.head_size_max), limits)
        head = self._head = self._connections.heads.read(data)
        incoming = self._incoming = Incoming(head, len(data), limits, self._account, self._loop.time, is_unframed=True)
        while not incoming.body.complete:
            if message is None:
                now = self._loop.time()
                message = await self._next(incoming.deadline(now) - now)
            part = message.get("body") or b""
            if part:
                incoming.feed(bytes(part), 0)
            if not message.get("more_body", False):
                if head.chunked:
                    incoming.end()
                elif incoming.direct_size:
                    raise InvalidHttpError("the connection ended within a request")
                break
            message = None
        return incoming.body.content

    async def _next(self, limit_s: float) -> Message:
        try:
            message = await asyncio.wait_for(self._receive(), limit_s)
        except asyncio.TimeoutError:
            limits = self._connections.limits
            raise SlowClientError(
                f"Request body came slower than {limits.body_rate_min} bytes/s or paused for {limits.body_stall_s:g} s."
            ) from None
        if message["type"] == "http.disconnect":
            raise _GoneError
        return message

    def _beginning(self) -> bytes:
        """With what its head began, which says in whose form errors are told."""
        try:
            return head_bytes({**self._scope, "headers": []}, is_chunked=False)
        except InvalidHttpError:
            return b""

    async def _watch(self) -> None:
        """Sees a client that hangs up before it has its answer."""
        with contextlib.suppress(Exception):
            while (await self._receive())["type"] != "http.disconnect":
                pass
        if self._exchange is not None:
            self._hang_up(self._exchange)

    def _hang_up(self, exchange: Exchange) -> None:
        if exchange.reserved:
            self._release(exchange)
        if not exchange.disconnected and (not exchange.answered or (exchange.is_streaming and not exchange.is_ended)):
            exchange.disconnect()
            self._news.set()

    # --- the answer -----------------------------------------------------------------------------------------------

    def _respond_error(self, exchange: Exchange, error: ServeError) -> None:
        exchange.respond(self._connections.error_format.answer(error, exchange.request))

    def _release(self, exchange: Exchange) -> None:
        self._account.forget(exchange)
        self._connections.budget.release(exchange.reserved)
        exchange.reserved = 0

    def _on_answer(self, exchange: Exchange) -> None:
        if exchange.reserved:
            self._release(exchange)
        compression = self._connections.compression
        if compression is not None and compression.take(exchange, lambda _: self._news.set()):
            return
        if exchange.parts_size > self._connections.limits.stream_backlog_max and not exchange.disconnected:
            log.warning("request %s: its client does not read the parts of the answer; the connection is ended",
                        exchange.request.id, extra=about(request_id=exchange.request.id))  # fmt: skip
            exchange.disconnect()
            exchange.is_aborted = True
        self._news.set()

    async def _answer(self) -> None:
        exchange = self._exchange
        assert exchange is not None
        await self._news.wait()
        if exchange.disconnected and not exchange.is_aborted:
            return
        response, exchange.response = exchange.response, None
        try:
            if exchange.is_streaming:
                await self._send_parts(exchange, response)
            elif response is not None:
                await self._send_whole(exchange.request, response)
        except OSError:  # the client has gone, as newer servers say
            self._hang_up(exchange)

    async def _send_whole(self, request: Request, response: Response) -> None:
        self._connections.on_answer(request, response.status, self._scope.get("http_version") != "1.0")
        data, parts = self._connections.answers.encode(response, request, True)
        head, _, body = data.partition(b"\r\n\r\n")
        await self._send(_start(head))
        for part in parts:
            await self._send({"type": "http.response.body", "body": bytes(part), "more_body": True})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_parts(self, exchange: Exchange, response: Response | None) -> None:
        request, answers = exchange.request, self._connections.answers
        assert response is not None
        self._connections.on_answer(request, response.status, exchange.is_http11)
        head = answers.stream_head(response, request, True, False)
        if head is None:
            raise AbortedAnswerError(f"answer to request {request.id} cannot be sent")
        await self._send(_start(head.partition(b"\r\n\r\n")[0]))
        is_wanted = request.method != "HEAD"
        while True:
            self._news.clear()
            while exchange.parts:
                part = exchange.take_part(False)
                if is_wanted:
                    await self._send({"type": "http.response.body", "body": part, "more_body": True})
            if exchange.is_aborted:
                raise AbortedAnswerError(f"answer to request {request.id} ends before it is complete")
            if exchange.disconnected:
                return
            if exchange.is_ended:
                break
            await self._news.wait()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _start(head: bytes) -> Message:
    """``http.response.start`` of the status line and the headers."""
    line, *fields = head.split(b"\r\n")
    headers = []
    for field in fields:
        name, _, value = field.partition(b": ")
        lower = name.lower()
        if lower not in _SERVERS_NAMES:
            headers.append((lower, value))
    return {"type": "http.response.start", "status": int(line[9:12]), "headers": headers}
