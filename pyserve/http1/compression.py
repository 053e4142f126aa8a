"""Answers in a coding that the client names in ``Accept-Encoding``, where that is worth its time.

Only whole answers from a least size on, and only if their first bytes become smaller by it: numbers and pictures mostly
do not. Answers in parts leave as they are: a part must not wait for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from pyserve.request import zstandard
from pyserve.request.accept import accepted
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response, SharedHeaders

log = logging.getLogger("pyserve.http1")

# Up to so many bytes are compressed on the loop, in less than 100 us.
QUICK_SIZE_MAX = 8 << 10
# If these become no smaller than that, the rest is left alone.
_TRIED_SIZE = 16 << 10
_TRIED_RATIO_MAX = 0.9
_LEVEL = 1  # a fifth of the time of the usual one, for a few percent of size
_PIECE_SIZE = 1 << 20
_VARY = SharedHeaders({"vary": "Accept-Encoding"})
# In the order of preference among those that a client takes equally.
_CODINGS = (*(("zstd",) if zstandard.zstd is not None else ()), "gzip", "deflate")
# Media types whose content is compressed already; but for vector graphics, which are text.
_PACKED_KINDS = ("image/", "audio/", "video/", "font/woff")
_PACKED_TYPES = ("application/zip", "application/gzip", "application/x-gzip", "application/zstd", "application/pdf")
_NEVER_STATUSES = (204, 205, 206, 304)
# With one of these the answer's bytes are said to be as they are.
_FIXING_HEADERS = frozenset(
    ("content-encoding", "content-range", "content-md5", "content-digest", "repr-digest", "digest", "etag")
)


class Compression:
    """Loop thread only.

    Args:
        pool: where larger answers are compressed.
        size_min: bytes; smaller answers leave as they are.
    """

    def __init__(self, pool: Executor, size_min: int):
        self.size_min = size_min
        self._pool = pool

    def codes(self, accepted: str) -> bool:
        """Whether answers to requests with this ``Accept-Encoding`` are compressed, if that is worth its time."""
        return bool(_coding_for(Request("GET", "/", headers=[("accept-encoding", accepted)])))

    def note_choice(self, response: Response) -> None:
        """What an answer of at least `size_min` says that leaves as it is, since its client takes no coding."""
        if _may_be_coded(response):
            response.headers = _with_vary(response.headers)

    def take(self, exchange: Exchange, deliver: Callable[[Exchange], object]) -> bool:
        """Whether the answer of ``exchange`` leaves later: then it is taken away, and ``deliver`` called with it there.

        Else the answer is there, as it was or compressed.
        """
        response, request = exchange.response, exchange.request
        if response is None or exchange.is_streaming or (len(response.body) < self.size_min and not response.tail):
            return False
        size = _size(response)
        if size < self.size_min or request.method == "HEAD" or not _may_be_coded(response):
            return False
        coding = _coding_for(request)
        if not coding:
            response.headers = _with_vary(response.headers)
            return False
        parts = [_bytes_of(part) for part in (response.body, *response.tail)]
        if size <= QUICK_SIZE_MAX:
            exchange.response = _coded(response, _compress(parts, coding), coding)
            return False
        try:
            future = self._pool.submit(_compress, parts, coding)
        except RuntimeError:  # the pool is shut, as the server ends
            return False
        loop = asyncio.get_running_loop()
        exchange.response = None

        def done(finished: Future[bytes | None]) -> None:
            if not exchange.disconnected:
                exchange.response = _coded(response, _result(finished, request), coding)
                deliver(exchange)

        future.add_done_callback(lambda each: loop.call_soon_threadsafe(done, each))
        return True


def _bytes_of(part: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(part)
    return view.cast("B") if view.nbytes and view.c_contiguous else memoryview(bytes(view))


def _size(response: Response) -> int:
    return memoryview(response.body).nbytes + sum(memoryview(part).nbytes for part in response.tail)


def _may_be_coded(response: Response) -> bool:
    kind = (response.content_type or "").partition(";")[0].strip().lower()
    names: dict[str, str] = {}
    if response.headers:
        # A handler may have set anything; what cannot be sent is refused when it is written.
        names = {str(name).lower(): str(value).lower() for name, value in response.headers.items()}
        kind = kind or names.get("content-type", "").partition(";")[0].strip()
    is_packed = kind in _PACKED_TYPES or (kind.startswith(_PACKED_KINDS) and kind != "image/svg+xml")
    return not (
        is_packed
        or response.status in _NEVER_STATUSES
        or not _FIXING_HEADERS.isdisjoint(names)
        or "no-transform" in names.get("cache-control", "")
    )


def _coding_for(request: Request) -> str:
    """The coding that the client likes best, and the answer as it is not better; ``""`` for none."""
    weights = accepted(request, "accept-encoding")
    if not weights:
        return ""
    if "x-gzip" in weights:
        weights = {"gzip": weights["x-gzip"], **weights}
    others = weights.get("*", 0.0)
    best = max(_CODINGS, key=lambda coding: weights.get(coding, others))
    weight = weights.get(best, others)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else ""


def _compress(parts: list[memoryview], coding: str) -> bytes | None:
    """The parts joined in ``coding``; None if they hardly become smaller. Any thread."""
    first = b""
    for part in parts:
        first += part[: _TRIED_SIZE - len(first)]
    if len(zlib.compress(first, _LEVEL)) > len(first) * _TRIED_RATIO_MAX:
        return None
    encoder: Any
    if coding == "zstd":
        encoder = zstandard.compressor(_LEVEL)
    else:
        encoder = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31 if coding == "gzip" else 15)
    made = []
    for part in parts:
        made += [encoder.compress(part[at : at + _PIECE_SIZE]) for at in range(0, len(part), _PIECE_SIZE)]
    made.append(encoder.flush())
    return b"".join(made)


def _result(finished: Future[bytes | None], request: Request) -> bytes | None:
    if finished.cancelled():
        return None
    error = finished.exception()
    if error is not None:
        log.error("answer to request %s could not be compressed and leaves as it is", request.id, exc_info=error)
        return None
    return finished.result()


def _coded(response: Response, body: bytes | None, coding: str) -> Response:
    headers = _with_vary(response.headers)
    if body is None:
        response.headers = headers
        return response
    coded = Response(
        response.status, body, content_type=response.content_type, reason=response.reason,
        headers={**headers, "content-encoding": coding},
    )  # fmt: skip
    coded.error = response.error
    return coded


def _with_vary(headers: dict[str, str]) -> dict[str, str]:
    """For caches: the answer depends on the client's header."""
    if not headers:
        return _VARY
    varies = next((str(value) for name, value in headers.items() if str(name).lower() == "vary"), "")
    if varies.strip() == "*" or "accept-encoding" in varies.lower():
        return headers
    rest = {name: value for name, value in headers.items() if str(name).lower() != "vary"}
    return {**rest, "vary": f"{varies}, Accept-Encoding" if varies else "Accept-Encoding"}
