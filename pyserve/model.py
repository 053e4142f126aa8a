"""One served version of a model: its life, its settings, and the path of a request through the native lane.

    LOADING ──> READY ──> DRAINING ──> gone
       └──────> FAILED ──────┘

All methods are for the loop thread; loading and slow preprocessing run in threads and come back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from pyserve import codec
from pyserve.archive import Archive
from pyserve.config import Config
from pyserve.engine import Engine
from pyserve.errors import (
    BadRequestError, DeadlineError, ExpiredError, HandlerError, ModelLoadError, OutOfMemoryError,
    OverloadedError, ServeError,
)  # fmt: skip
from pyserve.handler import PredictionException
from pyserve.http1_exchange import Exchange
from pyserve.loader import Network, load_network
from pyserve.messages import Response, error_response
from pyserve.metrics import Metrics
from pyserve.pending import OVER, PREPARING, SUBMITTED, Pending
from pyserve.settings import validate_setting
from pyserve.trace import Progress, Tracing

log = logging.getLogger(__name__)

STATES = {"LOADING": ("READY", "FAILED", "DRAINING"), "READY": ("DRAINING",), "FAILED": ("DRAINING",), "DRAINING": ()}

# The ring is fixed when the lane is made; it leaves room for raising job_queue_size while running.
RING_CAPACITY_MIN = 4096
# Slack of the run limit: a lane looks this often for requests that are over their time.
SWEEP_INTERVAL_S = 0.1


@dataclass
class Settings:
    """What can be changed while the model runs. Times in the unit of the name."""

    workers_min: int
    workers_max: int
    batch_size: int
    max_batch_delay_ms: int
    min_batch: int
    response_timeout_s: int
    startup_timeout_s: int
    queue_size: int
    client_timeout_ms: int = 0


# Management parameter -> attribute of Settings.
PARAMETERS = {
    "batch_size": "batch_size",
    "max_batch_delay": "max_batch_delay_ms",
    "min_batch": "min_batch",
    "response_timeout": "response_timeout_s",
    "startup_timeout": "startup_timeout_s",
    "job_queue_size": "queue_size",
}


@dataclass
class WorkerRow:
    """One worker as the management API shows it."""

    id: str
    start_time: datetime
    status: str
    memory_usage: int
    pid: int
    gpu: bool
    gpu_usage: str


@dataclass
class Services:
    """What every model of a server shares."""

    config: Config
    engine: Engine
    metrics: Metrics
    preprocess_pool: Executor
    cpu_budget: int
    with_full_detail: bool  # exception texts may leave the server


class Model:
    """One version.

    Attributes:
        url: the archive's file name.
        state: a key of STATES.
        error: why it FAILED.
    """

    def __init__(
        self, services: Services, archive: Archive, *, name: str, url: str, settings: Settings, device: str,
        handler_name: str | None = None, loaded_at_startup: bool = False,
    ):  # fmt: skip
        # Constant.
        self.name = name
        self.version = archive.manifest.model_version
        self.url = url
        self.runtime = archive.manifest.runtime
        self.archive = archive
        self.handler_name = handler_name
        self.device = device
        self.lane = "native"
        self.loaded_at_startup = loaded_at_startup
        self._services = services
        self._loop = asyncio.get_running_loop()
        # Changes while it runs.
        self.settings = settings
        self.state = "LOADING"
        self.error = ""
        self._network: Network | None = None
        self._lane: Any = None
        self._worker_started: dict[int, datetime] = {}
        self._pending: dict[Pending, None] = {}  # in order of arrival
        self._preparing = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._scaling = asyncio.Lock()
        self._scaling_tasks: set[asyncio.Task[int]] = set()
        self.wanted_workers = settings.workers_min

    # --- life -----------------------------------------------------------------------------------------------------

    async def load(self, workers: int, progress: Progress, tracing: Tracing | None = None) -> None:
        """Loads the network and starts ``workers`` workers; returns when they are warm.

        Raises:
            ServeError: it cannot be served; the state is FAILED then and ``error`` says why.
        """
        services = self._services
        try:
            self._network = await asyncio.to_thread(
                load_network,
                self.archive,
                name=self.name,
                handler_name=self.handler_name,
                device=self.device,
                batch_size=self.settings.batch_size,
                cpu_budget=services.cpu_budget,
                limit_max_image_pixels=services.config.limit_max_image_pixels,
                startup_timeout_s=self.settings.startup_timeout_s,
                progress=progress,
                tracing=tracing,
            )
            capacity = max(RING_CAPACITY_MIN, 4 * self.settings.queue_size)
            self._lane = services.engine.add_lane(
                self._network.torch_model, self._network.example, 1 << (capacity - 1).bit_length()
            )
            self._apply_limits()
            if workers:
                progress(f"warming up {workers} worker{'s' if workers > 1 else ''}")
            await self.scale(workers, max(workers, self.settings.workers_max))
        except Exception as error:
            await self._fail(error)
            raise
        self._move("READY")

    async def _fail(self, error: Exception) -> None:
        if not isinstance(error, ServeError):
            log.exception("loading %s %s failed", self.name, self.version)
        self.error = str(error.detail.get("text", error.message)) if isinstance(error, ServeError) else repr(error)
        if self.state == "LOADING":
            self._move("FAILED")
        await self._close_lane()

    async def drain(self) -> None:
        """Finishes what was admitted, then stops the workers and lets go of the weights. Takes no more requests."""
        if self.state != "DRAINING":
            self._move("DRAINING")
        while self._pending and self._lane is not None and self._has_workers():
            await asyncio.sleep(0.01)
        self.answer_all_draining()
        await self._close_lane()
        self._network = None
        self.archive.close()

    def answer_all_draining(self) -> None:
        """Answers every admitted request with 503; nothing waits for the model any more."""
        for pending in list(self._pending):
            self._stop_running(pending)
            pending.answer(self.error_answer(pending.exchange, self._refusal("draining")))

    async def _close_lane(self) -> None:
        lane, self._lane = self._lane, None
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        if lane is not None:
            lane.close()
            self._services.engine.forget_lane(lane)
            await asyncio.to_thread(lane.join)

    def _move(self, state: str) -> None:
        if state not in STATES[self.state]:
            raise RuntimeError(f"{self.name} {self.version}: {self.state} cannot become {state}")
        self.state = state

    # --- settings -------------------------------------------------------------------------------------------------

    async def scale(self, workers_min: int, workers_max: int) -> int:
        """Brings the number of workers into [workers_min, workers_max]; returns how many are ready.

        Raises:
            ModelLoadError: a worker cannot be started.
        """
        async with self._scaling:
            lane = self._open_lane()
            current = sum(1 for row in lane.workers() if row["state"] in ("starting", "warming", "ready"))
            wanted = min(max(current, workers_min), max(workers_min, workers_max))
            self.settings.workers_min, self.settings.workers_max = workers_min, workers_max
            if not self.is_on_gpu:
                self._services.engine.share_cpus(lane, wanted)
            self._apply_limits()
            self.wanted_workers = wanted
            lane.set_workers(wanted)
            for row in lane.workers():
                self._worker_started.setdefault(row["id"], datetime.now())
            failed = await self._settled(lane)
            if failed:
                lane.set_workers(min(current, wanted))
                raise ModelLoadError(
                    f"Failed to start workers for model {self.name} version: {self.version}", detail={"text": failed}
                )
            return wanted

    def start_scaling(self, workers_min: int, workers_max: int) -> None:
        """`scale` without waiting; a failure is logged."""
        task = self._loop.create_task(self.scale(workers_min, workers_max))
        self._scaling_tasks.add(task)

        def done(finished: asyncio.Task[int]) -> None:
            self._scaling_tasks.discard(finished)
            if not finished.cancelled() and finished.exception() is not None:
                log.error("scaling %s %s failed: %s", self.name, self.version, finished.exception())

        task.add_done_callback(done)

    async def _settled(self, lane: Any) -> str:
        """Waits until every worker is ready or gone. Returns the text of one that failed, if any."""

        def is_settled() -> bool:
            lane.reap()
            return all(row["state"] in ("ready", "failed") for row in lane.workers())

        try:
            timeout_s = self.settings.startup_timeout_s
            await asyncio.wait_for(self._services.engine.wait_for_workers(is_settled), timeout_s)
        except TimeoutError:
            return f"a worker was not ready within startup_timeout={self.settings.startup_timeout_s} s"
        return next((str(row["error"]) for row in lane.workers() if row["state"] == "failed"), "")

    def configure(self, changes: dict[str, int]) -> dict[str, tuple[int, int]]:
        """Applies ``changes`` (keys of PARAMETERS) between two batches. Returns old and new value of each.

        Raises:
            BadRequestError: a value is out of range; nothing was changed.
        """
        wanted = {
            PARAMETERS[name]: validate_setting(PARAMETERS[name], value, label=name, error=BadRequestError)
            for name, value in changes.items()
        }
        batch_size = wanted.get("batch_size", self.settings.batch_size)
        min_batch = wanted.get("min_batch", self.settings.min_batch)
        if min_batch > batch_size:
            raise BadRequestError(f"min_batch ({min_batch}) must not be larger than batch_size ({batch_size})")
        capacity = self._lane.capacity if self._lane is not None else RING_CAPACITY_MIN
        if wanted.get("queue_size", 0) > capacity:
            raise BadRequestError(
                f"job_queue_size can be raised to {capacity} while the model runs; for more, unregister it and set "
                "jobQueueSize in its model-config.yaml"
            )
        changed = {name: (getattr(self.settings, PARAMETERS[name]), value) for name, value in changes.items()}
        for attribute, value in wanted.items():
            setattr(self.settings, attribute, value)
        if self._network is not None:
            self._network.context.system_properties["batch_size"] = self.settings.batch_size
        self._apply_limits()
        return changed

    def _apply_limits(self) -> None:
        if self._lane is None:
            return
        self._lane.set_limits(
            batch_size_max=self.settings.batch_size,
            batch_size_min=self.settings.min_batch,
            batch_delay_max_ns=self.settings.max_batch_delay_ms * 1_000_000,
            running_max=len(self._lane.workers()) + 1 if self.is_on_gpu else self._services.engine.running_max,
        )

    # --- a request ------------------------------------------------------------------------------------------------

    def predict(
        self, exchange: Exchange, url_version: str = "default", extra_headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Admits the request and sees to its answer. Never raises for a reason of the request's.

        Args:
            url_version: the version as in the URL, for the metrics.
            extra_headers: what handlers see besides the client's headers.
        """
        pending = Pending(self, exchange, url_version)
        self._pending[pending] = None
        refusal = self._admit()
        if refusal is not None:
            self._services.metrics.observe_rejection(self.name, str(refusal.detail["reason"]))
            pending.answer(self.error_answer(exchange, refusal))
            return
        exchange.request.headers.extend(extra_headers)
        exchange.on_disconnect = lambda: self._cancel(pending)
        self._start_sweep()
        handler = self._loaded().handler
        if handler.is_quick(len(exchange.request.body)):
            self._submit(pending, self._prepare(pending))
            return
        self._preparing += 1
        future = self._services.preprocess_pool.submit(self._prepare, pending)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._prepared, pending, done))

    def _admit(self) -> OverloadedError | None:
        """The one bound: what may wait, plus what idle workers will take at once."""
        if self.state == "DRAINING":
            return self._refusal("draining")
        if self._lane is None or not self._has_workers():
            return self._refusal("no worker")
        lane = self._lane
        if self._preparing + lane.queue_size < self._waiting_max():
            return None
        lane.purge()  # requests whose clients have gone make room
        if self._preparing + lane.queue_size < self._waiting_max():
            return None
        return self._refusal("queue full")

    def _waiting_max(self) -> int:
        lane = self._lane
        able = min(self._ready_count(), self._services.engine.running_max if not self.is_on_gpu else 1 << 30)
        return self.settings.queue_size + max(0, able - lane.running) * self.settings.batch_size

    def _prepare(self, pending: Pending) -> torch.Tensor | ServeError:
        """Body to input tensor. Any thread."""
        try:
            row = codec.decode_request(
                pending.exchange.request, decode=self._services.config.decode_input_request
            )
            return self._loaded().handler.preprocess([row])
        except ServeError as error:
            return error
        except Exception as error:
            return self._handler_error(error, "preprocess", pending.exchange.request.id)

    def _prepared(self, pending: Pending, future: Future[torch.Tensor | ServeError]) -> None:
        self._preparing -= 1
        self._submit(pending, future.result())

    def _submit(self, pending: Pending, prepared: torch.Tensor | ServeError) -> None:
        if pending.stage == OVER:
            return  # expired or hung up meanwhile
        if isinstance(prepared, ServeError):
            pending.answer(self.error_answer(pending.exchange, prepared))
            return
        lane = self._lane
        if lane is None:
            pending.answer(self.error_answer(pending.exchange, self._refusal("draining")))
            return
        try:
            deadline = pending.arrived_at + int(self._queue_limit_s() * 1e9)
            pending.ticket = lane.submit(pending, prepared, pending.arrived_at, deadline)
            pending.stage = SUBMITTED
        except OverflowError:
            pending.answer(self.error_answer(pending.exchange, self._refusal("queue full")))
        except ValueError as error:
            failure = HandlerError("Prediction failed", detail={"text": f"preprocess: {error}"})
            pending.answer(self.error_answer(pending.exchange, failure))

    def complete(self, completion: Any) -> None:
        """A batch came to an end: its rows go to its requests."""
        owners: list[Pending | None] = completion.owners
        for owner in owners:
            if owner is not None:
                owner.started_at = completion.started_at
        if completion.code != "ok":
            self._complete_failed(owners, completion)
            return
        requests = [owner.exchange.request if owner is not None else None for owner in owners]
        network = self._loaded()
        context = network.context.for_batch(
            [request.id if request is not None else "" for request in requests],
            [request.headers if request is not None else () for request in requests],
        )
        try:
            network.handler.context = context
            results = network.handler.postprocess(completion.output)
            self._check_results(results, len(owners))
        except Exception as error:
            self._fail_all(owners, error)
            return
        for index, (owner, result) in enumerate(zip(owners, results, strict=True)):
            if owner is not None:
                owner.answer(self._encode(owner, result, context, index))

    def _encode(self, pending: Pending, result: Any, context: Any, index: int) -> Response:
        try:
            body = codec.encode_result(result)
        except ServeError as error:
            return self.error_answer(pending.exchange, error)
        size_max = self._services.config.max_response_size
        if len(body) > size_max:
            return self.error_answer(pending.exchange, HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={size_max}; raise it in "
                "config.properties"
            ))  # fmt: skip
        status, phrase = context.get_response_status(index)
        headers = dict(context.get_response_headers(index))
        content_type = headers.pop("content-type", None)
        # TorchServe sends an empty phrase when the handler set none, and no content type of its own.
        return Response(status, body, content_type=content_type, reason=phrase or "", headers=headers)

    @staticmethod
    def _check_results(results: Any, count: int) -> None:
        if not isinstance(results, list):
            raise HandlerError(
                "Invalid model predict output",
                detail={"text": f"postprocess returned a {type(results).__name__}, not a list of {count}"},
            )
        if len(results) != count:
            raise HandlerError(
                "number of batch response mismatched",
                detail={"text": f"postprocess returned a list of {len(results)} for a batch of {count}"},
            )

    def _complete_failed(self, owners: list[Pending | None], completion: Any) -> None:
        error: ServeError
        # TorchScript prefixes its own traceback; the last line is what the model said.
        last = (completion.message.strip().splitlines() or ["no text"])[-1]
        if completion.code == "out_of_memory":
            error = OutOfMemoryError("Out of resources", detail={"exception": "OutOfMemoryError", "text": last})
        else:
            error = HandlerError("Prediction failed", detail={"exception": "RuntimeError", "text": last,
                                                              "where": "the model's forward"})  # fmt: skip
        for owner in owners:
            if owner is not None and owner.stage != OVER:
                log.error("request %s failed in %s %s: %s", owner.exchange.request.id, self.name, self.version,
                          completion.message.strip())  # fmt: skip
                owner.answer(self.error_answer(owner.exchange, error))

    def _fail_all(self, owners: list[Pending | None], error: Exception) -> None:
        live = [owner for owner in owners if owner is not None and owner.stage != OVER]
        ids = ", ".join(owner.exchange.request.id for owner in live)
        failure = error if isinstance(error, ServeError) else self._handler_error(error, "postprocess", ids)
        for owner in live:
            owner.answer(self.error_answer(owner.exchange, failure))

    def _handler_error(self, error: Exception, stage: str, request_id: str) -> ServeError:
        if isinstance(error, PredictionException):
            failure = HandlerError(error.message)
            failure.status = error.error_code
            return failure
        log.error("request %s failed in %s of %s %s", request_id, stage, self.name, self.version, exc_info=error)
        detail = {"exception": type(error).__name__, "text": str(error), "where": stage}
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return OutOfMemoryError("Out of resources", detail=detail)
        return HandlerError("Prediction failed", detail=detail)

    # --- the end of a request without a result --------------------------------------------------------------------

    def _cancel(self, pending: Pending) -> None:
        """The client hung up."""
        if pending.stage == OVER:
            return
        self._stop_running(pending)
        pending.stage = OVER
        self._pending.pop(pending, None)
        self._services.metrics.observe_abort(self.name, self.version)

    def _stop_running(self, pending: Pending) -> None:
        if pending.stage == SUBMITTED and self._lane is not None:
            self._lane.cancel(pending.ticket)

    def answer_expired(self, pending: Pending) -> None:
        limit = self._queue_limit_s()
        source = "clientTimeoutInMills" if self.settings.client_timeout_ms else "response_timeout"
        self._services.metrics.observe_rejection(self.name, "expired")
        pending.answer(self.error_answer(pending.exchange, ExpiredError(
            f'Model "{self.name}" did not come to this request in time',
            detail={"reason": "expired", "queued_s": round(pending.age_s(), 3), "limit": f"{source}={limit:g} s"},
            headers={"Retry-After": self._retry_after()},
        )))  # fmt: skip

    def _answer_overrun(self, pending: Pending, started_at: int) -> None:
        queued_s = (started_at - pending.arrived_at) / 1e9
        ran_s = (time.monotonic_ns() - started_at) / 1e9
        pending.answer(self.error_answer(pending.exchange, DeadlineError(
            f"the model did not answer in time: queued {queued_s:.3f} s, ran {ran_s:.3f} s, limit "
            f"response_timeout={self.settings.response_timeout_s} s",
            detail={"reason": "response_timeout"},
        )))  # fmt: skip

    def _queue_limit_s(self) -> float:
        return self.settings.client_timeout_ms / 1e3 or float(self.settings.response_timeout_s)

    def _start_sweep(self) -> None:
        if self._sweep_timer is None:
            self._sweep_timer = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    def _sweep(self) -> None:
        """Answers what is over its time. Nothing younger than the shorter limit can be, so the scan is short."""
        self._sweep_timer = None
        if not self._pending:
            return
        queue_limit_s, run_limit_s = self._queue_limit_s(), float(self.settings.response_timeout_s)
        now = time.monotonic_ns()
        for pending in list(self._pending):
            if (now - pending.arrived_at) / 1e9 < min(queue_limit_s, run_limit_s):
                break
            started_at = self._started_at(pending)
            if started_at > 0 and (now - started_at) / 1e9 >= run_limit_s:
                self._stop_running(pending)
                self._answer_overrun(pending, started_at)
            elif started_at == 0 and (now - pending.arrived_at) / 1e9 >= queue_limit_s:
                self._stop_running(pending)
                self.answer_expired(pending)
        self._start_sweep()

    def _started_at(self, pending: Pending) -> int:
        """ns; 0 while it waits, -1 when its completion is on the way."""
        if pending.stage == PREPARING or self._lane is None:
            return 0
        return int(self._lane.started_at(pending.ticket))

    def forget(self, pending: Pending, status: int) -> None:
        """Called by a request as it is answered."""
        self._pending.pop(pending, None)
        self._services.metrics.observe_request(
            self.name, self.version, status, pending.age_s(), queue_s=pending.queue_s(), url_version=pending.url_version
        )

    # --- what others ask ------------------------------------------------------------------------------------------

    def error_answer(self, exchange: Exchange, error: ServeError) -> Response:
        """The answer for ``error``; on a public address without the texts of exceptions."""
        detail = error.detail
        if not self._services.with_full_detail:
            detail = {key: value for key, value in detail.items() if key not in ("text", "exception", "where")}
        shown = type(error)(error.message, detail=detail, headers=error.headers)
        shown.status = error.status
        strict = self._services.config.compat == "strict"
        return error_response(shown, exchange.request.id, with_detail=not strict)

    def _refusal(self, reason: str) -> OverloadedError:
        settings = self.settings
        detail: dict[str, Any] = {"reason": reason}
        if reason == "queue full":
            detail |= {"waiting": self._preparing + self._lane.queue_size, "job_queue_size": settings.queue_size,
                       "workers": self._ready_count()}  # fmt: skip
        elif reason == "no worker":
            detail["mend"] = (
                self.error or f'curl -X PUT "{self._services.config.management_address}/models/{self.name}?min_worker=1"'
            )
        return OverloadedError(
            f'Model "{self.name}" has no worker to serve inference request. '
            "Please use scale workers API to add workers.",
            detail=detail,
            headers={"Retry-After": self._retry_after()},
        )

    def _retry_after(self) -> str:
        # Spread over a few seconds, so that refused clients do not come back together.
        return str(1 + time.monotonic_ns() % 3)

    def _loaded(self) -> Network:
        if self._network is None:
            raise OverloadedError(f"{self.name} is not loaded", detail={"reason": "no worker"})
        return self._network

    def _open_lane(self) -> Any:
        if self._lane is None:
            raise ModelLoadError(
                f"Failed to start workers for model {self.name} version: {self.version}",
                detail={"text": self.error or "it is being unregistered"},
            )
        return self._lane

    def _ready_count(self) -> int:
        if self._lane is None:
            return 0
        return sum(1 for row in self._lane.workers() if row["state"] == "ready")

    def _has_workers(self) -> bool:
        return self._ready_count() > 0

    @property
    def workers_min(self) -> int:
        return self.settings.workers_min

    @property
    def workers_max(self) -> int:
        return self.settings.workers_max

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size

    @property
    def max_batch_delay_ms(self) -> int:
        return self.settings.max_batch_delay_ms

    @property
    def min_batch(self) -> int:
        return self.settings.min_batch

    @property
    def response_timeout_s(self) -> int:
        return self.settings.response_timeout_s

    @property
    def startup_timeout_s(self) -> int:
        return self.settings.startup_timeout_s

    @property
    def queue_size_max(self) -> int:
        return self.settings.queue_size

    @property
    def device_type(self) -> str:
        return "gpu" if self.is_on_gpu else "cpu"

    @property
    def device_ids(self) -> list[int] | None:
        return self.archive.config.device_ids

    @property
    def is_on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def has_ready_worker(self) -> bool:
        return self.state == "READY" and self._has_workers()

    def worker_rows(self) -> list[WorkerRow]:
        rows = self._lane.workers() if self._lane is not None else []
        memory = resident_size()
        return [
            WorkerRow(
                id=str(row["id"]),
                start_time=self._worker_started.get(row["id"], datetime.now()),
                status="READY" if row["state"] == "ready" else "UNLOADING",
                memory_usage=memory,
                pid=os.getpid(),
                gpu=self.is_on_gpu,
                gpu_usage="N/A",
            )
            for row in rows
        ]

    def queue_status(self) -> tuple[int, int]:
        """(remaining capacity, waiting requests)."""
        waiting = self._preparing + (self._lane.queue_size if self._lane is not None else 0)
        return max(0, self.settings.queue_size - waiting), waiting

    def stats(self) -> dict[str, Any]:
        """The native counters and histograms; empty while there is no lane."""
        if self._lane is None:
            return {}
        return {**self._lane.stats(), "running": self._lane.running, "queue_size": self.queue_status()[1]}

    def sample_body(self) -> str:
        """Arguments of a curl call that sends something this model understands."""
        if self._network is not None and hasattr(self._network.handler, "sample_body"):
            return str(self._network.handler.sample_body())
        return "-T your-input"

    @property
    def requests_in_flight(self) -> int:
        return len(self._pending)

    @property
    def weights_size(self) -> int:
        return int(self._network.torch_model.weights_size) if self._network is not None else 0

    @property
    def precision(self) -> str:
        return self.archive.config.precision or "fp32"


def resident_size() -> int:
    """Bytes of this process's memory that are in RAM."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


