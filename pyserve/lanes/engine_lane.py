"""A lane that the native engine makes batches for: a request's admission, and its limits.

Both kinds take batches from the same native batcher. `NativeLane` runs a network in C++ threads, `PythonLane` calls a
handler in worker processes.

Loop thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from pyserve.errors import JsonObject, OverloadedError, ServerError
from pyserve.lanes.lane import Lane
from pyserve.lanes.limits import Sweep, start_client_limit
from pyserve.lanes.pending import OVER, Pending
from pyserve.lanes.preprocess_pool import LimitedCall
from pyserve.lanes.refusals import as_queue_full, no_worker_error
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.telemetry.host_metrics import BatchRecorder
from pyserve.telemetry.worker_log import WorkerLog

if TYPE_CHECKING:
    from pyserve import _core

T = TypeVar("T")

# The ring is fixed when the lane is made; it leaves room for raising job_queue_size while running.
RING_CAPACITY_MIN = 4096


def ring_capacity(settings: ModelSettings) -> int:
    """A power of two, more than may ever wait."""
    return 1 << (max(RING_CAPACITY_MIN, 4 * settings.queue_size) - 1).bit_length()


class EngineLane(Lane):
    """Requests of one model between admission and answer.

    Args:
        core: the engine's side, made by the subclass.

    Attributes:
        preparing_count: requests that wait to become an input, in another thread.
    """

    worker_log: WorkerLog

    def __init__(
        self, services: Services, name: str, label: str, core: _core.Lane | _core.ProcessLane, settings: ModelSettings
    ):
        super().__init__(services, name, label, settings)
        self.core: Any = core
        self.preparing_count = 0
        self._is_announcing = False
        self._sweep = Sweep()
        self._batches: BatchRecorder | None = None

    # --- for subclasses -------------------------------------------------------------------------------------------

    def begin(self, pending: Pending) -> None:
        """Starts an admitted request on its way."""
        raise NotImplementedError

    def complete(self, completion: Any) -> None:
        """A batch came to an end."""
        raise NotImplementedError

    @property
    def running_max(self) -> int:
        """Batches that may run at once."""
        raise NotImplementedError

    def close_rows(self) -> None:
        """Has the engine take no request by itself any more."""

    def leaves_overrun(self, pending: Pending) -> bool:
        """Whether a request that has run for too long is left to the end of its batch, to be run again by itself."""
        return False

    def take_over_late(self, now: int) -> None:
        """Has among `in_flight` what only the engine knows so far and is over its time, in front."""

    def look_after_workers(self, now: int) -> bool:
        """Called with each sweep; returns whether another one is wanted although no request waits for an answer."""
        return False

    # --- workers and settings -------------------------------------------------------------------------------------

    @property
    def ready_count(self) -> int:
        """Workers that take batches now."""
        return int(self.core.ready_count)

    def watch_workers(self) -> None:
        """Sees to runs of theirs that take too long, although no request may wait."""
        if not self.is_draining:
            self._sweep.start(self)

    @property
    def capacity(self) -> int:
        """More requests than this can never wait, whatever the settings say."""
        return int(self.core.capacity)

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        self.core.set_limits(
            batch_size_max=self.batch_size_max,
            batch_size_min=min(self.settings.min_batch, self.batch_size_max),
            batch_delay_max_ns=self.settings.max_batch_delay_ms * 1_000_000,
            running_max=self.running_max,
        )

    async def finish_requests(self) -> None:
        """Takes no more requests, and returns when those that were admitted are answered."""
        self.is_draining = True
        self.close_rows()
        while self.in_flight_count and (self.ready_count or self.may_take):
            self.idle.clear()
            await self.idle.wait()
        self.answer_all(self.refusal("draining"))
        self._sweep.stop()
        self.core.close()

    # --- the way in -----------------------------------------------------------------------------------------------

    def predict(self, pending: Pending) -> None:
        """Admits the request and sees to its answer. Raises nothing that is the request's fault."""
        if self.times_all:
            self.begin_stages(pending)
        kept = pending.kept
        if kept is not None:
            kept.let_go()
        # What has run here was admitted before.
        is_admitted = (kept is not None and kept.lane is self) or self._is_admitted()
        refusal = None if is_admitted else self._admit()
        if refusal is not None:
            self.refuse(pending, refusal)
            return
        self.in_flight[pending] = None
        self.idle.clear()
        pending.exchange.on_disconnect = pending.cancel
        if pending.client_deadline:
            start_client_limit(pending)
        if self._sweep.timer is None:
            self._sweep.start(self)
        pending.begin()

    def take_row(self, row: Pending) -> None:
        """Begins a row of a request that is admitted."""
        self.in_flight[row] = None
        self.idle.clear()
        self.begin(row)

    def announce_soon(self) -> None:
        """Wakes a worker for all requests that this turn of the loop brings: one wake-up, and a batch of them all."""
        if not self._is_announcing:
            self._is_announcing = True
            self.loop.call_soon(self._announce)

    def _announce(self) -> None:
        self._is_announcing = False
        self.core.announce()

    def in_pool(self, call: Callable[[], T], then: Callable[[T], object], *, waits: bool) -> None:
        """Calls ``call``, which must not raise, in another thread and ``then`` with its result here.

        Args:
            waits: whether it counts as a waiting request meanwhile.
        """
        self._note_preparing(waits)

        def done(future: Future[T]) -> None:
            self._note_preparing(-waits)
            then(future.result())

        limited = LimitedCall(call, self.settings.response_timeout_s, self.label)
        future = self.services.preprocess_pool.submit(limited)
        future.add_done_callback(lambda each: self.loop.call_soon_threadsafe(done, each))

    def _note_preparing(self, count: int) -> None:
        self.preparing_count += count

    @property
    def has_room_in_ring(self) -> bool:
        """Whether one more can be submitted, whatever may wait by the settings."""
        return bool(self.core.queue_size + 1 < self.core.capacity)

    def deadline(self, pending: Pending) -> int:
        """Until when a worker must have taken it, ns."""
        deadline = pending.arrived_at + int(self.settings.queue_limit_s * 1e9)
        return min(deadline, pending.client_deadline) if pending.client_deadline else deadline

    def _is_admitted(self) -> bool:
        """Whether `_admit` has nothing to look into."""
        settings = self.settings
        has_room: bool = self.core.has_room(settings.queue_size - self.preparing_count)
        return has_room and not (self.is_draining or settings.use_job_ticket)

    def _admit(self) -> OverloadedError | None:
        """The one bound, before any work: what may wait, plus what idle workers will take at once."""
        if self.is_draining:
            return self.refusal("draining")
        if not self.ready_count and not self.may_take:
            return self.refusal("no worker")
        if self._has_room():
            return None
        self.core.purge()  # requests whose clients have gone make room
        return None if self._has_room() else self.refusal("queue full")

    def _has_room(self) -> bool:
        waiting = self.waiting_count
        if self.settings.use_job_ticket:  # only what an idle worker takes at once
            return waiting < self._waiting_max() - self.settings.queue_size
        return waiting < self.settings.queue_size or waiting < self._waiting_max()

    def _waiting_max(self) -> int:
        # The engine counts a batch as running before it takes it from the queue, so a request is never missed.
        idle = min(self.ready_count, self.running_max) - self.core.running
        return self.settings.queue_size + max(0, idle) * self.batch_size_max

    # --- the way out ----------------------------------------------------------------------------------------------

    @property
    def _batch_recorder(self) -> BatchRecorder:
        if self._batches is None:
            self._batches = self.services.metrics.batches(self.name, self.version, is_native=self.is_native)
        return self._batches

    def note_batch(self, completion: Any, owners: list[Pending | None]) -> None:
        """Counts a batch that was run; one of ``owners`` is there."""
        batches = self._batch_recorder
        batches.note(completion, next(filter(None, owners)).arrived_at, self.batch_size_max)
        if batches.is_noted:
            if completion.code == "ok":
                batches.note_model_times(",".join(owner.exchange.request.id for owner in owners if owner is not None))
            self.loop.call_soon(batches.note_thread_time, batches.overhead_ms)

    def new_worker_log(self, first_number: int = 0) -> WorkerLog:
        """What tells of its workers, the first of which has this number."""
        first_id = self.services.config.initial_worker_port + first_number
        return WorkerLog(self.name, self.version, first_id, on_load=self.services.metrics.observe_load)

    def fail_batch(self, owners: list[Pending | None]) -> None:
        """Answers requests whose completion could not be delivered."""
        for owner in live(owners):
            self.answer_error(owner, ServerError("Internal error"))

    # --- what others ask ------------------------------------------------------------------------------------------

    def refusal(self, reason: str) -> OverloadedError:
        """As of every lane; of a full queue with its length, and what makes room."""
        if reason != "queue full":
            return super().refusal(reason)
        detail: JsonObject = {
            "reason": reason,
            "waiting": self.waiting_count,
            "job_queue_size": self.settings.queue_size,
            "workers": self.ready_count,
            "fix": f"retry later, or raise job_queue_size: PUT /models/{self.name}?job_queue_size=N",
        }
        return as_queue_full(no_worker_error(self.name, detail), self.services.config)

    @property
    def waiting_count(self) -> int:
        """Requests that no worker has taken."""
        return self.preparing_count + int(self.core.queue_size)

    def worker_load_ms(self) -> dict[str, float]:
        """How long the workers took to load, by their names."""
        return self.worker_log.load_ms

    def stats(self) -> JsonObject:
        """The native counters and histograms, plus ``running`` batches and the ``queue_size``."""
        rest = {"running": self.core.running, "queue_size": self.waiting_count, "running_max": self.running_max}
        return {**self.core.stats(), **rest}


def live(owners: list[Pending | None]) -> list[Pending]:
    """Those that still wait for an answer."""
    return [owner for owner in owners if owner is not None and owner.stage != OVER]


def request_ids(pendings: list[Pending]) -> str:
    """Their request ids, for the log."""
    return ", ".join(pending.exchange.request.id for pending in pendings)
