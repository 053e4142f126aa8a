"""Keeps as many worker processes of a model as are wanted: starts them, hands them to the engine, replaces the dead.

    STARTING ──> READY ──> STOPPING ──> gone
      │  ^         │
      │  └─WAITING─┘         died: another one, at once or after a while
      └──> FAILED            it will not do better next time

Loop thread only. Each slot is one task, from its first start to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from pyserve.errors import JsonObject, ModelLoadError, ServeError
from pyserve.lanes.resources import Services
from pyserve.lanes.restart_policy import Decision, RestartPolicy
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.spawner import WorkerHandle
from pyserve.telemetry.worker_log import SCALED_DOWN, STARTED, WorkerLog
from pyserve.worker.spec import ASYNC, BATCH, WorkerSpec

log = logging.getLogger(__name__)

STARTING, READY, WAITING, STOPPING, FAILED = "starting", "ready", "waiting", "stopping", "failed"
# How many requests a handler that is a coroutine is given at a time.
ASYNC_IN_FLIGHT_MAX = 1000
# A worker that was told to stop finishes its batch first; this long after that its process must be gone.
STOP_GRACE_S = 5.0


class Slot:
    """One wanted worker: the process that it has now, and how it fares.

    Attributes:
        state: see the module.
        handle: its process, while there is one.
        core_id: the engine's id of it, while it takes batches.
        error: why it is FAILED, or why the last process ended.
        failure: the error of its last load, if that failed.
        decision: what the policy said after its last end.
        kill_reason: why we ended the process.
        interrupted_batch: the batch whose handler call was asked to end.
        is_wanted: False once it was told to go.
        hurry: set to end the pause before its next process.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.state = STARTING
        self.handle: WorkerHandle | None = None
        self.core_id: int | None = None
        self.started_at = datetime.now()
        self.error = ""
        self.is_wanted = True
        self.failure: ServeError | None = None
        self.decision: Decision | None = None
        self.kill_reason = ""
        self.interrupted_batch = -1
        self.task: asyncio.Task[None] | None = None
        self.hurry = asyncio.Event()


