"""The access log: a line for every answer, in TorchServe's form.

    2026-11-23T01:57:15,723 - /127.0.0.1:43090 "GET /models/densenet161 HTTP/1.1" 200 87

The last number is in ms. Most of a line is the same for all answers of an endpoint and is remembered, and the time is
made text of once in each ms: so an answer costs the event loop less than a microsecond. A thread does the writing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve.config.archive_url import query_without_secrets
from pyserve.log import clock_text, time_text
from pyserve.request.messages import Request
from pyserve.telemetry.log_files import PIECE_COUNT, LogWriter

FILE = "access_log.log"
# What TorchServe writes for bytes that are no request.
_BAD_REQUEST = ("GET", "/bad-request")
_UNQUOTED = "/:@!$&'()*+,;=~-._"
_PLAIN = re.compile("[!#-~]*")
# That are joined at once: that takes 50 us.
_LINES_MAX = 4096
# Of targets whose text is remembered.
_HEADS_MAX = 1024
_HEAD_SIZE_MAX = 256


class AccessLog:
    """Notes answers. Loop thread only.

    Args:
        folder: of the file.
        as_json: one JSON object per line instead of TorchServe's form.
        console: told the lines of the console too; called on the writer's thread.
        clock: ns, monotonic, as ``Request.arrived_at`` has it.
    """

    def __init__(
        self, writer: LogWriter, folder: Path, *, as_json: bool = False,
        console: Callable[[str], None] | None = None, clock: Callable[[], int] = time.monotonic_ns,
    ):  # fmt: skip
        self._as_json = as_json
        self._console = console
        self._clock = clock
        self._ms = -1
        self._when = ""
        self._heads: dict[tuple[str, str, str, bool, int], str] = {}
        piece_count = PIECE_COUNT if as_json or console else _LINES_MAX
        self._file = writer.open(folder / FILE, self._text, piece_count=piece_count)
        self._put = self._file.put

    def observe(  # noqa: PLR0917 - made for every call
        self, client: str, method: str, uri: str, protocol: str, status: int, arrived_at: int, request_id: str = ""
    ) -> None:
        """Notes an answer of any kind.

        Args:
            client: ``127.0.0.1:43090``, or ``unix``.
            method: of HTTP, or ``gRPC``.
            uri: as the client sent it; of a gRPC call the method's full name.
            protocol: such as ``HTTP/1.1``; ``HTTP/2.0`` for gRPC.
            status: of HTTP or of gRPC.
            arrived_at: the request, in ns of the clock; 0 if that is not known.
        """
        now = self._clock()
        took_ms = (now - arrived_at) // 1_000_000 if arrived_at else 0
        if self._as_json:
            self._put((time.time(), client, method, uri, protocol, status, took_ms, request_id))
            return
        if now // 1_000_000 != self._ms:
            self._tell_time(now)
        self._put(f'{self._when} - /{client} "{method} {uri} {protocol}" {status} {took_ms}\n')

    def observe_http(self, request: Request, status: int, is_http11: bool) -> None:
        """Notes the answer to ``request``; one without a method was no HTTP."""
        if self._as_json or not request.arrived_at:  # the protocol's own refusals have no time of arrival
            method, uri = target_text(request.method, request.path, request.query)
            self.observe(request.client, method, uri, _protocol(is_http11), status, request.arrived_at, request.id)
            return
        now = self._clock()
        if now // 1_000_000 != self._ms:
            self._tell_time(now)
        key = (request.method, request.path, request.query, is_http11, status)
        head = self._heads.get(key) or self._new_head(key)
        self._put(f"{self._when} - /{request.client} {head} {(now - request.arrived_at) // 1_000_000}\n")

    @property
    def takes_lines(self) -> bool:
        """Whether lines may be made elsewhere, see `put_all`."""
        return not self._as_json

    def when(self) -> str:
        """What a line begins with now."""
        now = self._clock()
        if now // 1_000_000 != self._ms:
            self._tell_time(now)
        return self._when

    def put_all(self, lines: list[str]) -> None:
        """Notes answers whose lines were made elsewhere."""
        self._file.put_all(lines)

    def line_head(self, method: str, path: str, status: int) -> str:
        """What stands in the lines of such answers over HTTP/1.1, between the client and the time that it took."""
        return self._new_head((method, path, "", True, status))

    def _text(self, entries: list[Any]) -> str:
        """On the writer's thread."""
        text = _json_lines(entries) if self._as_json else "".join(entries)
        if self._console is not None:
            if self._as_json:
                self._console(text)
            else:
                self._console("".join([each.replace(" - ", " [INFO ] ACCESS_LOG - ", 1) for each in entries]))
        return text

    def _tell_time(self, now: int) -> None:
        self._ms = now // 1_000_000
        self._when = time_text(time.time())

    def _new_head(self, key: tuple[str, str, str, bool, int]) -> str:
        method, uri = target_text(*key[:3])
        head = f'"{method} {uri} {_protocol(key[3])}" {key[4]}'
        if len(head) <= _HEAD_SIZE_MAX:
            if len(self._heads) >= _HEADS_MAX:
                self._heads.clear()
            self._heads[key] = head
        return head


def _protocol(is_http11: bool) -> str:
    return "HTTP/1.1" if is_http11 else "HTTP/1.0"


def target_text(method: str, path: str, query: str) -> tuple[str, str]:
    """Method and target as they are shown: in one line, without blanks and secrets. ``path`` is decoded."""
    if not method:
        return _BAD_REQUEST
    uri = path if _PLAIN.fullmatch(path) and "%" not in path else quote(path, safe=_UNQUOTED, errors="replace")
    if query:
        if "://" in query or "%" in query:
            query = query_without_secrets(query)
        if not _PLAIN.fullmatch(query):
            query = "".join(each if _PLAIN.fullmatch(each) else quote(each, safe="") for each in query)
        uri = f"{uri}?{query}"
    return method, uri


def _json_lines(entries: list[Any]) -> str:
    lines = []
    for at, client, method, uri, protocol, status, took_ms, request_id in entries:
        members = {
            "time": clock_text(at), "level": "INFO", "logger": "ACCESS_LOG", "message": f"{method} {uri} {status}",
            "client": client, "method": method, "uri": uri, "protocol": protocol, "status": status, "ms": took_ms,
            "request_id": request_id,
        }  # fmt: skip
        lines.append(json.dumps(members) + "\n")
    return "".join(lines)
