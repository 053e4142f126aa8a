"""Times of a handler's methods as metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a handler that reports how long it took, if model-config.yaml says ``handler: {profile: true}``.

    The metric is ``ts_handler_{method}`` in ms.
    """

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = getattr(self, "context", None)
        config = getattr(context, "model_yaml_config", None) or {}
        handler = config.get("handler")
        if not (isinstance(handler, dict) and handler.get("profile")) or getattr(context, "metrics", None) is None:
            return function(self, *args, **kwargs)
        began = time.perf_counter()
        try:
            return function(self, *args, **kwargs)
        finally:
            passed_ms = (time.perf_counter() - began) * 1e3
            context.metrics.add_time(f"ts_handler_{function.__name__}", passed_ms, None, "ms")  # type: ignore[union-attr]

    return call
