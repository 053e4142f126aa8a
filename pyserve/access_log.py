"""The access log: a line for every answer, in TorchServe's form.

    2026-11-23T01:57:15,723 - /127.0.0.1:43090 "GET /models/densenet161 HTTP/1.1" 200 87

The last number is in ms. An answer costs the event loop one tuple; lines are made by the thread that writes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve.archive_url import query_without_secrets
from pyserve.log import clock_text, time_text
from pyserve.log_files import LogWriter
from pyserve.messages import Request

FILE = "access_log.log"
# What TorchServe writes for bytes that are no request.
_BAD_REQUEST = ("GET", "/bad-request")
_UNQUOTED = "/:@!$&'()*+,;=~-._"
# Of targets whose text is remembered, so that it is not made for every line.
_HEADS_MAX = 1024
_HEAD_SIZE_MAX = 256


class AccessLog:
    """Notes answers. Loop thread only.

    Args:
        folder: of the file.
        as_json: one JSON object per line instead of TorchServe's form.
        clock: ns, monotonic, as ``Request.arrived_at`` has it.
    """

    def __init__(
        self, writer: LogWriter, folder: Path, *, as_json: bool = False, clock: Callable[[], int] = time.monotonic_ns
    ):
        self._clock = clock
        self._heads: dict[tuple[str, str, str | None, str, int], str] = {}
        self._put = writer.open(folder / FILE, self._json_lines if as_json else self._lines).put

    def observe(  # noqa: PLR0917 - made for every answer
        self, client: str, method: str, uri: str, protocol: str, status: int, arrived_at: int, request_id: str = ""
    ) -> None:
        """Notes an answer of any kind.

        Args:
            client: ``127.0.0.1:43090``, or ``unix``.
            method: of HTTP, or ``gRPC``.
            uri: as the client sent it; of a gRPC call the method's full name.
            protocol: such as ``HTTP/1.1``; ``HTTP/2.0`` for gRPC.
            status: of HTTP or of gRPC.
            arrived_at: the request, in ns of the clock.
        """
        self._put((self._clock(), arrived_at, client, method, uri, None, protocol, status, request_id))

    def observe_http(self, request: Request, status: int, is_http11: bool) -> None:
        """Notes the answer to ``request``; one without a method was no HTTP."""
        self._put((
            self._clock(), request.arrived_at, request.client, request.method, request.path, request.query,
            "HTTP/1.1" if is_http11 else "HTTP/1.0", status, request.id,
        ))  # fmt: skip

    # --- on the writer's thread -----------------------------------------------------------------------------------

    def _lines(self, entries: list[Any]) -> str:
        lines = []
        heads = self._heads
        offset = time.time_ns() - self._clock()
        second_before, prefix = -1, ""
        for at, arrived_at, client, method, path, query, protocol, status, _ in entries:
            second, ms = divmod((at + offset) // 1_000_000, 1000)
            if second != second_before:
                second_before, prefix = second, time_text(second)[:-3]
            key = (method, path, query, protocol, status)
            head = heads.get(key)
            if head is None:
                head = self._new_head(key)
            # The protocol's own refusals have no time of arrival.
            took_ms = (at - arrived_at) // 1_000_000 if arrived_at else 0
            lines.append(f"{prefix}{ms:03d} - /{client} {head} {took_ms}\n")
        return "".join(lines)

    def _new_head(self, key: tuple[str, str, str | None, str, int]) -> str:
        method, path, query, protocol, status = key
        if not method:
            method, path = _BAD_REQUEST
        if len(self._heads) >= _HEADS_MAX:
            self._heads.clear()
        head = f'"{method} {_uri(path, query)} {protocol}" {status}'
        if len(head) <= _HEAD_SIZE_MAX:
            self._heads[key] = head
        return head

    def _json_lines(self, entries: list[Any]) -> str:
        lines = []
        offset = time.time_ns() - self._clock()
        for at, arrived_at, client, method, path, query, protocol, status, request_id in entries:
            named, where = (method, path) if method else _BAD_REQUEST
            uri = _uri(where, query)
            members = {
                "time": clock_text((at + offset) / 1e9), "level": "INFO", "logger": "ACCESS_LOG",
                "message": f"{named} {uri} {status}", "client": client, "method": named, "uri": uri,
                "protocol": protocol, "status": status,
                "ms": (at - arrived_at) // 1_000_000 if arrived_at else 0, "request_id": request_id,
            }  # fmt: skip
            lines.append(json.dumps(members) + "\n")
        return "".join(lines)


def _uri(path: str, query: str | None) -> str:
    """The target in one line without blanks; ``path`` is decoded where there is a query, even an empty one."""
    text = quote(path, safe=_UNQUOTED, errors="replace") if query is not None else path
    if query:
        text += f"?{query_without_secrets(query)}"
    return "".join(each if "!" <= each <= "~" and each != '"' else quote(each, safe="") for each in text)
