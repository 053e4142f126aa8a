"""Explanations of a native model: they need gradients, so Python's own copy of it, in a worker process.

It is started for the first explanation. Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from pyserve.errors import OverloadedError, ServeError, ServerError
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.lanes.pending import Pending
from pyserve.models.lane_choice import LaneOptions, open_python_lane
from pyserve.request.exchange import Exchange

log = logging.getLogger(__name__)


class Explanations:
    """Of one model.

    Args:
        options: of its lane.
        is_served: whether the model still is.
        no_worker: of a model that is not served any more.
        starting_error: in TorchServe's words; given why there is no worker.

    Attributes:
        lane: of the worker; None before the first explanation.
    """

    def __init__(
        self, options: Callable[[], LaneOptions], *, is_served: Callable[[], bool],
        no_worker: Callable[[], OverloadedError], starting_error: Callable[[str], ServeError],
    ):  # fmt: skip
        self._options = options
        self._is_served = is_served
        self._no_worker = no_worker
        self._starting_error = starting_error
        self.lane: Lane | None = None
        self._coming: Lane | None = None  # whose worker is being started
        self._opening = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def explain(
        self, native: NativeLane, exchange: Exchange, version: str, pending_for: Callable[[Lane], Pending]
    ) -> None:
        """Sees to the answer. ``pending_for`` makes of the exchange what a lane takes."""
        lane = self.lane
        if lane is not None:
            lane.predict(pending_for(lane))
            return
        waiting = Pending(native, exchange, version, "default")

        async def explain_first() -> None:
            opening = self._keep(self._open())
            try:
                # It goes on for those who are more patient.
                await asyncio.wait_for(asyncio.shield(opening), waiting.remaining_s())
                opened = self.lane
                if opened is None:
                    raise self._no_worker()
                opened.predict(pending_for(opened))
            except TimeoutError:
                native.expire(waiting)
            except Exception as error:
                if not isinstance(error, ServeError):
                    log.exception("starting a worker for explanations of %s failed", native.label)
                    error = ServerError("Internal error")
                exchange.respond(native.services.error_format.answer(error, exchange.request))

        self._keep(explain_first())

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs ``work`` as a task, whether or not anybody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def finish(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled():
                done.exception()  # those who waited for it have it

        task.add_done_callback(finish)
        return task

    async def _open(self) -> None:
        async with self._opening:
            if self.lane is not None or not self._is_served():
                return
            # How its worker is says nothing of those that predict.
            options = replace(self._options(), on_condition=lambda condition: None)
            log.info("%s: starting a worker process for explanations", options.label)
            lane = await open_python_lane(options)
            if not self._is_served():
                await lane.close()
                return
            self._coming = lane
            lane.set_workers(1)
            failure = await lane.settled(options.settings.startup_timeout_s)
            if self._coming is not lane:
                return  # taken, and closed, with its worker
            self._coming = None
            if failure:
                await lane.close()
                raise self._starting_error(failure)
            self.lane = lane

    def take_lane(self) -> Lane | None:
        """The lane, also one whose worker is being started; to be closed by the caller."""
        lane = self.lane or self._coming
        self.lane = self._coming = None
        return lane
