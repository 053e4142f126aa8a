"""Answers as records of Python's logging: an engine in somebody else's process opens no files."""

from __future__ import annotations

import logging
import time
from typing import Any

from pyserve.request.messages import Request

log = logging.getLogger("pyserve.access")


class AccessRecords:
    """Notes answers with the logger ``pyserve.access``, at the level INFO."""

    def observe_http(self, request: Request, status: int, is_http11: bool) -> None:
        if log.isEnabledFor(logging.INFO):
            took_ms = (time.monotonic_ns() - request.arrived_at) // 1_000_000 if request.arrived_at else 0
            log.info("%s %r %d %d ms", request.client, f"{request.method} {request.path}", status, took_ms,
                     extra={"request_id": request.id})  # fmt: skip


class EngineLogs:
    """See `Logs`."""

    def __init__(self) -> None:
        self.access: Any = AccessRecords()
        self.metrics = self.recent = None
