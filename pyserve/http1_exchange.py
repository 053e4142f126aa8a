"""One request and the place its answer will take."""

from __future__ import annotations

import logging
from collections.abc import Callable

from pyserve.messages import Request, Response

log = logging.getLogger("pyserve.http1")


class Exchange:
    """One request and its answer slot. Loop thread only.

    Attributes:
        request: the request, complete.
        answered: whether ``respond`` was called.
        on_disconnect: called once, on the loop, if the connection is lost before ``respond`` was called. Set it before
            the app returns.
        disconnected: whether the connection is lost; ``respond`` then does nothing.
        protocol_bytes: size of the request on the wire: head, body and framing.
        keep_alive: whether the connection may be kept after the answer. The protocol's.
        response: the answer until it is written. The protocol's.
        reserved: bytes of the body budget this request holds. The protocol's.
    """

    __slots__ = (
        "_deliver", "answered", "disconnected", "keep_alive", "on_disconnect", "protocol_bytes", "request", "reserved",
        "response",
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
        self.reserved = reserved
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

    def disconnect(self) -> None:
        """The connection is lost. Called by the protocol, once."""
        self.disconnected = True
        self.response = None
        callback = self.on_disconnect
        self.on_disconnect = None
        if callback is not None and not self.answered:
            try:
                callback()
            except Exception:
                log.exception("on_disconnect of request %s failed", self.request.id)
