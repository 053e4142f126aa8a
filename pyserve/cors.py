"""Cross-origin resource sharing: the headers by which a browser lets pages of other sites read our answers."""

from __future__ import annotations

from collections.abc import Mapping

from pyserve.config import Config
from pyserve.http1_exchange import Exchange, Part
from pyserve.messages import Response


class CorsExchange(Exchange):
    """An exchange whose answer gets the CORS headers, unless it has them already."""

    __slots__ = ("_cors", "_exchange")

    def __init__(self, exchange: Exchange, cors: Mapping[str, str]):
        super().__init__(
            exchange.request, lambda _: None, keep_alive=exchange.keep_alive, protocol_bytes=exchange.protocol_bytes
        )
        self._exchange = exchange
        self._cors = cors
        exchange.on_disconnect = self.disconnect

    def respond(self, response: Response) -> None:
        if not self.answered:
            self.answered = True
            self.on_disconnect = None
            self._exchange.respond(self._with_cors(response))

    def start_stream(self, response: Response) -> None:
        if not self.answered:
            self.answered = self.is_streaming = True
            self._exchange.start_stream(self._with_cors(response))

    def write(self, part: Part) -> None:
        self._exchange.write(part)

    def end_stream(self, part: Part = b"") -> None:
        self.on_disconnect = None
        self._exchange.end_stream(part)

    def abort_stream(self, failure: Response | None = None) -> None:
        self.on_disconnect = None
        self._exchange.abort_stream(failure)

    def _with_cors(self, response: Response) -> Response:
        own = {name.lower() for name in response.headers}
        missing = {name: value for name, value in self._cors.items() if name not in own}
        response.headers = {**response.headers, **missing}
        return response


def cors_headers(config: Config) -> dict[str, str]:
    """The ``access-control-*`` headers that the configuration asks for."""
    headers = {
        "access-control-allow-origin": config.cors_allowed_origin,
        "access-control-allow-methods": config.cors_allowed_methods,
        "access-control-allow-headers": config.cors_allowed_headers,
    }
    return {name: value for name, value in headers.items() if value}
