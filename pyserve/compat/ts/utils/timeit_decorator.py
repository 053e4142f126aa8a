"""How long a function takes, printed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any


def timeit(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that prints how long each call took, in s of the clock and of the processor."""

    @functools.wraps(func)
    def call(*args: Any, **kwargs: Any) -> Any:
        began, cpu_began = time.perf_counter(), time.process_time()
        result = func(*args, **kwargs)
        passed, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        print(f"{func.__name__} took {passed:.6f} s, {cpu:.6f} s of the processor")
        return result

    return call
