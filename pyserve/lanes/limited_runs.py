"""Calls that run a network outside of its workers, to find out about it: no run of it may take for ever.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pyserve.engine import load_core
from pyserve.errors import ModelLoadError
from pyserve.lanes.stuck import StuckThreads

T = TypeVar("T")

log = logging.getLogger(__name__)

# How often a run's age is looked at; slack of the limit.
LOOK_S = 0.1
# From the first request to end until the thread is given up. One operator may take a while.
GRACE_S = 2.0
# The log says then that one run goes on: until its limit somebody would only see that the model does not come.
LONG_S = 10.0


class EndlessError(ModelLoadError):
    """A forward did not come to an end."""


async def limited_runs(call: Callable[[], T], *, limit_s: float, stuck: StuckThreads, label: str,
                       passes: tuple[type[Exception], ...] = (), is_served: bool = False) -> T:  # fmt: skip
    """Calls ``call`` in a thread of its own, where each run of a network may take ``limit_s`` seconds.

    Args:
        passes: errors of ``call`` that are raised even so.
        is_served: the network is served whatever becomes of the call. Otherwise nobody has to do any more with a thread
            that is stuck.

    Raises:
        EndlessError: one took longer. If it could not be made to end, its thread is among ``stuck``.
    """
    loop = asyncio.get_running_loop()
    runs = load_core().ThreadRuns()
    result: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()
    marker = object()

    def ended(outcome: T | None, error: BaseException | None) -> None:
        stuck.discard(marker)
        if result.done():
            return
        if error is None:
            result.set_result(outcome)  # type: ignore[arg-type]
        else:
            result.set_exception(error)

    def body() -> None:
        runs.enter()
        outcome, error = None, None
        try:
            outcome = context.run(call)
        except BaseException as raised:
            error = raised
        finally:
            runs.leave()
        # The loop may have been closed: nobody waits for this then.
        if not loop.is_closed():
            loop.call_soon_threadsafe(ended, outcome, error)

    # One of an executor's would be waited for when the process ends, and is not there for others meanwhile.
    threading.Thread(target=body, name=f"load {label}", daemon=True).start()
    try:
        return await _watched(result, runs, limit_s, label, passes)
    except EndlessError:
        if not result.done():
            result.cancel()  # nobody waits for it any more
            stuck.add(marker, f"loading {label}")
            if not is_served:
                stuck.abandon(label)
        raise
    except asyncio.CancelledError:
        runs.refuse()
        if not result.done():
            result.cancel()
            stuck.add_leaving(marker, f"loading {label}")
        raise


async def _watched(result: asyncio.Future[T], runs: Any, limit_s: float, label: str,
                   passes: tuple[type[Exception], ...]) -> T:  # fmt: skip
    refused_at: float | None = None
    noted = 0.0  # the run that the log has named
    while not result.done():
        await asyncio.wait([result], timeout=LOOK_S)
        now, since = time.monotonic(), runs.since / 1e9
        if refused_at is not None:
            runs.refuse()  # what the thread did at that very moment may have undone it
            if not result.done() and now - refused_at >= GRACE_S:
                break
        elif since and now - since >= limit_s:
            refused_at = now
            runs.refuse()
        elif since and since != noted and now - since >= LONG_S:
            noted = since
            log.warning("%s: its forward has run for %.0f s on an input that was made up for it; startup_timeout=%g s "
                        "ends it", label, now - since, limit_s)  # fmt: skip
    if refused_at is None:
        return result.result()
    error = EndlessError(
        f"{label}: its forward did not come to an end within startup_timeout={limit_s:g} s on an input that was made "
        "up for it; fix the loop that does not end, say in input: of its model-config.yaml which values it takes, or "
        "raise startupTimeout there if it is only slow"
    )
    cause = result.exception() if result.done() else None
    if isinstance(cause, passes):
        raise cause
    raise error from cause
