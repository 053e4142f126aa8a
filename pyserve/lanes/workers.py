"""Keeps as many worker processes of a model as are wanted: starts them, hands them to the engine, replaces the dead.

    STARTING ──> READY ──> STOPPING ──> gone
      │  ^         │
      │  └─WAITING─┘         died, or could not be loaded: another one, at once or after a while
      └──> FAILED            none has ever been loaded, and the next try would end in the same way

Every change is told with the `Condition` that all workers together have then. Loop thread only. Each slot is one task,
from its first start to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from pyserve.errors import JsonObject, ModelLoadError, ServeError, ServerError, is_of_machine
from pyserve.lanes.resources import Services
from pyserve.lanes.restart_policy import RETRY_DEFAULT_S, Cause, RestartPolicy
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_slot import FAILED, STARTING, STOPPING, WAITING, Condition, Slot, condition_of
from pyserve.telemetry.worker_log import SCALED_DOWN, STARTED, WorkerLog
from pyserve.worker.spec import ASYNC, BATCH, WorkerSpec

log = logging.getLogger(__name__)

# How many requests a handler that is a coroutine is given at a time.
ASYNC_IN_FLIGHT_MAX = 1000
# A worker that was told to stop finishes its batch first; this long after that its process must be gone.
STOP_GRACE_S = 5.0

# Puts back what workers are started from, as far as it is gone from the disk: (what they are, their interpreter).
Renew = Callable[[], Awaitable[tuple[WorkerSpec, str | None]]]


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
        on_condition: told of every change, also of one that leaves the condition as it is.
        renew: makes again what workers are started from, when it is gone from the disk; None if nothing can.
        retry_s: how long one that cannot be loaded is tried again quickly, see `restart_policy`.

    Attributes:
        rehearses, tries_batches: of the workers to be started, see `WorkerSpec`.
    """

    def __init__(
        self, services: Services, core: Any, spec: WorkerSpec, settings: ModelSettings, *, label: str,
        worker_log: WorkerLog, device_ids: list[int], interpreter: str | None, on_event: Callable[[JsonObject], None],
        on_condition: Callable[[Condition], None], on_loaded: Callable[[JsonObject], None], renew: Renew | None = None,
        retry_s: float = RETRY_DEFAULT_S,
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
        self._on_condition = on_condition
        self._on_loaded = on_loaded
        self._renew = renew
        self._renewing = asyncio.Lock()
        self._is_suspect = False  # the next start looks whether all files are there
        self._policy = RestartPolicy(retry_s)
        self._slots: list[Slot] = []
        self._last: Slot | None = None  # that ended, unless one was loaded since
        self._changed = asyncio.Event()
        self.rehearses = self.tries_batches = True

    # --- what others ask ------------------------------------------------------------------------------------------

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return sum(1 for slot in self._slots if slot.is_wanted and slot.state != FAILED)

    @property
    def condition(self) -> Condition:
        """How they are, all in all."""
        return condition_of(self.slots(), self._last)

    def slots(self) -> list[Slot]:
        """Those that are wanted, whether or not they have a process."""
        return [slot for slot in self._slots if slot.is_wanted]

    @property
    def failure(self) -> ServeError | None:
        """Why a worker could not be loaded; None if all could."""
        late = (slot for slot in self.slots() if slot.state == FAILED or slot.is_hopeless)
        return next((slot.failure for slot in late if slot.failure is not None), None)

    # --- what others do -------------------------------------------------------------------------------------------

    def set_count(self, count: int) -> None:
        """Starts workers, or lets go of the last ones once they have finished their batch."""
        self._services.descriptors.reserve(self, count)
        # Whoever asks for workers wants those that failed to be tried again.
        for slot in [slot for slot in self._slots if slot.state == FAILED]:
            self._slots.remove(slot)
        if count:
            self._policy.reset()
            for slot in self._slots:
                if slot.state == WAITING:
                    slot.is_hopeless = False
                    slot.hurry.set()
        else:
            self._last = None  # nobody wants a worker, so none is missing
        wanted = [slot for slot in self._slots if slot.is_wanted]
        for slot in wanted[count:]:
            self._let_go(slot)
        taken = {slot.index for slot in self._slots}
        free = (index for index in range(len(taken) + count) if index not in taken)
        for _ in range(count - len(wanted)):
            slot = Slot(next(free))
            self._slots.append(slot)
            slot.task = asyncio.get_running_loop().create_task(self._keep(slot))
        self._tell()

    def _tell(self) -> None:
        """Something has changed."""
        self._changed.set()
        self._on_condition(self.condition)

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
        """Waits until every worker is ready, or will not be soon. Returns why one is not, or ``""``."""

        def is_settled() -> bool:
            return all(slot.is_settled for slot in self._slots if slot.is_wanted)

        deadline = time.monotonic() + timeout_s
        while not is_settled():
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                late = next(slot for slot in self._slots if slot.is_wanted and not slot.is_settled)
                because = f"; before that: {late.error}" if late.error else ""
                return f"a worker was not ready within startup_timeout={timeout_s:g} s{because}"
        late_ones = (slot for slot in self.slots() if slot.state == FAILED or slot.is_hopeless)
        return next((slot.error for slot in late_ones), "")

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
        self._services.descriptors.reserve(self, 0)
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
                started_at = time.monotonic()
                try:
                    await self._live(slot, started_at)
                except Exception as error:  # ours, or the machine's
                    if slot.core_id is not None:
                        self._core.stop_worker(slot.core_id)
                        slot.core_id = None
                    await self._note_failure(slot, error, started_at)
                if not slot.is_wanted or not await self._may_go_on(slot):
                    break
        except asyncio.CancelledError:
            pass  # told to go while it waited for its next start
        finally:
            await self._bury(slot)
            if not slot.is_wanted:
                self._log.move(slot.index, SCALED_DOWN)
                if slot in self._slots:
                    self._slots.remove(slot)
            self._tell()

    async def _live(self, slot: Slot, started_at: float) -> None:
        """One process from its start to its end; reports to the policy how it went."""
        slot.begin()
        self._tell()
        try:
            await self._load(slot)
            core_id = self._hand_over(slot)
        except (ServeError, OSError) as error:
            await self._note_failure(slot, error, started_at)
            return
        ending, cause = await self._serve(slot, core_id)
        if slot.is_wanted:
            slot.ended(ending, None, self._policy.died(time.monotonic(), cause, is_known=slot.died_in_rerun))
            self._last = slot

    async def _note_failure(self, slot: Slot, error: Exception, started_at: float) -> None:
        """A worker could not be loaded."""
        self._note_rehearsal(slot)
        cause = slot.cause(error)
        repeats = bool(getattr(error, "repeats", False))
        if cause is Cause.MODEL and (is_of_machine(error) or not _are_there(self._spec.model_dir, self._interpreter)):
            cause, repeats = Cause.MACHINE, False  # also where its files were cleared away while it read them
        await self._bury(slot)
        self._log.failed_to_load(slot.index)
        if not slot.is_wanted:
            return
        failure = self._failure_of(error)
        decision = self._policy.failed_to_load(time.monotonic(), repeats=repeats, cause=cause, started_at=started_at)
        slot.ended(failure.reason(), failure, decision)
        self._last = slot
        self._is_suspect = self._policy.has_served

    def _failure_of(self, error: Exception) -> ServeError:
        """``error`` for those who asked for the worker."""
        if isinstance(error, ServeError):
            return error
        if isinstance(error, OSError):
            failure = ModelLoadError(f"no worker can be started: {error.strerror or type(error).__name__}")
        else:
            log.error("%s: starting a worker failed", self._label, exc_info=error)
            return ServerError("a worker cannot be started: an error of the server; its log says which")
        log.error("%s: %s", self._label, failure.message)
        return failure

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
        await self._see_to_files()
        timeout_s = self._settings.startup_timeout_s
        handle = slot.handle = await self._services.spawner.spawn(
            self._spec_of(slot), on_event=self._on_event, label=self._label, interpreter=self._interpreter,
            about=self._log.about(slot.index),
        )  # fmt: skip
        self._log.move(slot.index, STARTED)
        if not slot.is_wanted:  # told so in the moment in which the process came, which asyncio does not pass on
            handle.kill()
        try:
            loaded = await asyncio.wait_for(asyncio.shield(handle.loaded), timeout_s)
            self._log.loaded(slot.index, float(loaded.get("load_s") or 0))
            self._on_loaded(loaded)
        except TimeoutError:
            slot.kill_reason = "it was not loaded in time"
            handle.kill()
            raise ModelLoadError(
                f"{self._label} was not loaded within startup_timeout={timeout_s} s; raise startupTimeout in its "
                "model-config.yaml"
            ) from None

    async def _see_to_files(self) -> None:
        """Puts back the model's folder or its interpreter if one is gone: caches are cleared, disks are replaced.

        Raises:
            ServeError: that cannot be done, because the archive is gone too or the disk is full.
        """
        if self._renew is None:
            return
        async with self._renewing:
            is_gone = not _are_there(self._spec.model_dir, self._interpreter)
            if is_gone or self._is_suspect:
                self._spec, self._interpreter = await self._renew()
            if is_gone:
                log.warning("%s: what its workers are started from was gone, and was made again", self._label)
            self._is_suspect = False

    def _hand_over(self, slot: Slot) -> int:
        """Has the engine give it batches; its id there."""
        handle = slot.handle
        assert handle is not None
        core_id: int = self._core.add_worker(
            handle.socket_fd, handle.request_memory_fd, handle.answer_memory_fd, in_flight_max=self._in_flight_max()
        )
        slot.core_id = core_id
        if slot.is_wanted:
            slot.loaded()
            self._last = None
            self._policy.ready(time.monotonic())
        else:
            self._core.stop_worker(core_id)
        self._tell()
        return core_id

    async def _serve(self, slot: Slot, core_id: int) -> tuple[str, Cause]:
        """Lets it take batches until it ends. Returns how it ended, and what ended it."""
        handle = slot.handle
        assert handle is not None

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
        slot.died_in_rerun = last is not None and last["died_in_rerun"]
        self._core.remove_worker(core_id)
        if slot.is_wanted:
            slot.lost(last["error"] if last is not None else "")
            self._last = slot
            self._tell()
        await self._bury(slot)
        ending = slot.kill_reason or f"it {handle.exited.result()}"
        if last is not None and last["state"] == "died" and last["error"]:
            ending += f" ({last['error']})"
        if slot.is_wanted:
            log.error("%s: worker %d (pid %d) ended: %s", self._label, self._log.id(slot.index), handle.pid, ending,
                      extra=self._log.about(slot.index))  # fmt: skip
            self._log.disconnected(slot.index)
        slot.handle = handle
        cause = slot.cause()
        slot.handle = None
        return ending, cause

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
            handle.kill()  # also if we are told to go meanwhile
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
        self._tell()
        if not decision.restarts:
            log.error("%s: no worker takes its place: %s", self._label, decision.reason,
                      extra=self._log.about(slot.index))  # fmt: skip
            return False
        self._log.retrying(slot.index, decision.delay_s, decision.reason)
        if decision.delay_s > 0:
            slot.hurry.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(slot.hurry.wait(), decision.delay_s)
        return True


def _are_there(model_dir: str, interpreter: str | None) -> bool:
    return os.path.isdir(model_dir) and (interpreter is None or os.path.exists(interpreter))
