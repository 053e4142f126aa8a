"""The console: a page for browsers at ``/`` of the inference and the management port, and the files that it loads.

The files are in ``pyserve/console``, plain JavaScript that runs as it is. They hold nothing of this server: what the
page shows comes from ``/console/state`` (`pyserve.api.console_state`) and from the API of its port, under their keys.
It loads nothing from elsewhere, see `pyserve.api.page_files`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from pyserve.api.page_files import PageFiles
from pyserve.api.routes import Endpoint, RouteRow
from pyserve.errors import MethodNotAllowedError
from pyserve.request.accept import accepted
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response

FOLDER = Path(__file__).resolve().parent.parent / "console"
ASSET_PATTERN = "/console/{asset}"
PAGE = "index.html"


class Console:
    """The page and its files, read once. Loop thread only.

    Args:
        scope: the API whose port it is on: ``inference`` or ``management``.
        serves_both: both are on it.
    """

    def __init__(self, scope: str, *, serves_both: bool = False, folder: Path = FOLDER):
        self._files = PageFiles(folder, partial(_made_for, scope=scope, serves_both=serves_both))

    def routes(self, rows: Iterable[RouteRow]) -> list[RouteRow]:
        """The page and its files, to stand before ``rows``, which are all that the listener answers."""
        plain = next((endpoint for methods, pattern, endpoint in rows if (methods, pattern) == ("GET", "/")), None)
        return [("GET", "/", self._front(plain)), ("GET", ASSET_PATTERN, self.show_asset)]

    def _front(self, plain: Endpoint | None) -> Endpoint:
        """The page for browsers; for all others what ``plain`` answers, or that there is nothing to get."""

        def show(exchange: Exchange) -> Response:
            if wants_page(exchange.request):
                response = self._files.answer(PAGE, exchange.request)
                response.headers["Vary"] = "Accept"
                return response
            if plain is None:
                raise MethodNotAllowedError("OPTIONS", detail={"fix": "methods here: OPTIONS"})
            answer = plain(exchange)
            assert isinstance(answer, Response)
            return answer

        return show

    def show_asset(self, exchange: Exchange, asset: str) -> Response:
        """One file of the page."""
        return self._files.answer(asset, exchange.request)


def _made_for(body: bytes, *, scope: str, serves_both: bool) -> bytes:
    """The page knows where it is before its first request; other files have none of these words."""
    made = body.replace(b'data-scope="inference"', f'data-scope="{scope}"'.encode())
    return made.replace(b'data-both="false"', b'data-both="true"') if serves_both else made


def wants_page(request: Request) -> bool:
    """Whether the client asks for HTML by name, as browsers do: ``*/*`` is what API clients send."""
    return accepted(request, "accept").get("text/html", 0) > 0
