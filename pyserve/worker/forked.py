"""Processes that a handler forks."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback


def end_process(error: BaseException | None) -> None:
    """Ends a forked process that has come back from the handler's code, with what Python would have ended it with.

    It has the worker's connections: whatever it answered would be taken for the worker's answer, and it would take
    requests from the worker.
    """
    code = 0
    if isinstance(error, SystemExit):
        is_number = isinstance(error.code, int)
        code = error.code if is_number else 0 if error.code is None else 1  # type: ignore[assignment]
        if code == 1 and not is_number:
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        traceback.print_exception(type(error), error, error.__traceback__)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 0xFF)
