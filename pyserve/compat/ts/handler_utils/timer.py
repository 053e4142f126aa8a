"""Times of a handler's methods as metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def timed(func: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a handler that reports how long it took, if model-config.yaml says ``handler: {profile: true}``.

    The metric is ``ts_handler_{method}`` in ms; a call that raises has none.
    """

    @functools.wraps(func)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = getattr(self, "context", None)
        config = getattr(context, "model_yaml_config", None) or {}
        handler = config.get("handler")
        if not (isinstance(handler, dict) and handler.get("profile")) or getattr(context, "metrics", None) is None:
            return func(self, *args, **kwargs)
        began = time.perf_counter()
        result = func(self, *args, **kwargs)
        context.metrics.add_time(f"ts_handler_{func.__name__}", (time.perf_counter() - began) * 1e3)  # type: ignore[union-attr]
        return result

    return call
