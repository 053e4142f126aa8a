"""What both lanes of a model have in common: a request's admission, its limits and its one end.

A lane is the way of one model's requests from the endpoint to the answer. `NativeLane` runs a network in C++ threads,
`PythonLane` calls a handler in worker processes; both take batches from the same native batcher.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from pyserve.errors import DeadlineError, ExpiredError, JsonObject, OverloadedError, ServeError, ServerError
from pyserve.lanes.pending import OVER, PREPARING, SUBMITTED, Pending
from pyserve.lanes.refusals import no_worker_error, no_worker_subjects, retry_after, worker_died_error
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.request.messages import TIMEOUT_HEADER, Response
from pyserve.request.stages import Stages
from pyserve.telemetry.host_metrics import BatchRecorder
from pyserve.telemetry.metrics import RequestRecorder
from pyserve.telemetry.worker_log import WorkerLog

if TYPE_CHECKING:
    from pyserve import _core

log = logging.getLogger(__name__)

T = TypeVar("T")

# The ring is fixed when the lane is made; it leaves room for raising job_queue_size while running.
RING_CAPACITY_MIN = 4096
# Slack of the time limits: how often the lane looks for requests that are over them.
SWEEP_INTERVAL_S = 0.1


@dataclass
class WorkerRow:
    """One worker as the management API shows it.

    Attributes:
        memory_usage: of its whole process, in bytes.
        gpu_id: as torch counts; None on a CPU, and for the model's own device.
    """

    id: str
    start_time: datetime
    status: str
    memory_usage: int
    pid: int
    gpu: bool
    gpu_id: int | None = None


def ring_capacity(settings: ModelSettings) -> int:
    """A power of two, more than may ever wait."""
    return 1 << (max(RING_CAPACITY_MIN, 4 * settings.queue_size) - 1).bit_length()


class Lane:
    """Requests of one model between admission and answer.

    Args:
        label: ``name version``, for the log.
        core: the engine's side, made by the subclass.
        settings: the model's; read at each use, so that changes hold at once.

    Attributes:
        reason: why it is this kind of lane, if its handler would have allowed the other.
        batch_note: why its batches are smaller than the settings ask for; ``""`` if they are not.
        batch_probe: what trying batches came to: ``passed``, or why it says nothing, or what differed; ``""`` so far.
    """

    is_native = False
    reason = ""
    batch_note = ""
    batch_probe = ""
    worker_log: WorkerLog

    def __init__(
        self, services: Services, name: str, label: str, core: _core.Lane | _core.ProcessLane, settings: ModelSettings
    ):
        # Constant.
        self.core: Any = core
        self._services = services
        self.name = self._name = name
        self._label = label
        self._is_strict = services.config.compat == "strict"
        self._times_all = services.config.server_timing or services.tracer is not None
        self._loop = asyncio.get_running_loop()
        # Changes while it runs.
        self.settings = settings
        self._pending: dict[Pending, None] = {}  # in order of arrival
        self._recorders: dict[str, RequestRecorder] = {}  # by the version as in the URL: its own, or "default"
        self._batches: BatchRecorder | None = None
        self._preparing_count = 0
        self.finished_at = 0  # ns; when the last batch came to its end
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # --- for subclasses -------------------------------------------------------------------------------------------

    def begin(self, pending: Pending) -> None:
        """Starts an admitted request on its way."""
        raise NotImplementedError

    def complete(self, completion: Any) -> None:
        """A batch came to an end."""
        raise NotImplementedError

    def worker_rows(self) -> list[WorkerRow]:
        """The workers, as the management API shows them."""
        raise NotImplementedError

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        raise NotImplementedError

    def set_workers(self, count: int) -> None:
        """Begins to start or stop workers until there are ``count``."""
        raise NotImplementedError

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""
        raise NotImplementedError

    @property
    def failure(self) -> ServeError | None:
        """The error of a worker that could not be started, if it is known in full."""
        return None

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        raise NotImplementedError

    @property
    def may_take(self) -> bool:
        """Whether requests are admitted although no worker is ready: one is coming."""
        return False

    @property
    def running_max(self) -> int:
        """Batches that may run at once."""
        raise NotImplementedError

    def look_after_workers(self, now: int) -> bool:
        """Called with each sweep; returns whether another one is wanted although no request waits for an answer."""
        return False

    # --- workers and settings -------------------------------------------------------------------------------------

    @property
    def ready_count(self) -> int:
        """Workers that take batches now."""
        return int(self.core.ready_count)

    @property
    def batch_size_max(self) -> int:
        """Requests of one batch: the settings' number, or one if batches were found to change answers."""
        return 1 if self.batch_note else self.settings.batch_size

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
        self._is_draining = True
        if self.ready_count or self.may_take:
            await self._idle.wait()
        self.answer_all(self.refusal("draining"))
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self.core.close()

    # --- the way in -----------------------------------------------------------------------------------------------

    def predict(self, pending: Pending) -> None:
        """Admits the request and sees to its answer. Raises nothing that is the request's fault."""
        if self._times_all:
            self._begin_stages(pending)
        refusal = None if self._is_admitted() else self._admit()
        if refusal is not None:
            self._services.metrics.observe_rejection(self._name, refusal.detail["reason"])
            self._answer_error(pending, refusal)
            return
        self._pending[pending] = None
        self._idle.clear()
        pending.exchange.on_disconnect = pending.cancel
        if pending.client_deadline:
            self._start_limit(pending)
        if self._sweep_timer is None:
            self._start_sweep()
        if pending.is_whole:
            pending.begin()
        else:
            self.begin(pending)

    def take_row(self, row: Pending) -> None:
        """Begins a row of a request that is admitted."""
        self._pending[row] = None
        self._idle.clear()
        self.begin(row)

    def in_pool(self, call: Callable[[], T], then: Callable[[T], object], *, waits: bool) -> None:
        """Calls ``call``, which must not raise, in another thread and ``then`` with its result here.

        Args:
            waits: whether it counts as a waiting request meanwhile.
        """
        self._preparing_count += waits

        def done(future: Future[T]) -> None:
            self._preparing_count -= waits
            then(future.result())

        future = self._services.preprocess_pool.submit(call)
        future.add_done_callback(lambda each: self._loop.call_soon_threadsafe(done, each))

    @property
    def has_room_in_ring(self) -> bool:
        """Whether one more can be submitted, whatever may wait by the settings."""
        return bool(self.core.queue_size + 1 < self.core.capacity)

    def _is_admitted(self) -> bool:
        """Whether `_admit` has nothing to look into."""
        settings = self.settings
        has_room: bool = self.core.has_room(settings.queue_size - self._preparing_count)
        return has_room and not (self._is_draining or settings.use_job_ticket)

    def _admit(self) -> OverloadedError | None:
        """The one bound, before any work: what may wait, plus what idle workers will take at once."""
        if self._is_draining:
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

    @property
    def waiting_count(self) -> int:
        return self._preparing_count + int(self.core.queue_size)

    def _waiting_max(self) -> int:
        # The engine counts a batch as running before it takes it from the queue, so a request is never missed.
        idle = min(self.ready_count, self.running_max) - self.core.running
        return self.settings.queue_size + max(0, idle) * self.batch_size_max

    def _deadline(self, pending: Pending) -> int:
        deadline = pending.arrived_at + int(self.settings.queue_limit_s * 1e9)
        return min(deadline, pending.client_deadline) if pending.client_deadline else deadline

    # --- the end of a request -------------------------------------------------------------------------------------

    def _answer(self, pending: Pending, response: Response) -> None:
        """Sends the answer, if none was sent yet."""
        if pending.stage == OVER:
            return
        self._forget(pending)
        if pending.stages is not None and pending.stages.is_told and not pending.is_streaming:
            pending.stages.tell(response, pending.arrived_at)
        self._observe(pending, response.status)
        if pending.is_streaming:
            pending.exchange.abort_stream(response)  # the head has left: the client must not take what it has for all
        else:
            pending.exchange.respond(response)

    def answer_whole(self, whole: Pending, answer: Response | ServeError) -> None:
        """Answers a request whose rows were taken one by one."""
        if isinstance(answer, ServeError):
            self._answer_error(whole, answer)
        else:
            self._answer(whole, answer)

    def _observe(self, pending: Pending, status: int) -> None:
        if pending.is_row:
            return
        url_version = pending.url_version
        recorder = self._recorders.get(url_version)
        if recorder is None:
            recorder = self._services.metrics.recorder(self._name, pending.version, url_version)
            self._recorders[url_version] = recorder
        recorder.observe(status, pending.age_s(), pending.queue_s())
        if pending.stages is not None:
            self._end_stages(pending, status)

    def _note_batch(self, completion: Any, owners: list[Pending | None]) -> None:
        if self._batches is None:
            version = self._label.removeprefix(f"{self._name} ")
            self._batches = self._services.metrics.batches(self._name, version, is_native=self.is_native)
        self._batches.note(completion, next(filter(None, owners)).arrived_at, self.batch_size_max)

    def _begin_stages(self, pending: Pending) -> None:
        """Of every request, since the configuration or the environment asks for it."""
        services = self._services
        stages = pending.stages
        if stages is None:
            stages = pending.stages = Stages(is_told=services.config.server_timing)
        if services.tracer is not None and stages.span is None:
            stages.span = services.tracer.begin(pending.exchange.request, self._name, pending.version)

    def _end_stages(self, pending: Pending, status: int | None) -> None:
        if pending.stages is not None and pending.stages.span is not None and self._services.tracer is not None:
            self._services.tracer.end(pending.stages, status)

    def _answer_error(self, pending: Pending, error: ServeError) -> None:
        if type(error) is OverloadedError and pending.url_version != "default":
            error = OverloadedError(
                error.message.replace(*no_worker_subjects(self._name, pending.url_version)),
                detail=error.detail, headers=error.headers,
            )  # fmt: skip
        self._answer(pending, self._services.error_format.answer(error, pending.exchange.request))

    def answer_all(self, error: ServeError) -> None:
        """Answers every admitted request with ``error``; what is running is dropped when it is done."""
        for pending in list(self._pending):
            self._drop(pending)
            self._answer_error(pending, error)

    def cancel(self, pending: Pending) -> None:
        """The client hung up."""
        if pending.stage != OVER:
            self._drop(pending)
            self._forget(pending)
            if not pending.is_row:
                self._observe_abort(pending)

    def _observe_abort(self, pending: Pending) -> None:
        self._services.metrics.observe_abort(self._name, pending.version, pending.url_version)
        self._end_stages(pending, None)

    def _forget(self, pending: Pending) -> None:
        pending.stage = OVER
        if pending.limit_timer is not None:
            pending.limit_timer.cancel()
            pending.limit_timer = None
        self._pending.pop(pending, None)
        if not self._pending:
            self._idle.set()

    def _drop(self, pending: Pending) -> None:
        """Keeps it from running, or its result from being used."""
        if pending.is_whole:
            pending.drop_rows()
        elif pending.stage == SUBMITTED:
            self.core.cancel(pending.ticket)

    def expire(self, pending: Pending) -> None:
        """It waited past its time and was dropped from the queue."""
        if pending.stage == OVER:
            return
        self._services.metrics.observe_rejection(self._name, "expired")
        age_s, limit_ms = pending.age_s(), pending.client_limit_ms()
        limit = f"{self.settings.queue_limit_source}={self.settings.queue_limit_s:g} s"
        if limit_ms and age_s * 1e3 >= limit_ms and limit_ms < self.settings.queue_limit_s * 1e3:
            limit = f"{TIMEOUT_HEADER}={limit_ms}"
        error = ExpiredError(
            f'Model "{self._name}" did not come to this request in time',
            detail={"reason": "expired", "queued_s": round(age_s, 3), "limit": limit},
            headers={"Retry-After": retry_after()},
        )
        self._answer_error(pending, error)

    def _start_limit(self, pending: Pending) -> None:
        """Sees to it that the client has an answer when it stops waiting."""
        if pending.limit_timer is not None:  # it was another lane's
            pending.limit_timer.cancel()
        remaining_s = (pending.client_deadline - time.monotonic_ns()) / 1e9
        pending.limit_timer = self._loop.call_later(max(0.0, remaining_s), self.reach_client_limit, pending)

    def reach_client_limit(self, pending: Pending) -> None:
        """Its client waits no longer: what has not begun never runs, and what runs is not used."""
        pending.limit_timer = None
        if pending.stage == OVER:
            return
        if time.monotonic_ns() < pending.client_deadline:  # the loop's timers are coarser
            self._start_limit(pending)
            return
        started_at = pending.began_at()
        if started_at < 0:
            return  # it has just come to its end; its answer is on the way here
        self._drop(pending)
        if started_at == 0:
            self.expire(pending)
            return
        pending.started_at = started_at
        queued_s, ran_s = (started_at - pending.arrived_at) / 1e9, (time.monotonic_ns() - started_at) / 1e9
        error = DeadlineError(
            f"the model did not answer in the client's time: queued {queued_s:.3f} s, ran {ran_s:.3f} s, limit "
            f"{TIMEOUT_HEADER}={pending.client_limit_ms()}",
            detail={"reason": TIMEOUT_HEADER, "queued_s": round(queued_s, 3), "ran_s": round(ran_s, 3)},
        )
        self._answer_error(pending, error)

    def fail_batch(self, owners: list[Pending | None]) -> None:
        """Answers requests whose completion could not be delivered."""
        for owner in live(owners):
            self._answer_error(owner, ServerError("Internal error"))

    def _overrun(self, pending: Pending, started_at: int) -> None:
        queued_s = (started_at - pending.arrived_at) / 1e9
        ran_s = (time.monotonic_ns() - started_at) / 1e9
        pending.started_at = started_at
        error: ServeError = DeadlineError(
            f"the model did not answer in time: queued {queued_s:.3f} s, ran {ran_s:.3f} s, limit "
            f"response_timeout={self.settings.response_timeout_s} s",
            detail={"reason": "response_timeout"},
        )
        if self._is_strict:
            error = worker_died_error()
        self._answer_error(pending, error)

    def _start_sweep(self) -> None:
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    def _sweep(self) -> None:
        """Answers what is over its time. Nothing younger than the shorter limit can be, so the scan is short."""
        self._sweep_timer = None
        queue_limit_s, run_limit_s = self.settings.queue_limit_s, float(self.settings.response_timeout_s)
        now = time.monotonic_ns()
        for pending in list(self._pending):
            if not pending.is_swept:
                continue
            age_s = (now - pending.arrived_at) / 1e9
            if age_s < min(queue_limit_s, run_limit_s):
                break
            started_at = self.core.started_at(pending.ticket) if pending.stage != PREPARING else 0
            # A stream is over its time when it has stood still for as long.
            running_since = max(started_at, pending.progress_at)
            if started_at > 0 and (now - running_since) / 1e9 >= run_limit_s:
                self._drop(pending)
                self._overrun(pending, started_at)
            elif started_at == 0 and age_s >= queue_limit_s:
                self._drop(pending)
                self.expire(pending)
        if self.look_after_workers(now) or self._pending:
            self._start_sweep()

    # --- what others ask ------------------------------------------------------------------------------------------

    def refusal(self, reason: str) -> OverloadedError:
        """Why a request is not admitted: TorchServe's one message, and a ``detail`` that tells the causes apart."""
        detail: JsonObject = {"reason": reason}
        if reason == "queue full":
            detail["waiting"] = self.waiting_count
            detail["job_queue_size"] = self.settings.queue_size
            detail["workers"] = self.ready_count
            detail["fix"] = f"retry later, or raise job_queue_size: PUT /models/{self._name}?job_queue_size=N"
        return no_worker_error(self._name, detail)

    @property
    def in_flight_count(self) -> int:
        return len(self._pending)

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
