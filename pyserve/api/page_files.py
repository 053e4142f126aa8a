"""Pages for browsers: their files, read once, and the headers that keep all else out of them.

A page loads nothing but files of its own folder, and its policy forbids it to: no script that is not one of these files
ever runs. The files hold nothing of this server; what a page shows comes from the API of its port, under its keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pyserve.errors import ResourceNotFoundError
from pyserve.request.messages import Request, Response

TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
# Pictures that were chosen or answered are blobs of the page's own.
POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and then mostly not sent again
}


class _File(NamedTuple):
    body: bytes
    content_type: str
    etag: str


class PageFiles:
    """The files of one page.

    Args:
        folder: where they lie; what has none of TYPES' endings is left out.
        change: what becomes of each file's bytes before they are served.
    """

    def __init__(self, folder: Path, change: Callable[[bytes], bytes] = bytes):
        self._files = {
            path.name: _File(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
            for path in sorted(folder.iterdir())
            if path.suffix in TYPES
            for body in [change(path.read_bytes())]
        }

    def answer(self, name: str, request: Request) -> Response:
        """The file, or that the client's copy is still right.

        Raises:
            ResourceNotFoundError: there is no such file.
        """
        file = self._files.get(name)
        if file is None:
            raise ResourceNotFoundError()
        headers = {**HEADERS, "ETag": file.etag}
        known = [each.strip().removeprefix("W/") for each in request.header("if-none-match").split(",")]
        if file.etag in known:
            return Response(304, headers=headers)
        return Response(200, file.body, content_type=file.content_type, headers=headers)
