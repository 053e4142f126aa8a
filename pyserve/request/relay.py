"""An exchange that stands in front of another: what a model answers there is put into other words on its way out."""

from __future__ import annotations

import logging

from pyserve.errors import ServerError
from pyserve.log import about
from pyserve.request.exchange import Exchange, Part
from pyserve.request.messages import ErrorFormat, Response

log = logging.getLogger(__name__)


class Relay:
    """Loop thread only. Subclasses say what becomes of an answer, and of the parts of a streamed one.

    Args:
        outer: the client's, which is not answered yet.

    Attributes:
        exchange: to be handed to the model in place of ``outer``.
        outer: where the answer goes.
    """

    def __init__(self, outer: Exchange):
        self.outer = outer
        self.exchange = Exchange(outer.request, self._on_news, protocol_bytes=outer.protocol_bytes)
        self.exchange.is_http11 = outer.is_http11
        outer.on_disconnect = self.leave

    def whole(self, response: Response) -> None:
        """An answer, or an error, that is not streamed."""
        raise NotImplementedError

    def begin(self, head: Response) -> None:
        """A streamed answer begins; its parts follow, one by one."""
        raise NotImplementedError

    def part(self, part: Part) -> None:
        """The next part; not an empty one."""
        raise NotImplementedError

    def end(self) -> None:
        """That was the last part."""
        raise NotImplementedError

    def fail(self, failure: Response | None) -> None:
        """There are no more parts, since something failed."""
        raise NotImplementedError

    def leave(self) -> None:
        """The client has hung up, or wants no more: the model need not go on."""
        self.exchange.disconnect()

    def _on_news(self, exchange: Exchange) -> None:
        try:
            self._pass_on(exchange)
        except Exception:  # of what a handler answered; the client must not wait for ever
            request = self.outer.request
            log.exception("the answer to request %s could not be put into other words", request.id,
                          extra=about(request_id=request.id))  # fmt: skip
            self.leave()
            failure = ErrorFormat(with_detail=False).answer(ServerError("Internal error"), request)
            self.outer.respond(failure)
            self.outer.abort_stream(failure)  # if it has begun

    def _pass_on(self, exchange: Exchange) -> None:
        response, exchange.response = exchange.response, None
        if response is not None and not exchange.is_streaming:
            self.whole(response)
            return
        if response is not None:
            self.begin(response)
        parts, exchange.parts, exchange.parts_size = exchange.parts, [], 0
        for part in parts:
            if not exchange.disconnected:
                self.part(part)
        if exchange.is_ended and not exchange.disconnected:
            if exchange.is_aborted:
                self.fail(exchange.failure)
            else:
                self.end()
