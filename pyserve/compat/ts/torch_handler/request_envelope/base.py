"""What every envelope does."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any


class BaseEnvelope(abc.ABC):
    """Unwraps requests, has a handler called, wraps its answers.

    Args:
        handle_fn: ``handle(data, context)``.
    """

    def __init__(self, handle_fn: Callable[[Any, Any], Any]):
        self._handle_fn = handle_fn
        self.context: Any = None

    def handle(self, data: Any, context: Any) -> Any:
        """Called in place of the handler; what is no request (None, or a description) passes."""
        self.context = context
        if data is None or self._describes():
            return self._handle_fn(data, context)
        answers = self._handle_fn(self.parse_input(data), context)
        return self.format_output(answers)

    def _describes(self) -> bool:
        ids = getattr(self.context, "request_ids", None)
        return bool(ids) and self.context.get_request_header(0, "describe") == "True"

    @abc.abstractmethod
    def parse_input(self, data: Any) -> Any:
        """Rows of requests -> rows for the handler."""

    @abc.abstractmethod
    def format_output(self, data: Any) -> list[Any]:
        """The handler's answers -> one per request."""


def body_of(row: Any) -> Any:
    """The value of a request: its field ``data``, else its field ``body``, else the row itself."""
    if not isinstance(row, dict):
        return row
    value = row.get("data")
    if value is None:
        value = row.get("body")
    return row if value is None else value
