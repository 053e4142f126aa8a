"""The last errors that were answered and the last lines of the log, for the console: in memory, and never too much.

Errors are kept apart by whose fault they are, so that clients that ask wrongly all the time do not crowd out those of
models. Lines are kept for each model that has written lately.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from pyserve.errors import JsonObject, ServeError
from pyserve.request.messages import Request

ERRORS_MAX = 100  # of clients, and as many of the server
DETAIL_SIZE_MAX = 2000
LINES_MAX = 300  # of a model
LINES_SIZE_MAX = 128 << 10
LINE_SIZE_MAX = 16 << 10
MODELS_MAX = 64
_FORMATTER = logging.Formatter()


class AnsweredError(NamedTuple):
    """One error answer.

    Attributes:
        at: seconds since the epoch.
        detail: of the answer, those that are text or numbers; may quote exceptions and name files.
    """

    at: float
    request_id: str
    method: str
    path: str
    model: str
    version: str
    status: int
    type: str
    message: str
    detail: JsonObject


class RecentErrors:
    """The error answers of endpoints and models. Loop thread only."""

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._of_clients: deque[AnsweredError] = deque(maxlen=ERRORS_MAX)
        self._of_server: deque[AnsweredError] = deque(maxlen=ERRORS_MAX)

    def note(self, error: ServeError, request: Request, *, model: str = "", version: str = "") -> None:
        """``error`` was the answer to ``request``; of the console's own requests nothing is kept."""
        if request.path.startswith("/console/"):
            return
        detail = {
            key: value[:DETAIL_SIZE_MAX] if isinstance(value, str) else value
            for key, value in error.detail.items()
            if isinstance(value, str | int | float)
        }
        noted = AnsweredError(
            self._clock(), request.id, request.method, request.path[:DETAIL_SIZE_MAX], model, version, error.status,
            error.type, error.message[:DETAIL_SIZE_MAX], detail,
        )  # fmt: skip
        (self._of_server if error.status >= 500 else self._of_clients).append(noted)

    def newest(self, model: str = "") -> list[AnsweredError]:
        """The latest first; all of them, or those of ``model``."""
        found = [each for each in (*self._of_clients, *self._of_server) if not model or each.model == model]
        return sorted(found, key=lambda each: each.at, reverse=True)


class Line(NamedTuple):
    """One record of the log.

    Attributes:
        at: seconds since the epoch.
        source: the worker and stream, or the logger.
        request_ids: joined by commas.
        text: with its traceback.
    """

    at: float
    level: str
    source: str
    request_ids: str
    text: str


def _size(line: Line) -> int:
    return len(line.text) + len(line.request_ids)  # of a batch those of all its requests


class _Lines:
    """Of one model."""

    def __init__(self) -> None:
        self.lines: deque[Line] = deque()
        self._size = 0

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self._size += _size(line)
        while len(self.lines) > LINES_MAX or self._size > LINES_SIZE_MAX:
            self._size -= _size(self.lines.popleft())


class RecentLog(logging.Handler):
    """The last records about each model, and under ``""`` the warnings and errors that are about none. Any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._by_model: OrderedDict[str, _Lines] = OrderedDict()
        self._change = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        model = str(getattr(record, "model", ""))
        if not model and record.levelno < logging.WARNING:
            return
        try:
            text = record.getMessage()
            if record.exc_info:
                text = f"{text}\n{_FORMATTER.formatException(record.exc_info)}"
        except Exception:  # a record whose arguments do not fit its text is the caller's mistake
            return
        worker, stream = str(getattr(record, "worker", "")), str(getattr(record, "stream", ""))
        source = f"{worker} {stream}".strip() or record.name
        ids = str(getattr(record, "request_id", ""))
        line = Line(record.created, record.levelname, source, ids[:LINE_SIZE_MAX], text[:LINE_SIZE_MAX])
        with self._change:
            lines = self._by_model.setdefault(model, _Lines())
            lines.add(line)
            self._by_model.move_to_end(model)
            if len(self._by_model) > MODELS_MAX:
                oldest = next(each for each in self._by_model if each)
                del self._by_model[oldest]

    def lines(self, model: str = "") -> list[Line]:
        """In the order in which they were written."""
        with self._change:
            found = self._by_model.get(model)
            return list(found.lines) if found is not None else []

    def about_request(self, model: str, request_id: str) -> str:
        """What was logged of one request, as text."""
        if not request_id:
            return ""
        return "\n".join(line.text for line in self.lines(model) if request_id in line.request_ids.split(", "))
