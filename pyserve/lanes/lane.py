"""What all lanes have in common: what a model asks of one, and the one end of each request.

A lane is the way of one model's requests from the endpoint to the answer.

    Lane ── EngineLane ── NativeLane    runs a network in C++ threads
      │         └──────── PythonLane    calls a handler in worker processes
      └──── SequenceLane                a PythonLane for each worker

Loop thread only.
"""

from __future__ import annotations

import asyncio

from pyserve.errors import JsonObject, OverloadedError, ServeError
from pyserve.lanes.limits import expired_error
from pyserve.lanes.lost_devices import DeviceLoss
from pyserve.lanes.pending import OVER, Pending
from pyserve.lanes.refusals import device_lost_error, no_worker_error, no_worker_subjects
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_rows import WorkerRow
from pyserve.lanes.worker_slot import SERVING, Condition
from pyserve.request.messages import Response
from pyserve.request.stages import Stages
from pyserve.telemetry.metrics import RequestRecorder


class Lane:
    """Requests of one model between admission and answer.

    Args:
        label: ``name version``, for the log.
        settings: the model's; read at each use, so that changes hold at once.

    Attributes:
        reason: why it is this kind of lane, if its handler would have allowed the other.
        batch_note: why its batches are smaller than the settings ask for; ``""`` if they are not.
        batch_probe: what trying batches came to: ``passed``, or why it says nothing, or what differed; ``""`` so far.
        finished_at: ns; when the last batch came to its end.
        times_all: whether the stages of every request are noted, as the configuration or the environment may ask.
        in_flight: requests that were admitted and are not answered, in order of arrival.
    """

    is_native = False
    reason = ""
    batch_note = ""
    batch_probe = ""
    finished_at = 0

    def __init__(self, services: Services, name: str, label: str, settings: ModelSettings):
        # Constant.
        self.services = services
        self.name = name
        self.label = label
        self.version = label.removeprefix(f"{name} ")
        self.is_strict = services.config.compat == "strict"
        config = services.config
        self.times_all = config.server_timing or config.request_log or services.tracer is not None
        self.loop = asyncio.get_running_loop()
        # Changes while it runs.
        self.settings = settings
        self.is_draining = False
        self.loss: DeviceLoss | None = None  # of what it runs on
        self.in_flight: dict[Pending, None] = {}
        self.idle = asyncio.Event()  # set while none is in flight
        self.idle.set()
        self._recorders: dict[str, RequestRecorder] = {}  # by the version as in the URL: its own, or "default"

    # --- what each kind has its own way for -----------------------------------------------------------------------

    def predict(self, pending: Pending) -> None:
        """Admits the request and sees to its answer. Raises nothing that is the request's fault."""
        raise NotImplementedError

    def set_workers(self, count: int) -> None:
        """Begins to start or stop workers until there are ``count``."""
        raise NotImplementedError

    async def prepare_workers(self, count: int) -> None:
        """Gets ready what ``count`` workers need, before they are started.

        Raises:
            ServeError: it cannot be had.
        """

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""
        raise NotImplementedError

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        raise NotImplementedError

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        raise NotImplementedError

    def runs_on(self, device: str) -> bool:
        """Whether this process computes its answers on the device; worker processes have their own way to it."""
        return False

    @property
    def failure(self) -> ServeError | None:
        """The error of a worker that could not be started, if it is known in full."""
        return None

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        raise NotImplementedError

    @property
    def ready_count(self) -> int:
        """Workers that take batches now."""
        raise NotImplementedError

    @property
    def may_take(self) -> bool:
        """Whether requests are admitted although no worker is ready: one is coming."""
        return False

    @property
    def condition(self) -> Condition:
        """How its workers are, all in all; threads end only with the server."""
        return Condition(SERVING)

    @property
    def capacity(self) -> int:
        """More requests than this can never wait, whatever the settings say."""
        raise NotImplementedError

    @property
    def waiting_count(self) -> int:
        """Requests that no worker has taken."""
        raise NotImplementedError

    def worker_rows(self) -> list[WorkerRow]:
        """The workers, as the management API shows them."""
        raise NotImplementedError

    def worker_load_ms(self) -> dict[str, float]:
        """How long the workers took to load, by their names."""
        return {}

    def stats(self) -> JsonObject:
        """The native counters and histograms, plus ``running`` batches and the ``queue_size``."""
        raise NotImplementedError

    # --- what others ask ------------------------------------------------------------------------------------------

    @property
    def batch_size_max(self) -> int:
        """Requests of one batch: the settings' number, or one if batches were found to change answers."""
        return 1 if self.batch_note else self.settings.batch_size

    @property
    def in_flight_count(self) -> int:
        """Requests admitted and not answered."""
        return len(self.in_flight)

    def lose_device(self, loss: DeviceLoss) -> None:
        """A device is lost. A lane that runs on it answers whoever waits, and takes no more requests."""
        if self.loss is None and self.runs_on(loss.device):
            self.loss = loss
            self.is_draining = True
            self.answer_all(self.refusal("device lost"))

    def refusal(self, reason: str) -> OverloadedError:
        """Why a request is not admitted: TorchServe's one message, and a ``detail`` that distinguishes the causes."""
        if self.loss is not None:
            return device_lost_error(self.name, self.loss.reason)
        return no_worker_error(self.name, {"reason": reason})

    # --- the end of a request -------------------------------------------------------------------------------------

    def answer(self, pending: Pending, response: Response) -> None:
        """Sends the answer, if none was sent yet."""
        if pending.stage == OVER:
            return
        self.forget(pending)
        exchange = pending.exchange
        if pending.stages is not None and pending.stages.is_told and not exchange.is_streaming:
            pending.stages.tell(response, pending.arrived_at)
        if response.error is not None:
            pending.is_error = True
            self.services.recent_errors.note(response.error, exchange.request, model=self.name, version=self.version)
        pending.observe(response.status)
        if exchange.is_streaming:
            exchange.abort_stream(response)  # the head has left: the client must not take what it has for all
        else:
            exchange.respond(response)

    def answer_error(self, pending: Pending, error: ServeError) -> None:
        """As `answer`, with what the client may see of ``error``."""
        if type(error) is OverloadedError and pending.url_version != "default":
            message = error.message.replace(*no_worker_subjects(self.name, pending.url_version))
            status, error = error.status, OverloadedError(message, detail=error.detail, headers=error.headers)
            error.status = status
        self.answer(pending, self.services.error_format.answer(error, pending.exchange.request))

    def answer_all(self, error: ServeError) -> None:
        """Answers every admitted request with ``error``; what is running is dropped when it is done."""
        self.take_over()
        for pending in list(self.in_flight):
            pending.drop()
            self.answer_error(pending, error)

    def answer_waiting(self, error: ServeError) -> None:
        """As `answer_all`, of those that no worker has begun."""
        self.take_over(waiting_only=True)
        for pending in list(self.in_flight):
            if pending.began_at() == 0:
                pending.drop()
                self.answer_error(pending, error)

    def take_over(self, *, waiting_only: bool = False) -> None:
        """Has among `in_flight` what only the engine knows so far."""

    def refuse(self, pending: Pending, error: OverloadedError) -> None:
        """Answers a request that is not admitted."""
        self.services.metrics.observe_rejection(self.name, error.detail["reason"])
        self.answer_error(pending, error)

    def expire(self, pending: Pending) -> None:
        """It waited past its time and was dropped from the queue."""
        if pending.stage != OVER:
            self.services.metrics.observe_rejection(self.name, "expired")
            self.answer_error(pending, expired_error(self.name, self.settings, pending))

    def cancel(self, pending: Pending) -> None:
        """The client hung up."""
        if pending.stage != OVER:
            pending.drop()
            self.forget(pending)
            pending.observe(None)

    def forget(self, pending: Pending) -> None:
        """It is over: the one place that says so. The caller sees to its answer, if somebody waits for one."""
        pending.stage = OVER
        if pending.limit_timer is not None:
            pending.limit_timer.cancel()
            pending.limit_timer = None
        self.in_flight.pop(pending, None)
        if not self.in_flight and not self.in_flight_count:
            self.idle.set()

    # --- what is noted of a request -------------------------------------------------------------------------------

    def begin_stages(self, pending: Pending) -> None:
        """Notes where its time goes, if `times_all`."""
        services = self.services
        stages = pending.stages
        if stages is None:
            stages = pending.stages = Stages(is_told=services.config.server_timing)
        pending.exchange.request.stages = stages
        if services.tracer is not None and stages.span is None:
            stages.span = services.tracer.begin(pending.exchange.request, self.name, pending.version)

    def observe(self, pending: Pending, status: int | None) -> None:
        """Counts the end of a request. ``status``: of its answer; None if its client hung up."""
        if pending.is_counted:
            self._count(pending, status)
        if pending.stages is not None and pending.stages.span is not None and self.services.tracer is not None:
            self.services.tracer.end(pending.stages, status)

    def _count(self, pending: Pending, status: int | None) -> None:
        url_version = pending.url_version
        if status is None:
            self.services.metrics.observe_abort(self.name, pending.version, url_version)
            return
        self.recorder(url_version).observe(
            status, pending.age_s(), pending.queue_s(), is_error=pending.is_error,
            is_http=pending.exchange.request.is_http,
        )  # fmt: skip

    def recorder(self, url_version: str) -> RequestRecorder:
        """What counts requests of this version as in the URL."""
        recorder = self._recorders.get(url_version)
        if recorder is None:
            recorder = self.services.metrics.recorder(self.name, self.version, url_version)
            self._recorders[url_version] = recorder
        return recorder
