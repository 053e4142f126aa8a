"""Python's full garbage collections: they hold the interpreter for as long as looking at every object takes.

With a million lists that a body makes that is a tenth of a second. While such a value is made and used, which has no
cycles, only young objects are looked at.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

_NEVER = 1 << 30

_lock = threading.Lock()
_waiting_for = 0  # blocks of `put_off` that run
_thresholds = gc.get_threshold()


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """No full collection begins in this block, in any thread. Any thread; blocks may overlap."""
    global _waiting_for, _thresholds
    with _lock:
        if not _waiting_for:
            _thresholds = gc.get_threshold()
            gc.set_threshold(*_thresholds[:2], _NEVER)
        _waiting_for += 1
    try:
        yield
    finally:
        with _lock:
            _waiting_for -= 1
            if not _waiting_for:
                gc.set_threshold(*_thresholds)


def put_off_during(call: Callable[[], T]) -> T:
    """What ``call`` returns."""
    with put_off():
        return call()
