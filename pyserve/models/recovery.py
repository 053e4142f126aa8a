"""Models that could not be loaded when the server started, for a reason that may be over.

A full disk, no descriptors, a handler that crashed: they are tried again at a capped pace, until they are loaded or
nobody wants them any more.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from pyserve.errors import ServeError, is_of_machine
from pyserve.lanes.restart_policy import RestartPolicy
from pyserve.models.model import Model

log = logging.getLogger(__name__)

# The first try was made just now.
PAUSE_MIN_S = 0.5
# Each try of a model whose own code fails starts up to three workers: with these pauses no minute has more than ten.
CRASH_PAUSES_S = (15.0, 30.0)


def may_pass(error: Exception) -> bool:
    """Whether loading may work later without anybody's help: the machine lacked something, or a worker crashed."""
    return is_of_machine(error) or getattr(error, "may_pass", False) is True


class Table(Protocol):
    """What is asked of the registry."""

    def all_models(self) -> list[Model]:
        """All that are served."""

    async def changed(self) -> None:
        """To be called after a change."""


class Recovery:
    """What is tried again, one task for each."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._tasks: set[asyncio.Task[None]] = set()

    def load_again(self, model: Model, error: Exception, workers: int, workers_min: int) -> None:
        """Loads a model that FAILED, until it is loaded, replaced or unregistered.

        Args:
            error: why it FAILED.
            workers: how many it is to have.
            workers_min: the least, of its settings.
        """

        async def load() -> None:
            await model.load(workers, lambda text: None)
            model.settings.workers_min = workers_min
            await self._table.changed()

        self.begin(
            f"{model.name} {model.version}", error, load,
            is_wanted=lambda: model.state == "FAILED" and model in self._table.all_models(),
        )  # fmt: skip

    def begin(
        self, what: str, error: Exception, attempt: Callable[[], Awaitable[None]], *, is_wanted: Callable[[], bool]
    ) -> None:  # fmt: skip
        """Tries ``attempt``, which raises as long as it does not work, as long as ``is_wanted()``.

        Args:
            what: for the log.
            error: of the first try.
        """
        task = asyncio.get_running_loop().create_task(_try_again(what, error, attempt, is_wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Returns when nothing is tried any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Pace:
    """Pauses between tries."""

    def __init__(self) -> None:
        self._policy = RestartPolicy()
        self._policy.has_served = True  # never to be given up
        self._crashes = 0

    def pause_s(self, error: Exception) -> float:
        """After a try that ended with ``error``."""
        pause_s = max(PAUSE_MIN_S, self._policy.failed_to_load(time.monotonic()).delay_s)
        if is_of_machine(error):
            return pause_s
        self._crashes += 1
        return CRASH_PAUSES_S[min(self._crashes, len(CRASH_PAUSES_S)) - 1]


async def _try_again(
    what: str, error: Exception, attempt: Callable[[], Awaitable[None]], is_wanted: Callable[[], bool]
) -> None:
    pace, last = _Pace(), ""
    while True:
        await asyncio.sleep(pace.pause_s(error))
        if not is_wanted():
            return
        try:
            await attempt()
        except Exception as again:
            error = again
            text = error.reason() if isinstance(error, ServeError) else f"{type(error).__name__}: {error}"
            if text != last:
                log.error("%s still cannot be loaded, and is tried again: %s", what, text)
            last = text
        else:
            log.info("%s is loaded now", what)
            return
