"""A line on the console for every answer, for the author of a handler: what was asked, and where the time went.

POST /predictions/m 200 in 12.9 ms (preprocess 0.3, queue 0.1, inference 12.1, postprocess 0.2), 96d9fa1e
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from pyserve.log import about
from pyserve.request.messages import Request
from pyserve.telemetry.access_log import target_text

log = logging.getLogger("pyserve.requests")

# Of a request's id, which is in the log and in the answer as a whole.
_ID_SIZE = 8
_STAGES = ("admission", "preprocess", "queue", "staging", "inference", "postprocess", "delivery")
# Stages that took less are left out, in ms.
_LEAST_MS = 0.05


class AnswerLog(Protocol):
    """What is told of answers. Loop thread only."""

    def observe(  # noqa: PLR0917 - made for every call
        self, client: str, method: str, uri: str, protocol: str, status: int, arrived_at: int, request_id: str = ""
    ) -> None:
        """An answer of any kind, see `AccessLog.observe`."""

    def observe_http(self, request: Request, status: int, is_http11: bool) -> None:
        """The answer to ``request``."""


class NoLog:
    """An access log that is switched off."""

    def observe(self, *_: object) -> None:
        """Nothing."""

    def observe_http(self, *_: object) -> None:
        """Nothing."""


class RequestLog:
    """Writes the lines, and tells ``also``."""

    def __init__(self, also: AnswerLog):
        self._also = also

    def observe(  # noqa: PLR0917 - made for every call
        self, client: str, method: str, uri: str, protocol: str, status: int, arrived_at: int, request_id: str = ""
    ) -> None:
        """A call of gRPC: its status is gRPC's."""
        self._also.observe(client, method, uri, protocol, status, arrived_at, request_id)
        log.info(
            "%s %s %d%s%s", method, uri, status, _took(arrived_at), _id(request_id), extra=about(request_id=request_id)
        )

    def observe_http(self, request: Request, status: int, is_http11: bool) -> None:
        """The answer to ``request``; its stages are in it, if a model has answered."""
        self._also.observe_http(request, status, is_http11)
        method, uri = target_text(request.method, request.path, request.query)
        log.info("%s %s %d%s%s%s", method, uri, status, _took(request.arrived_at), _stages(request), _id(request.id),
                 extra=about(request_id=request.id))  # fmt: skip


def _took(arrived_at: int) -> str:
    return f" in {(time.monotonic_ns() - arrived_at) / 1e6:.1f} ms" if arrived_at else ""


def _id(request_id: str) -> str:
    return f", {request_id[:_ID_SIZE]}" if request_id else ""


def _stages(request: Request) -> str:
    stages = getattr(request, "stages", None)
    if stages is None:
        return ""
    took_ms = {name: (stages.times[name][1] - stages.times[name][0]) / 1e6 for name in _STAGES if name in stages.times}
    parts = [f"{name} {ms:.1f}" for name, ms in took_ms.items() if ms >= _LEAST_MS]
    if stages.batch_size > 1:
        parts.append(f"batch of {stages.batch_size}")
    return f" ({', '.join(parts)})" if parts else ""
