"""The native lane of one model, seen from the event loop: a request's way in, and its answer's way out.

    admission ──> preprocess ──> engine ──> postprocess ──> answer
    (here)        (pool, or      (C++)      (here, once
                  here if quick)            per batch)

Loop thread only, but for `_prepare`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Future
from typing import Any

import torch

from pyserve import codec
from pyserve.errors import (
    DeadlineError,
    ExpiredError,
    HandlerError,
    InputError,
    JsonObject,
    OutOfMemoryError,
    OverloadedError,
    ServeError,
    ServerError,
)  # fmt: skip
from pyserve.handler import PredictionException
from pyserve.loader import Network
from pyserve.messages import Response
from pyserve.model_settings import ModelSettings
from pyserve.pending import OVER, PREPARING, SUBMITTED, Pending
from pyserve.services import Services

log = logging.getLogger(__name__)

# The ring is fixed when the lane is made; it leaves room for raising job_queue_size while running.
RING_CAPACITY_MIN = 4096
# Slack of the time limits: how often the lane looks for requests that are over them.
SWEEP_INTERVAL_S = 0.1


class NativeLane:
    """Requests of one model between admission and answer.

    Args:
        label: ``name version``, for the log.
        settings: the model's; read at each use, so that changes hold at once.
    """

    def __init__(self, services: Services, name: str, label: str, network: Network, settings: ModelSettings):
        # Constant.
        self.network = network
        self._services = services
        self._name = name
        self._label = label
        self._is_strict = services.config.compat == "strict"
        self._loop = asyncio.get_running_loop()
        capacity = max(RING_CAPACITY_MIN, 4 * settings.queue_size)
        self.core = services.engine.add_lane(network.torch_model, network.example, 1 << (capacity - 1).bit_length())
        # Changes while it runs.
        self.settings = settings
        self._pending: dict[Pending, None] = {}  # in order of arrival
        self._preparing_count = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.apply_limits()

    # --- workers and settings -------------------------------------------------------------------------------------

    @property
    def is_on_gpu(self) -> bool:
        return self.network.device != "cpu"

    @property
    def ready_count(self) -> int:
        """Workers that take batches now."""
        return int(self.core.ready_count)

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return sum(1 for row in self.core.workers() if row["state"] in ("starting", "warming", "ready"))

    def set_workers(self, count: int) -> None:
        if not self.is_on_gpu:
            self._services.engine.share_cpus(self.core, count)
        self.apply_limits()
        self.core.set_workers(count)

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""

        def is_settled() -> bool:
            self.core.reap()
            return all(row["state"] in ("ready", "failed") for row in self.core.workers())

        try:
            await asyncio.wait_for(self._services.engine.wait_for_workers(is_settled), timeout_s)
        except TimeoutError:
            # One that is stopping finishes its batch first, however long that takes; that is no failure.
            if any(row["state"] in ("starting", "warming") for row in self.core.workers()):
                return f"a worker was not ready within startup_timeout={timeout_s:g} s"
        return next((str(row["error"]) for row in self.core.workers() if row["state"] == "failed"), "")

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        self.core.set_limits(
            batch_size_max=self.settings.batch_size,
            batch_size_min=self.settings.min_batch,
            batch_delay_max_ns=self.settings.max_batch_delay_ms * 1_000_000,
            running_max=self._running_max(),
        )
        self.network.context.system_properties["batch_size"] = self.settings.batch_size

    def _running_max(self) -> int:
        # A GPU has a queue of its own; on a CPU more batches than cores only take turns.
        return (1 << 31) if self.is_on_gpu else self._services.engine.running_max

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        self._is_draining = True
        if self.ready_count:
            await self._idle.wait()
        self.answer_all(self.refusal("draining"))
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        self.core.close()
        self._services.engine.forget_lane(self.core)
        self.core.set_workers(0)
        await self._services.engine.wait_for_workers(
            lambda: all(row["state"] in ("stopped", "failed") for row in self.core.workers())
        )
        self.core.join()  # at once: their threads have ended

    # --- the way in -----------------------------------------------------------------------------------------------

    def predict(self, pending: Pending) -> None:
        """Admits the request and sees to its answer. Raises nothing that is the request's fault."""
        refusal = self._admit()
        if refusal is not None:
            self._services.metrics.observe_rejection(self._name, refusal.detail["reason"])
            self._answer_error(pending, refusal)
            return
        self._pending[pending] = None
        self._idle.clear()
        pending.exchange.on_disconnect = lambda: self._cancel(pending)
        self._start_sweep()
        if self.network.handler.is_quick(len(pending.exchange.request.body)):
            self._submit(pending, self._prepare(pending))
            return
        self._preparing_count += 1
        future = self._services.preprocess_pool.submit(self._prepare, pending)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._prepared, pending, done))

    def _admit(self) -> OverloadedError | None:
        """The one bound, before any work: what may wait, plus what idle workers will take at once."""
        if self._is_draining:
            return self.refusal("draining")
        if not self.ready_count:
            return self.refusal("no worker")
        if self._has_room():
            return None
        self.core.purge()  # requests whose clients have gone make room
        return None if self._has_room() else self.refusal("queue full")

    def _has_room(self) -> bool:
        waiting = self.waiting_count
        return waiting < self.settings.queue_size or waiting < self._waiting_max()

    @property
    def waiting_count(self) -> int:
        return self._preparing_count + int(self.core.queue_size)

    def _waiting_max(self) -> int:
        # The engine counts a batch as running before it takes it from the queue, so a request is never missed.
        idle = min(self.ready_count, self._running_max()) - self.core.running
        return self.settings.queue_size + max(0, idle) * self.settings.batch_size

    def _prepare(self, pending: Pending) -> torch.Tensor | ServeError:
        """Body to input tensor. Any thread."""
        request = pending.exchange.request
        try:
            row = codec.decode_request(request, decode=self._services.config.decode_input_request)
            return self.network.handler.preprocess([row])
        except ServeError as error:
            return error
        except Exception as error:
            return self._handler_error(error, "preprocess", request.id)

    def _prepared(self, pending: Pending, future: Future[torch.Tensor | ServeError]) -> None:
        self._preparing_count -= 1
        self._submit(pending, future.result())

    def _submit(self, pending: Pending, prepared: torch.Tensor | ServeError) -> None:
        if pending.stage == OVER:
            return  # expired or hung up meanwhile
        if isinstance(prepared, ServeError):
            if self._is_strict and isinstance(prepared, InputError):
                prepared = HandlerError("Prediction failed")  # TorchServe's answer to any exception of a handler
            self._answer_error(pending, prepared)
            return
        deadline = pending.arrived_at + int(self.settings.queue_limit_s * 1e9)
        try:
            pending.ticket = self.core.submit(pending, prepared, pending.arrived_at, deadline)
            pending.stage = SUBMITTED
        except OverflowError:
            self._answer_error(pending, self.refusal("queue full"))
        except (TypeError, ValueError) as error:
            self._answer_error(pending, self._handler_error(error, "preprocess", pending.exchange.request.id))

    # --- the way out ----------------------------------------------------------------------------------------------

    def complete(self, completion: Any) -> None:
        """A batch came to an end: row i of its output goes to request i."""
        owners: list[Pending | None] = completion.owners
        for owner in owners:
            if owner is not None:
                owner.started_at = completion.started_at
        if completion.code != "ok":
            self._complete_failed(owners, completion)
            return
        requests = [owner.exchange.request if owner is not None else None for owner in owners]
        context = self.network.context.for_batch(
            [request.id if request is not None else "" for request in requests],
            [request.headers if request is not None else () for request in requests],
        )
        handler = self.network.handler
        try:
            handler.context = context
            results = handler.postprocess(completion.output)
            _check_results(results, len(owners))
        except Exception as error:
            self._complete_failed_postprocess(owners, error)
            return
        for index, (owner, result) in enumerate(zip(owners, results, strict=True)):
            if owner is None:
                continue
            try:
                self._answer(owner, self._response(result, context, index))
            except Exception as error:
                # The others' answers are not touched by this one's.
                self._complete_failed_postprocess([owner], error)

    def _response(self, result: Any, context: Any, index: int) -> Response:
        body = codec.encode_result(result)
        size_max = self._services.config.max_response_size
        if len(body) > size_max:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={size_max}; "
                "raise it in config.properties"
            )
        status, phrase = context.get_response_status(index)
        headers = dict(context.get_response_headers(index))
        content_type = headers.pop("content-type", None)
        # TorchServe sends an empty phrase when the handler set none, and no content type of its own.
        return Response(status, body, content_type=content_type, reason=phrase or "", headers=headers)

    def _complete_failed(self, owners: list[Pending | None], completion: Any) -> None:
        # TorchScript puts its own traceback first; the last line is what the model said.
        last = (completion.message.strip().splitlines() or ["no text"])[-1]
        error: ServeError
        if completion.code == "out_of_memory":
            error = OutOfMemoryError("Out of resources", detail={"exception": "OutOfMemoryError", "text": last})
        else:
            detail = {"exception": "RuntimeError", "text": last, "where": "the model's forward"}
            error = HandlerError("Prediction failed", detail=detail)
        live = _live(owners)
        if live:
            log.error("request %s failed in %s: %s", _ids(live), self._label, completion.message.strip())
        for owner in live:
            self._answer_error(owner, error)

    def _complete_failed_postprocess(self, owners: list[Pending | None], error: Exception) -> None:
        live = _live(owners)
        failure = error if isinstance(error, ServeError) else self._handler_error(error, "postprocess", _ids(live))
        for owner in live:
            self._answer_error(owner, failure)

    def _handler_error(self, error: Exception, stage: str, request_ids: str) -> ServeError:
        if isinstance(error, PredictionException):
            failure = HandlerError(error.message)
            failure.status = error.error_code
            return failure
        log.error("request %s failed in %s of %s", request_ids, stage, self._label, exc_info=error)
        detail = {"exception": type(error).__name__, "text": str(error), "where": stage}
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return OutOfMemoryError("Out of resources", detail=detail)
        return HandlerError("Prediction failed", detail=detail)

    # --- the end of a request -------------------------------------------------------------------------------------

    def _answer(self, pending: Pending, response: Response) -> None:
        """Sends the answer, if none was sent yet."""
        if pending.stage == OVER:
            return
        self._forget(pending)
        self._services.metrics.observe_request(
            self._name,
            pending.version,
            response.status,
            pending.age_s(),
            queue_s=pending.queue_s(),
            url_version=pending.url_version,
        )
        pending.exchange.respond(response)

    def _answer_error(self, pending: Pending, error: ServeError) -> None:
        self._answer(pending, self._services.error_format.response(error, pending.exchange.request.id))

    def answer_all(self, error: ServeError) -> None:
        """Answers every admitted request with ``error``; what is running is dropped when it is done."""
        for pending in list(self._pending):
            self._drop(pending)
            self._answer_error(pending, error)

    def _cancel(self, pending: Pending) -> None:
        """The client hung up."""
        if pending.stage != OVER:
            self._drop(pending)
            self._forget(pending)
            self._services.metrics.observe_abort(self._name, pending.version)

    def _forget(self, pending: Pending) -> None:
        pending.stage = OVER
        self._pending.pop(pending, None)
        if not self._pending:
            self._idle.set()

    def _drop(self, pending: Pending) -> None:
        """Keeps it from running, or its result from being used."""
        if pending.stage == SUBMITTED:
            self.core.cancel(pending.ticket)

    def expire(self, pending: Pending) -> None:
        """It waited past its time and was dropped from the queue."""
        if pending.stage == OVER:
            return
        self._services.metrics.observe_rejection(self._name, "expired")
        limit = f"{self.settings.queue_limit_source}={self.settings.queue_limit_s:g} s"
        error = ExpiredError(
            f'Model "{self._name}" did not come to this request in time',
            detail={"reason": "expired", "queued_s": round(pending.age_s(), 3), "limit": limit},
            headers={"Retry-After": _retry_after()},
        )
        self._answer_error(pending, error)

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
            error = ServerError("Worker died.")
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
            age_s = (now - pending.arrived_at) / 1e9
            if age_s < min(queue_limit_s, run_limit_s):
                break
            started_at = self.core.started_at(pending.ticket) if pending.stage != PREPARING else 0
            if started_at > 0 and (now - started_at) / 1e9 >= run_limit_s:
                self._drop(pending)
                self._overrun(pending, started_at)
            elif started_at == 0 and age_s >= queue_limit_s:
                self._drop(pending)
                self.expire(pending)
        if self._pending:
            self._start_sweep()

    # --- what others ask ------------------------------------------------------------------------------------------

    def refusal(self, reason: str) -> OverloadedError:
        """Why a request is not admitted: TorchServe's one message, and a ``detail`` that tells the causes apart."""
        detail: JsonObject = {"reason": reason}
        if reason == "queue full":
            detail["waiting"] = self.waiting_count
            detail["job_queue_size"] = self.settings.queue_size
            detail["workers"] = self.ready_count
            detail["mend"] = f"retry later, or raise job_queue_size: PUT /models/{self._name}?job_queue_size=N"
        return no_worker_error(self._name, detail)

    @property
    def in_flight_count(self) -> int:
        return len(self._pending)

    def stats(self) -> JsonObject:
        """The native counters and histograms, plus ``running`` batches and the ``queue_size``."""
        return {**self.core.stats(), "running": self.core.running, "queue_size": self.waiting_count}


def no_worker_error(name: str, detail: JsonObject) -> OverloadedError:
    """TorchServe's one text for every reason not to admit a request."""
    detail.setdefault("mend", f"PUT /models/{name}?min_worker=1 on the management address")
    return OverloadedError(
        f'Model "{name}" has no worker to serve inference request. Please use scale workers API to add workers.',
        detail=detail,
        headers={"Retry-After": _retry_after()},
    )


def _retry_after() -> str:
    # Spread over a few seconds, so that refused clients do not come back together.
    return str(1 + time.monotonic_ns() % 3)


def _live(owners: list[Pending | None]) -> list[Pending]:
    return [owner for owner in owners if owner is not None and owner.stage != OVER]


def _ids(pendings: list[Pending]) -> str:
    return ", ".join(pending.exchange.request.id for pending in pendings)


def _check_results(results: Any, count: int) -> None:
    if not isinstance(results, list):
        text = f"postprocess returned a {type(results).__name__}, not a list of {count}"
        raise HandlerError("Invalid model predict output", detail={"text": text})
    if len(results) != count:
        text = f"postprocess returned a list of {len(results)} for a batch of {count}"
        raise HandlerError("number of batch response mismatched", detail={"text": text})
