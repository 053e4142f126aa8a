"""One request and the place its answer will take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pyserve.log import about
from pyserve.request.messages import Request, Response

Part = bytes | bytearray | memoryview

log = logging.getLogger("pyserve.http1")


class Exchange:
    """One request and its answer slot. Loop thread only.

    Attributes:
        request: the request, complete.
        answered: whether ``respond`` was called.
        on_disconnect: called once, on the loop, if the connection is lost before ``respond`` was called. Set it before
            the app returns.
        disconnected: whether the connection is lost; ``respond`` then does nothing.
        is_http11: whether the client can read chunks.
        is_streaming: whether the answer goes out in parts, see `start_stream`.
        protocol_bytes: size of the request on the wire: head, body and framing.
        keep_alive: whether the connection may be kept after the answer. The protocol's.
        response: the answer, or its head, until it is written. The protocol's.
        parts: those of a streamed answer that have not been written. The protocol's.
        parts_size: bytes in them.
        is_ended: no more parts come.
        reserved: bytes of the body budget this request holds. The protocol's.
        failure: why there are no more parts, of a stream that was aborted.
        kept: what its model has made of it already, see `lanes.kept_output`; None of almost all.
        keeps_output: when its model has run, `keep` is called in place of `respond`, unless that failed.
    """

    kept: Any = None
    keeps_output = False
    __slots__ = (
        "_deliver", "answered", "disconnected", "failure", "is_aborted", "is_ended", "is_http11", "is_streaming",
        "keep_alive", "on_disconnect", "parts", "parts_size", "protocol_bytes", "request", "reserved", "response",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        deliver: Callable[[Exchange], None],
        keep_alive: bool = False,
        protocol_bytes: int = 0,
        reserved: int = 0,
    ):
        self.request = request
        self.answered = False
        self.on_disconnect: Callable[[], None] | None = None
        self.disconnected = False
        self.protocol_bytes = protocol_bytes
        self.keep_alive = keep_alive
        self.response: Response | None = None
        self.failure: Response | None = None
        self.reserved = reserved
        self.is_http11 = True
        self.is_streaming = self.is_ended = self.is_aborted = False
        self.parts: list[Part] = []
        self.parts_size = 0
        self._deliver = deliver

    def respond(self, response: Response) -> None:
        """Answers the request. The first call counts, later ones and those after a disconnect do nothing."""
        if self.answered:
            return
        self.answered = True
        # It refers back to the exchange: left here, body and model would live until a garbage collection.
        self.on_disconnect = None
        if not self.disconnected:
            self.response = response
            self._deliver(self)

    def keep(self, output: Any) -> None:
        """Its model's output, for who makes the answer of it: a `lanes.kept_output.KeptOutput`."""
        raise NotImplementedError

    def watch(self, call: Callable[[Exchange], object]) -> None:
        """Has ``call`` called with this exchange each time its answer, or a part of it, is about to be delivered."""
        deliver = self._deliver

        def call_and_deliver(exchange: Exchange) -> None:
            try:
                call(exchange)
            except Exception:
                id = exchange.request.id
                log.exception("watching request %s failed", id, extra=about(request_id=id))
            deliver(exchange)

        self._deliver = call_and_deliver

    # --- an answer in parts ---------------------------------------------------------------------------------------

    def start_stream(self, response: Response) -> None:
        """Begins an answer that comes in parts: ``response`` is its head, and its body the first part.

        `on_disconnect` stays: it is called if the connection is lost before the last part. A second answer is dropped.
        """
        if self.answered:
            return
        self.answered = True
        self.is_streaming = True
        if not self.disconnected:
            self._add(response.body)
            self.response = response
            self._deliver(self)

    def write(self, part: Part) -> None:
        """The next part. Sent at once if it is this answer's turn, else kept."""
        if self.is_streaming and not (self.disconnected or self.is_ended):
            self._add(part)
            self._deliver(self)

    def end_stream(self, part: Part = b"") -> None:
        """The last part."""
        if self.is_streaming and not self.is_ended:
            self.on_disconnect = None
            if not self.disconnected:
                self._add(part)
                self.is_ended = True
                self._deliver(self)

    def abort_stream(self, failure: Response | None = None) -> None:
        """There will be no more: resets the connection, so that the client does not take what it has for all.

        ``failure`` is the error answer that comes too late, for protocols that can still send it.
        """
        if self.is_streaming and not self.is_ended:
            self.failure = failure
            self.on_disconnect = None
            self.is_ended = self.is_aborted = True
            if not self.disconnected:
                self._deliver(self)

    def take_part(self, is_chunked: bool) -> bytes:
        """The first of ``parts``, no longer among them, as it is written."""
        part = bytes(self.parts.pop(0))
        self.parts_size -= len(part)
        return b"%x\r\n%b\r\n" % (len(part), part) if is_chunked else part

    def _add(self, part: Part) -> None:
        size = memoryview(part).nbytes
        if size:
            self.parts.append(part)
            self.parts_size += size

    def disconnect(self) -> None:
        """The connection is lost. Called by the protocol, once."""
        self.disconnected = True
        self.response = None
        self.parts.clear()
        callback = self.on_disconnect
        self.on_disconnect = None
        if callback is not None and (not self.answered or self.is_streaming):
            try:
                callback()
            except Exception:
                id = self.request.id
                log.exception("on_disconnect of request %s failed", id, extra=about(request_id=id))
