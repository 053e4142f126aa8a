"""An exchange that stands in front of another: what a model answers there is put into other words on its way out."""

from __future__ import annotations

from pyserve.request.exchange import Exchange, Part
from pyserve.request.messages import Response


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
