"""Reads what a child process reports through a pipe, line by line."""

from __future__ import annotations

import json
import logging
import os
import selectors
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

# How often it is looked whether the child is gone, where something else still holds the pipe.
LOOK_S = 0.2


def report_lines(descriptor: int, deadline: float, is_over: Callable[[], bool]) -> Iterator[bytes]:
    """Yields whole lines without their ends, until nothing holds the pipe's other end.

    What the child has started may hold it for as long as it likes: model code that forks, for one. So that ends it too
    if ``is_over()``, once what was written before has been read, and ``deadline`` does.

    Args:
        descriptor: of the pipe.
        deadline: a time of ``time.monotonic``.
        is_over: whether nothing more is to come; called some times a second.
    """
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            is_last = is_over()  # before the look: what came until then is read
            if selector.select(min(left_s, LOOK_S)):
                chunk = os.read(descriptor, 1 << 16)
                if not chunk:
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
            elif is_last:
                return


def report_of(line: bytes, label: str) -> dict[str, Any]:
    """The object that a line holds as JSON. Model code in the child may write to its descriptors, too: for a line that
    is no report the log has a warning, and it is empty.

    Args:
        label: what the child works on, for the log.
    """
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        report = None
    if isinstance(report, dict):
        return report
    log.warning("%s: a line from its child process is no report, and is left out: %r", label, line[:200])
    return {}
