"""``GET /docs``: a page that shows the listener's OpenAPI document and lets one try its operations; works offline.

Its files are in ``pyserve/api_docs``, plain JavaScript that runs as it is.
"""

from __future__ import annotations

import functools
from pathlib import Path

from pyserve.api.page_files import PageFiles
from pyserve.api.routes import RouteRow
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response

FOLDER = Path(__file__).resolve().parent.parent / "api_docs"
PAGE = "index.html"


@functools.cache
def _files() -> PageFiles:
    return PageFiles(FOLDER)


def docs_routes() -> list[RouteRow]:
    """The page and its files."""

    def show(exchange: Exchange, file: str = PAGE) -> Response:
        return _files().answer(file, exchange.request)

    return [("GET", "/docs", show), ("GET", "/docs/{file}", show)]