class PythonWorkers:
    """The workers of one model.

    Args:
        core: the engine's lane that they take batches from.
        settings: the model's; read at each use.
        label: ``name version``, for the log.
        worker_log: told what becomes of them.
        device_ids: GPUs given to the workers in turn; empty: all use the spec's.
        interpreter: of the workers; None for the server's own.
        on_event: told what workers report beyond logs and their own state.
        on_loaded: told what a worker reports when it is loaded, before it takes a batch.
        on_trouble: told why the last worker is gone and none is coming, and ``""`` when there is one again.

    Attributes:
        trouble: why there is no worker; ``""`` while there is one, or one is starting for the first time.
        rehearses, tries_batches: of the workers to be started, see `WorkerSpec`.
    """

    def __init__(
        self, services: Services, core: Any, spec: WorkerSpec, settings: ModelSettings, *, label: str,
        worker_log: WorkerLog, device_ids: list[int], interpreter: str | None, on_event: Callable[[JsonObject], None],
        on_trouble: Callable[[str], None], on_loaded: Callable[[JsonObject], None],
    ):  # fmt: skip
        self._services = services
        self._core = core
        self._spec = spec
        self._settings = settings
        self._label = label
        self._log = worker_log
        self._device_ids = device_ids
        self._interpreter = interpreter
        self._on_event = on_event
        self._on_trouble = on_trouble
        self._on_loaded = on_loaded
        self._policy = RestartPolicy()
        self._slots: list[Slot] = []
        self._changed = asyncio.Event()
        self._is_closing = False
        self.trouble = ""
        self.rehearses = self.tries_batches = True

    # --- what others ask ------------------------------------------------------------------------------------------

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return sum(1 for slot in self._slots if slot.is_wanted and slot.state != FAILED)

    @property
    def is_starting(self) -> bool:
        """A worker comes soon: it is being started, or will be as soon as the one before it is gone."""
        now = time.monotonic()
        return any(
            slot.is_wanted
            # One that is READY without taking batches has just ended, and is being replaced.
            and (slot.state in (STARTING, READY) or (slot.state == WAITING and not self._policy.is_open(now)))
            for slot in self._slots
        )

    @property
    def will_retry(self) -> bool:
        """Whether a worker will be started again without anybody's help."""
        return any(slot.is_wanted and slot.state in (STARTING, WAITING) for slot in self._slots)

    @property
    def retry_after_s(self) -> int:
        """Whole seconds after which asking again makes sense, at least 1."""
        return max(1, round(self._policy.retry_after_s(time.monotonic())))

    def slots(self) -> list[Slot]:
        """Those that are wanted, whether or not they have a process."""
        return [slot for slot in self._slots if slot.is_wanted]

    @property
    def failure(self) -> ServeError | None:
        """Why a worker could not be loaded; None if all could."""
        return next((slot.failure for slot in self._slots if slot.state == FAILED and slot.failure is not None), None)

    # --- what others do -------------------------------------------------------------------------------------------

    def set_count(self, count: int) -> None:
        """Starts workers, or lets go of the last ones once they have finished their batch."""
        # Whoever asks for workers wants those that failed to be tried again.
        for slot in [slot for slot in self._slots if slot.state == FAILED]:
            self._slots.remove(slot)
        if count:
            self._policy.reset()
            self.trouble = ""
            for slot in self._slots:
                if slot.state == WAITING:
                    slot.hurry.set()
        else:
            self._set_trouble("")  # nobody wants a worker, so none is missing
        wanted = [slot for slot in self._slots if slot.is_wanted]
        for slot in wanted[count:]:
            self._let_go(slot)
        taken = {slot.index for slot in self._slots}
        free = (index for index in range(len(taken) + count) if index not in taken)
        for _ in range(count - len(wanted)):
            slot = Slot(next(free))
            self._slots.append(slot)
            slot.task = asyncio.get_running_loop().create_task(self._keep(slot))
        self._changed.set()

    def _let_go(self, slot: Slot) -> None:
        slot.is_wanted = False
        if slot.core_id is not None:
            slot.state = STOPPING
            self._core.stop_worker(slot.core_id)
        elif slot.handle is not None:
            slot.handle.kill()
        elif slot.task is not None:
            slot.task.cancel()

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or has failed. Returns why one is not, or ``""``."""

        def is_settled() -> bool:
            return all(slot.state in (READY, FAILED) for slot in self._slots if slot.is_wanted)

        deadline = time.monotonic() + timeout_s
        while not is_settled():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                late = next(slot for slot in self._slots if slot.is_wanted and slot.state not in (READY, FAILED))
                because = f"; before that: {late.error}" if late.error else ""
                return f"a worker was not ready within startup_timeout={timeout_s:g} s{because}"
        return next((slot.error for slot in self._slots if slot.state == FAILED), "")

    def interrupt(self, core_id: int, batch_count: int) -> None:
        """Asks the handler call of a worker to end, once per batch."""
        slot = self._slot_of(core_id)
        if slot is not None and slot.handle is not None and slot.interrupted_batch != batch_count:
            slot.interrupted_batch = batch_count
            self._log.over_time(slot.index, self._settings.response_timeout_s)
            slot.handle.interrupt()

    def kill(self, core_id: int, reason: str) -> None:
        """Ends a worker at once; another one takes its place."""
        slot = self._slot_of(core_id)
        if slot is not None and slot.handle is not None and not slot.kill_reason:
            slot.kill_reason = reason
            slot.handle.kill()

    async def close(self) -> None:
        """Stops all, and returns when they are gone."""
        self._is_closing = True
        for slot in list(self._slots):
            self._let_go(slot)
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._slots.clear()

    def _slot_of(self, core_id: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.core_id == core_id), None)

    # --- one worker -----------------------------------------------------------------------------------------------

    async def _keep(self, slot: Slot) -> None:
        """One slot's life: a process after the other, as long as it is wanted and the policy allows it."""
        try:
            while slot.is_wanted:
                await self._live(slot)
                if not slot.is_wanted or not await self._may_go_on(slot):
                    break
        except asyncio.CancelledError:
            pass  # told to go while it waited for its next start
        except Exception:
            log.exception("%s: keeping a worker failed", self._label)
            slot.state, slot.error = FAILED, "an error of the server; its log says which"
            self._set_trouble(slot.error)
        finally:
            await self._bury(slot)
            if not slot.is_wanted:
                self._log.move(slot.index, SCALED_DOWN)
                if slot in self._slots:
                    self._slots.remove(slot)
            self._changed.set()

    async def _live(self, slot: Slot) -> None:
        """One process from its start to its end; reports to the policy how it went."""
        slot.state, slot.started_at = STARTING, datetime.now()
        slot.kill_reason, slot.interrupted_batch = "", -1
        self._changed.set()
        try:
            await self._load(slot)
        except ServeError as error:
            self._note_rehearsal(slot)
            await self._bury(slot)
            self._log.failed_to_load(slot.index)
            slot.error = error.reason()
            slot.failure = error
            slot.decision = self._policy.failed_to_load(time.monotonic(), repeats=getattr(error, "repeats", False))
            return
        ending = await self._serve(slot)
        if slot.is_wanted:
            slot.error = ending
            slot.failure = None
            slot.decision = self._policy.died(time.monotonic())

    def _note_rehearsal(self, slot: Slot) -> None:
        """A worker could not be loaded. If its own code ended it when it was tried, the next one is not tried."""
        handle = slot.handle
        if handle is not None and handle.is_rehearsing:
            self.rehearses = False
            log.warning("%s: a worker ended while it was tried with the archive's sample_input* files; the next one is "
                        "not tried with them", self._label, extra=self._log.about(slot.index))  # fmt: skip

    async def _load(self, slot: Slot) -> None:
        """Starts a process and waits until its handler is initialized.

        Raises:
            ServeError: it is not; the process may still be there.
        """
        timeout_s = self._settings.startup_timeout_s
        handle = slot.handle = await self._services.spawner.spawn(
            self._spec_of(slot), on_event=self._on_event, label=self._label, interpreter=self._interpreter,
            about=self._log.about(slot.index),
        )  # fmt: skip
        self._log.move(slot.index, STARTED)
        try:
            loaded = await asyncio.wait_for(asyncio.shield(handle.loaded), timeout_s)
            self._log.loaded(slot.index, float(loaded.get("load_s") or 0))
            self._on_loaded(loaded)
        except TimeoutError:
            handle.kill()
            raise ModelLoadError(
                f"{self._label} was not loaded within startup_timeout={timeout_s} s; raise startupTimeout in its "
                "model-config.yaml"
            ) from None

    async def _serve(self, slot: Slot) -> str:
        """Lets it take batches until it ends. Returns how it ended."""
        handle = slot.handle
        assert handle is not None
        core_id = slot.core_id = self._core.add_worker(
            handle.socket_fd, handle.request_memory_fd, handle.answer_memory_fd, in_flight_max=self._in_flight_max()
        )
        if slot.is_wanted:
            slot.state = READY
            self._policy.ready(time.monotonic())
            self._set_trouble("")
        else:
            self._core.stop_worker(core_id)
        self._changed.set()

        def row() -> dict[str, Any] | None:
            return next((row for row in self._core.workers() if row["id"] == core_id), None)

        def has_ended() -> bool:
            seen = row()
            return seen is None or seen["state"] in ("stopped", "died")

        # A thread whose worker is idle sleeps in the batcher and sees no end of a connection.
        handle.exited.add_done_callback(lambda _: self._core.stop_worker(core_id))
        # One that has a batch sees it first. A process that goes on all the same broke the protocol.
        await self._services.engine.wait_for_workers(has_ended)
        slot.core_id = None
        last = row()
        self._core.remove_worker(core_id)
        await self._bury(slot)
        ending = slot.kill_reason or f"it {handle.exited.result()}"
        if last is not None and last["state"] == "died" and last["error"]:
            ending += f" ({last['error']})"
        if slot.is_wanted:
            log.error("%s: worker %d (pid %d) ended: %s", self._label, self._log.id(slot.index), handle.pid, ending,
                      extra=self._log.about(slot.index))  # fmt: skip
            self._log.disconnected(slot.index)
        return ending

    async def _bury(self, slot: Slot) -> None:
        """Sees that its process is gone, and lets go of what belonged to it."""
        handle, slot.handle = slot.handle, None
        if handle is None:
            return
        try:
            if not handle.exited.done() and slot.state != STARTING:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(handle.exited), STOP_GRACE_S)
            handle.kill()  # what the handler started goes too
            await handle.exited
        finally:
            handle.release()

    def _in_flight_max(self) -> int:
        if self._spec.mode == ASYNC:
            return ASYNC_IN_FLIGHT_MAX
        return 0 if self._spec.mode == BATCH else self._settings.batch_size

    def gpu_id_of(self, slot: Slot) -> int | None:
        """The GPU of its process; None on a CPU."""
        return self._device_ids[slot.index % len(self._device_ids)] if self._device_ids else self._spec.gpu_id

    def _spec_of(self, slot: Slot) -> WorkerSpec:
        changes: dict[str, Any] = {
            "batch_size": self._settings.batch_size,
            "intra_op_threads": self._services.engine.intra_op_threads,
            "startup_timeout_s": float(self._settings.startup_timeout_s),
            "rehearses": self.rehearses,
            "tries_batches": self.tries_batches,
        }
        changes["gpu_id"] = self.gpu_id_of(slot)
        return replace(self._spec, **changes)

    async def _may_go_on(self, slot: Slot) -> bool:
        """After a process ended: whether another one is to be started, once that may be."""
        decision = slot.decision
        assert decision is not None
        if not decision.restarts:
            slot.state = FAILED
            log.error("%s: no worker takes its place: %s", self._label, decision.reason,
                      extra=self._log.about(slot.index))  # fmt: skip
            self._set_trouble(slot.error)
            return False
        slot.state = WAITING
        self._set_trouble(slot.error)
        self._changed.set()
        self._log.retrying(slot.index, decision.delay_s, decision.reason)
        if decision.delay_s > 0:
            slot.hurry.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(slot.hurry.wait(), decision.delay_s)
        return True

    def _set_trouble(self, text: str) -> None:
        if text and (self._is_closing or any(slot.state == READY for slot in self._slots)):
            return
        # That there is a worker is always told: who asked for another one has made us forget the trouble.
        if text != self.trouble or not text:
            self.trouble = text
            self._on_trouble(text)
