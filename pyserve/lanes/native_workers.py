"""The worker threads of a native lane: how they are shown and logged, and what is done about one that is stuck.

    limit reached   its requests were answered (`limits`), its batch is asked to end: the next operator of it raises
    GRACE_S later   it is given up: told to stop, never waited for, another one takes its place
    later, or never it ends its batch, whose answers nobody wants, and its thread

On an accelerator the device does not answer, whatever call of the driver the worker is in: the device is lost, see
`lost_devices`.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from datetime import datetime
from typing import Any

from pyserve.devices import CPU, index_of
from pyserve.engine import Engine
from pyserve.lanes.limits import SWEEP_INTERVAL_S
from pyserve.lanes.lost_devices import LostDevices
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.stuck import StuckThreads
from pyserve.lanes.worker_rows import READY, UNLOADING, WorkerRow, resident_size
from pyserve.telemetry.worker_log import ERROR, SCALED_DOWN, STARTED, WorkerLog
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

# The engine's first worker.
FIRST_CORE_ID = 9000
# From the first request to end until a worker is given up. One operator may take a while.
GRACE_S = 1.0
_STARTING = ("starting", "warming")
_GOING = ("stopping", "stopped")
_OVER = ("stopped", "failed", "lost")
_LOGGED_STATES = {"starting": STARTED, "warming": STARTED, "failed": ERROR, "lost": ERROR, "stopped": SCALED_DOWN}


class NativeWorkers:
    """The workers of one native lane.

    Args:
        core: a ``_core.Lane``.
        settings: the model's; read at each use.
        label: ``name version``, for the log.
    """

    def __init__(
        self, engine: Engine, stuck: StuckThreads, core: Any, *, settings: ModelSettings, label: str,
        worker_log: WorkerLog, lost_devices: LostDevices,
    ):  # fmt: skip
        self._engine = engine
        self._stuck = stuck
        self._core = core
        self._settings = settings
        self._label = label
        self._worker_log = worker_log
        self._lost_devices = lost_devices
        self._wanted = 0
        self._started: dict[int, datetime] = {}
        self._noted: dict[int, str] = {}  # worker's number -> state, as it was logged
        self._asked: dict[int, tuple[int, int]] = {}  # id -> (since when its batch runs, when it was asked to end), ns
        self._hopeless: set[int] = set()  # ids of those that were not ready in time
        self._lost = 0  # at the last look
        self._never_ready = 0  # how many were given up before they were ready
        self._is_closing = False

    # --- how many, and which --------------------------------------------------------------------------------------

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return sum(1 for row in self._core.workers() if row["state"] in (*_STARTING, READY.lower()))

    @property
    def is_replacing(self) -> bool:
        """Whether the place of one that was lost is about to be taken."""
        return bool(self._core.lost_count) and any(row["state"] in _STARTING for row in self._core.workers())

    def set_count(self, count: int) -> None:
        """Begins to start or stop workers until there are ``count``."""
        self._wanted = count
        self._core.set_workers(count)
        for row in self._core.workers():
            self._started.setdefault(row["id"], datetime.now())
        self.note_states()

    def restore(self) -> None:
        """Begins to start those that are missing of what `set_count` asked for."""
        self.set_count(self._wanted)

    def note_states(self) -> None:
        """Logs what has changed among the workers since the last time."""
        rows = {row["id"] - FIRST_CORE_ID: row["state"] for row in self._core.workers()}
        for number in [*self._noted.keys() - rows.keys()]:
            del self._noted[number]
            self._started.pop(number + FIRST_CORE_ID, None)
            self._worker_log.move(number, SCALED_DOWN)
        for number, state in rows.items():
            if self._noted.get(number) == state:
                continue
            self._noted[number] = state
            if state == "ready":
                started_at = self._started.get(number + FIRST_CORE_ID) or datetime.now()
                self._worker_log.loaded(number, (datetime.now() - started_at).total_seconds())
            elif state in _LOGGED_STATES:
                self._worker_log.move(number, _LOGGED_STATES[state])

    def rows(self) -> list[WorkerRow]:
        """The workers, as the management API shows them; they are threads of this one process. A lost one is there as
        long as its thread is."""  # fmt: skip
        memory = resident_size()
        rows = []
        for row in self._core.workers():
            if row["state"] in _GOING:
                continue
            is_ready = row["state"] == "ready"
            rows.append(WorkerRow(
                id=str(self._worker_log.id(row["id"] - FIRST_CORE_ID)),
                start_time=self._started.get(row["id"], datetime.now()), status=READY if is_ready else UNLOADING,
                memory_usage=memory if is_ready else 0, pid=os.getpid() if is_ready else -1, gpu=row["device"] != CPU,
                gpu_id=index_of(row["device"]),
            ))  # fmt: skip
        return rows

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""

        def is_settled() -> bool:
            self._core.reap()
            self.note_states()
            return all(row["state"] in ("ready", "failed", "lost") for row in self._core.workers())

        before = self._never_ready
        try:
            await asyncio.wait_for(self._engine.wait_for_workers(is_settled), timeout_s)
        except TimeoutError:
            # One that is stopping finishes its batch first, however long that takes; that is no failure.
            late = {row["id"] for row in self._core.workers() if row["state"] in _STARTING}
            if late:
                self._hopeless |= late
                return f"a worker was not ready within startup_timeout={timeout_s:g} s"
        errors = [str(row["error"]) for row in self._core.workers() if row["state"] == "failed"]
        if not errors and self._never_ready != before:
            return f"a worker's warm-up did not end within startup_timeout={self._settings.startup_timeout_s} s"
        return (cause_of(errors[0]) or "no text") if errors else ""

    async def ended(self) -> None:
        """Stops the workers. Returns when none of them runs but those that were given up.

        Nobody waits for a request any more: a batch that still runs is asked to end, and has ``response_timeout`` to do
        so.
        """
        self._is_closing = True
        self._wanted = 0
        self._core.set_workers(0)
        while not self._are_over():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._engine.wait_for_workers(self._are_over), SWEEP_INTERVAL_S)
            self.look(time.monotonic_ns())
        self.note_states()
        lost = self._core.lost_count
        self._core.join()  # at once: the threads of all others have ended
        if lost:
            self._stuck.abandon(self._label)

    def _are_over(self) -> bool:
        return all(row["state"] in _OVER for row in self._core.workers())

    # --- those that do not come back ------------------------------------------------------------------------------

    def look(self, now: int) -> bool:
        """Sees to batches that are over their time. Returns whether to look again, although no request waits.

        Args:
            now: ns.
        """
        core = self._core
        since = core.running_since
        lost = core.lost_count
        if lost != self._lost:
            core.reap()
            if lost < self._lost:
                log.info("%s: a worker that was given up has come back, and is gone", self._label)
                self.note_states()
            self._lost = lost
        is_late = since and now - since >= self._settings.least_limit_s * 1e9
        if is_late or lost or self._is_closing or self._hopeless:
            self._end_overdue(now)
        if since or lost or self._hopeless:
            return True
        return bool(core.ready_count < self._wanted) and any(row["state"] in _STARTING for row in core.workers())

    def _end_overdue(self, now: int) -> None:
        rows = self._core.workers()
        self._hopeless &= {row["id"] for row in rows if row["state"] not in _OVER}
        asked, self._asked = self._asked, {}
        for row in rows:
            id, is_hopeless = row["id"], row["id"] in self._hopeless
            since = row["running_since"] or (now if is_hopeless else 0)
            limit_s = 0.0 if is_hopeless else self._limit_s(row["state"])
            if row["state"] in ("stopped", "failed") or not since:
                continue
            if not self._is_closing and now - since < limit_s * 1e9:
                continue
            asked_for, asked_at = asked.get(id, (0, now))
            if asked_for != since and not is_hopeless:
                asked_at = now
            self._asked[id] = since, asked_at
            self._core.interrupt(id, since)  # again and again: see csrc/runs.h
            is_over = now - since >= limit_s * 1e9 and now - asked_at >= GRACE_S * 1e9
            if is_over and row["state"] != "lost" and self._core.lose(id):
                if row["device"] != CPU:
                    self._lose_device(row["device"], (now - since) / 1e9, self._limit_s(row["state"]))
                else:
                    self._replace(row, (now - since) / 1e9)

    def _limit_s(self, state: str) -> float:
        """How long a batch may run, or a trial of a worker that starts."""
        is_starting = state in _STARTING
        return float(self._settings.startup_timeout_s if is_starting else self._settings.response_timeout_s)

    def _lose_device(self, device: str, ran_s: float, limit_s: float) -> None:
        self._lost += 1
        reason = (
            f"it does not answer: a batch of {self._label} has run for {ran_s:.1f} s, and the limit is {limit_s:g} s"
        )
        self._engine.core.note_lost_device(device, reason)
        self._lost_devices.note(device, reason)

    def _replace(self, row: dict[str, Any], ran_s: float) -> None:
        self._lost += 1  # it may be back before the next look
        number = row["id"] - FIRST_CORE_ID
        is_replaced = row["state"] == "ready"
        log.error("%s: a batch has run for %.1f s and does not come to an end, so its worker %s is given up%s",
                  self._label, ran_s, self._worker_log.name(number), "; another one takes its place" * is_replaced,
                  extra=self._worker_log.about(number))  # fmt: skip
        if is_replaced:
            self.set_count(self._wanted)
        elif row["state"] in _STARTING:
            self._never_ready += 1
        self.note_states()
        self._stuck.look(f"{self._label} ({self._worker_log.name(number)})")
