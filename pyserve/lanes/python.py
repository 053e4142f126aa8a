"""The python lane of one model: requests go to worker processes that call the archive's own handler.

    admission ──────> engine ──> worker process ──> answer
    (engine_lane)     (C++)      (decodes, calls,   (here)
                                  encodes)

The server does not look into bodies: what a request holds and what an answer says is made in the worker.

Loop thread only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from pyserve.errors import HandlerError, JsonObject, OverloadedError, ServeError
from pyserve.lanes.engine_lane import EngineLane, live, request_ids, ring_capacity
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.lanes.refusals import down_error, worker_died_error
from pyserve.lanes.reruns import OVERRUN, RERUN, GroupNumbers, death_detail
from pyserve.lanes.resources import Services
from pyserve.lanes.restart_policy import RETRY_DEFAULT_S
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_rows import READY as ROW_READY
from pyserve.lanes.worker_rows import UNLOADING, WorkerRow
from pyserve.lanes.worker_slot import IDLE, READY, Condition
from pyserve.lanes.workers import PythonWorkers, Renew
from pyserve.request.messages import Response
from pyserve.request.stages import TIMED
from pyserve.worker.spec import BATCH, WorkerSpec

log = logging.getLogger(__name__)

# Kinds of answers, csrc/frame.h.
ANSWER, ERROR, CHUNK, LAST = range(4)
# Flag of items; others are codec.FIELDS and stages.TIMED.
DESCRIBE = 1
# How long a handler call may go on after it was asked to end.
INTERRUPT_GRACE_S = 1.0
_NO_LIMIT = 1 << 31


class PythonLane(EngineLane):
    """Requests of one model between admission and answer; a handler runs in worker processes.

    Args:
        spec: what workers are started with.
        device_ids: GPUs to give to workers in turn; empty on a CPU.
        interpreter: of the workers; None for the server's own.
        worker_number: of the first worker.
        on_condition: told how its workers are, at every change.
        renew, retry_s: see `PythonWorkers`.
    """

    def __init__(
        self, services: Services, spec: WorkerSpec, label: str, settings: ModelSettings, *,
        device_ids: list[int] | None = None, interpreter: str | None = None, worker_number: int = 0,
        on_condition: Callable[[Condition], None] = lambda condition: None, renew: Renew | None = None,
        retry_s: float = RETRY_DEFAULT_S,
    ):  # fmt: skip
        core = services.engine.add_process_lane(ring_capacity(settings))
        super().__init__(services, spec.name, label, core, settings)
        self.spec = spec
        self._is_multiplexed = spec.mode != BATCH
        self._has_side_effects = False  # as the handler says
        self._groups = GroupNumbers()
        self._noted_at = 0  # when the last batch began that was counted
        self._warm_up: JsonObject = {}
        self._raised_batch_note = ""  # the note once the batch size is raised above 1
        self.worker_log = self.new_worker_log(worker_number)
        self._tell_condition = on_condition
        self.workers = PythonWorkers(
            services,
            core,
            spec,
            settings,
            label=label,
            worker_log=self.worker_log,
            device_ids=device_ids or [],
            interpreter=interpreter,
            on_event=self._on_event,
            on_condition=self._on_condition,
            on_loaded=self._on_loaded,
            renew=renew,
            retry_s=retry_s,
        )
        self.apply_limits()

    # --- workers and settings -------------------------------------------------------------------------------------

    @property
    def is_on_gpu(self) -> bool:
        return self.spec.gpu_id is not None

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return self.workers.wanted_count

    @property
    def may_take(self) -> bool:
        """A worker is being started, or started again: requests wait for it."""
        return self.condition.may_take

    @property
    def condition(self) -> Condition:
        """How its workers are, all in all."""
        return self.workers.condition

    @property
    def running_max(self) -> int:
        """No limit: how many processes share the CPUs is up to the operator who asked for as many workers."""
        return _NO_LIMIT

    def set_workers(self, count: int) -> None:
        if not self.is_on_gpu:
            self.services.engine.share_cpus(self.core, count)
        self.apply_limits()
        self.workers.set_count(count)

    def worker_rows(self) -> list[WorkerRow]:
        """The worker processes, as the management API shows them."""
        return [
            WorkerRow(
                id=str(self.worker_log.id(slot.index)),
                start_time=slot.started_at,
                status=ROW_READY if slot.state == READY else UNLOADING,
                memory_usage=slot.handle.memory_usage() if slot.handle is not None else 0,
                pid=slot.handle.pid if slot.handle is not None else -1,
                gpu=self.is_on_gpu,
                gpu_id=self.workers.gpu_id_of(slot),
            )
            for slot in self.workers.slots()
        ]

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""
        return await self.workers.settled(timeout_s)

    @property
    def failure(self) -> ServeError | None:
        """The error of a worker that could not be started, if it is known in full."""
        return self.workers.failure

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        await self.finish_requests()
        self.services.engine.forget_lane(self.core)
        self._sweep.start(self)  # a call that nobody waits for any more still has its limit
        try:
            await self.workers.close()
        finally:
            self._sweep.stop()
        self.core.join()

    def look_after_workers(self, now: int) -> bool:
        """Ends handler calls that run past the limit, also those whose requests nobody waits for any more."""
        limit_ns = self.settings.response_timeout_s * 1_000_000_000
        grace_ns = int(INTERRUPT_GRACE_S * 1e9)
        for row in self.core.workers():
            if not row["running_since"]:
                continue
            over_ns = now - row["running_since"] - limit_ns
            if over_ns >= grace_ns:
                self.workers.kill(row["id"], f"a call of its handler did not end {INTERRUPT_GRACE_S:g} s after "
                                             f"response_timeout={self.settings.response_timeout_s} s")  # fmt: skip
            elif over_ns >= 0:
                self.workers.interrupt(row["id"], row["batches"])
        return bool(self.core.running) or any(row["running_since"] for row in self.core.workers())

    def refusal(self, reason: str) -> OverloadedError:
        """As of every lane; without a worker the reason why there is none."""
        condition = self.condition
        if reason != "no worker" or not condition.error:
            return super().refusal(reason)
        return down_error(self.name, condition.error, condition.failure,
                          condition.retry_after_s if condition.recovers else None)  # fmt: skip

    def _on_condition(self, condition: Condition) -> None:
        """Answers at once whoever waits for a worker that does not come soon."""
        if not (condition.may_take or self.ready_count) and self.in_flight:
            if condition.state == IDLE:
                self.answer_waiting(self.refusal("no worker"))
            else:
                self.answer_all(self.refusal("no worker"))
        self._tell_condition(condition)

    def _on_loaded(self, event: JsonObject) -> None:
        """A worker is about to take batches; it has tried what they do to answers, if it is among the first."""
        if event.get("has_side_effects") is True:
            self._has_side_effects = True
        found = event.get("batch")
        if isinstance(found, dict) and isinstance(found.get("warm_up"), dict) and found["warm_up"]:
            self._warm_up = found["warm_up"]
        if not isinstance(found, dict) or not found.get("probe") or self.batch_note:
            return
        self.batch_probe = str(found["probe"])
        self.workers.tries_batches = False
        self._raised_batch_note = str(found.get("raised_note") or "")
        self._take_batch_note(str(found.get("note") or ""))
        self.apply_limits()

    def warm_up_findings(self) -> JsonObject:
        """What a worker has run before it was loaded, for the model's description."""
        return self._warm_up

    def _take_batch_note(self, note: str) -> None:
        if note and not self.batch_note:
            self.batch_note = note
            log.warning("%s: %s", self.label, note)

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        if self.settings.batch_size > 1:
            self._take_batch_note(self._raised_batch_note)
        super().apply_limits()

    def _on_event(self, event: JsonObject) -> None:
        kind = event["event"]
        if kind == "metrics":
            self.services.metrics.observe_custom(self.name, event.get("values"))
        elif kind == "reloaded":
            log.info("%s: reloaded %s", self.label, event.get("text", "its handler"))
        elif kind == "reload_failed":
            log.error("%s: reload failed, keeping the previous code: %s", self.label, event.get("text", ""))

    # --- the way in -----------------------------------------------------------------------------------------------

    def begin(self, pending: Pending) -> None:
        """Submits the request as it came."""
        request = pending.exchange.request
        query = request.query if pending.query_is_input else ""
        head = f"{request.id}\0{request.header_text}\0{query}".encode()
        flags = pending.flags
        if pending.client_deadline:
            head += b"\0%d" % pending.client_deadline
        if pending.stages is not None:
            flags |= TIMED
        try:
            pending.ticket = self.core.submit(
                pending, head, request.body, flags, request.arrived_at, self.deadline(pending)
            )
            pending.stage = SUBMITTED
        except OverflowError:
            self.answer_error(pending, self.refusal("queue full"))

    # --- the way out ----------------------------------------------------------------------------------------------

    def complete(self, completion: Any) -> None:
        """A batch came to an end, or a part of a streamed answer came."""
        code = completion.code
        owners: list[Pending | None] = completion.owners
        if code == "ok":
            self.finished_at = completion.finished_at
            started_at = completion.started_at
            # Of a batch whose answers come one after the other the first is enough.
            if len(owners) == completion.batch_size or started_at != self._noted_at:
                self._noted_at = started_at
                self.note_batch(completion, owners)
            for owner, answer in zip(owners, completion.answers, strict=True):
                if owner is not None and owner.stage != OVER:
                    owner.started_at = started_at
                    if owner.stages is not None:
                        kind, status, head, body = answer
                        head = owner.stages.note_python(completion, owner.arrived_at, head)
                        self._finish(owner, kind, status, head, body)
                        continue
                    self._finish(owner, *answer)
        elif code == "chunk":
            for owner, (_, status, head, body) in zip(owners, completion.answers, strict=True):
                if owner is not None and owner.stage != OVER:
                    self._stream(owner, status, head, body)
        elif code == "not_run":
            for owner in live(owners):
                self._submit_again(owner)
        else:
            self._complete_died(live(owners), completion)

    def _finish(self, pending: Pending, kind: int, status: int, head: bytes, body: Any) -> None:
        if kind == ERROR:
            if pending.flags & OVERRUN and status == 504 and not head:  # its handler was asked to end
                self._run_again([pending], "it ran past response_timeout")
                return
            self.answer_error(pending, _handler_error(body))
        elif kind == LAST and pending.exchange.is_streaming:
            self.forget(pending)
            pending.observe(200)
            pending.exchange.end_stream(body)
        else:
            self.answer(pending, _response(status, head, body))

    def _stream(self, pending: Pending, status: int, head: bytes, body: Any) -> None:
        pending.progress_at = time.monotonic_ns()
        if pending.exchange.is_streaming:
            pending.exchange.write(body)
        else:
            response = _response(status, head, body)
            if pending.stages is not None and pending.stages.is_told:
                # Only what is known so far.
                pending.stages.times["queue"] = (pending.arrived_at, self.core.started_at(pending.ticket))
                pending.stages.tell(response, pending.arrived_at)
            pending.exchange.start_stream(response)

    def _submit_again(self, pending: Pending) -> None:
        """Its worker died before it came to this request."""
        if self.ready_count or self.may_take:
            self.begin(pending)
        else:
            self.answer_error(pending, self.refusal("no worker"))

    def _complete_died(self, waiting: list[Pending], completion: Any) -> None:
        """Their worker died while it had them."""
        again: list[Pending] = []
        failed: list[Pending] = []
        for owner in waiting:
            (again if self._may_run_again(owner, completion) else failed).append(owner)
        if again:
            self._run_again(again, f"their worker died: {completion.message}")
        if not failed:
            return
        ids = request_ids(failed)
        details = [death_detail(each, completion) for each in failed]
        log.error("request %s failed in %s: its worker died: %s", ids, self.label, details[0]["text"],
                  extra=self.worker_log.about_requests(ids))  # fmt: skip
        # How it ended is not known yet: the socket's end is seen before the process's.
        for owner, detail in zip(failed, details, strict=True):
            self.answer_error(owner, worker_died_error(detail))

    @property
    def isolates(self) -> bool:
        """Whether requests that their handler has seen may be run a second time."""
        return self.spec.isolate_errors and not (self.spec.has_side_effects or self._has_side_effects)

    def _may_run_again(self, pending: Pending, completion: Any) -> bool:
        if pending.flags & RERUN or pending.progress_at or pending.exchange.is_streaming:
            return False
        return completion.code == "not_begun" or (self.isolates and not completion.was_alone)

    def _run_again(self, waiting: list[Pending], reason: str) -> None:
        ids = request_ids(waiting)
        log.warning("request %s of %s: run again, apart from others: %s", ids, self.label, reason,
                    extra=self.worker_log.about_requests(ids))  # fmt: skip
        self._groups.mark(waiting, is_alone=not self._is_multiplexed)
        for owner in waiting:
            self._submit_again(owner)

    def leaves_overrun(self, pending: Pending) -> bool:
        """Whether a request over its time waits for the end of its batch, which is near, to be run again."""
        if pending.flags & OVERRUN:
            return self.deadline(pending) > time.monotonic_ns()
        if (
            not self.isolates or self._is_multiplexed or pending.flags & RERUN or pending.progress_at
            or self.deadline(pending) <= time.monotonic_ns() or self.core.batch_size_of(pending.ticket) < 2
        ):  # fmt: skip
            return False
        pending.flags |= OVERRUN
        return True


def _response(status: int, head: bytes, body: Any) -> Response:
    if not head:
        # TorchServe sends an empty phrase when the handler set none, and no content type of its own.
        return Response(status, body, reason="")
    reason, *rest = head.decode("latin-1").split("\n")
    headers = dict(zip(rest[::2], rest[1::2], strict=False))
    content_type = headers.pop("content-type", None)
    return Response(status, body, content_type=content_type, reason=reason, headers=headers)


def _handler_error(body: Any) -> ServeError:
    """The error a worker reports, taken for what it is: something that a handler may have made up."""
    error = HandlerError("Prediction failed")
    try:
        told = json.loads(bytes(body))
        status, kind, message = int(told["status"]), str(told["type"]), str(told["message"])
        detail = told.get("detail") or {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return error
    if not isinstance(detail, dict) or not 200 <= status <= 599:
        return error
    error = HandlerError(message, detail=detail)
    error.status = status
    error.type = kind
    return error
