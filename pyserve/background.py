"""Work that nobody waits for: kept until it is done, since an event loop itself does not, and its failure logged."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """Loop thread only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, Any], what: str) -> asyncio.Task[Any]:
        """Runs ``work`` from the loop's next turn on. ``what`` it is, if it fails: "removing m 1.0"."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def done(finished: asyncio.Task[Any]) -> None:
            self._tasks.discard(finished)
            if not finished.cancelled() and finished.exception() is not None:
                log.error("%s failed: %s", what, finished.exception())

        task.add_done_callback(done)
        return task

    def cancel(self) -> None:
        """Ends all of it at its next wait."""
        for task in list(self._tasks):
            task.cancel()

    async def finish(self) -> None:
        """Returns when all that has begun is done, whatever became of it."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
