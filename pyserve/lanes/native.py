"""The native lane of one model, seen from the event loop: a request's way in, and its answer's way out.

    admission ──────> preprocess ──> engine ──> postprocess ──> answer
    (engine_lane) │   (pool, or      (C++)      (here, once  ↑
                  │   here if quick)            per batch)   │
                  └── raw rows (raw_rows.py) ──> engine ─────┘

Loop thread only, but for `_prepare`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from pyserve.answer_head import answer_head
from pyserve.context import Batch
from pyserve.devices import CPU, give_back
from pyserve.errors import HandlerError, InputError, JsonObject, OutOfMemoryError, ServeError
from pyserve.full_collections import put_off_during
from pyserve.handlers import row_check
from pyserve.handlers.outputs import named_outputs
from pyserve.lanes.batch_ceiling import BatchCeiling
from pyserve.lanes.batch_trials import try_batches
from pyserve.lanes.device_batching import DeviceBatching
from pyserve.lanes.device_copies import forget_unused, is_spread, spread
from pyserve.lanes.engine_lane import live, request_ids, ring_capacity
from pyserve.lanes.front_rows import RowsLane
from pyserve.lanes.large_answers import LargeAnswers, check_results, is_large
from pyserve.lanes.limited_runs import limited_runs
from pyserve.lanes.limits import handler_overrun, overrun_error
from pyserve.lanes.native_workers import NativeWorkers
from pyserve.lanes.network import Network
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.lanes.raw_rows import RAW_TYPE, RawRows
from pyserve.lanes.refusals import failed_run_error, handler_error
from pyserve.lanes.resources import Services
from pyserve.lanes.row_requests import Row, runs_of_rows
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.warm_up import set_warm_up
from pyserve.lanes.worker_rows import WorkerRow
from pyserve.proof.native_proof import BatchProof
from pyserve.request import codec
from pyserve.request.json_slices import SIZE_MIN
from pyserve.request.messages import Response
from pyserve.telemetry.stage_times import StageTimes
from pyserve.worker.failure import HandlerTimeout, describe_failure

T = TypeVar("T")

log = logging.getLogger(__name__)


class NativeLane(RowsLane):
    """Requests of one model between admission and answer; the network runs in native threads."""

    is_native = True
    offered: BatchProof | None = None  # of what is about to take the network's place, which some workers run already

    def __init__(self, services: Services, name: str, label: str, network: Network, settings: ModelSettings):
        core = services.engine.add_lane(network.models, network.usual_item, ring_capacity(settings))
        super().__init__(services, name, label, core, settings)
        self.network = network
        core.set_input_rules(network.rules)
        core.set_finish(*(network.finish or ("none", 0)))
        self.ceiling, self.batching = BatchCeiling(core, label), DeviceBatching(core, label, network)
        set_warm_up(core, network.warm_up, settings.startup_timeout_s)
        for device, cpus in network.near_cpus.items():
            core.set_cpus(device, cpus)
        self.proving: asyncio.Task[None] | None = None  # tries batches, while it does
        self._warned_note = ""
        self.worker_log = self.new_worker_log()
        self.workers = NativeWorkers(
            services.engine, services.stuck, core, settings=settings, label=label, worker_log=self.worker_log,
            lost_devices=services.lost_devices,
        )  # fmt: skip
        self._has_warned_of_nan = False
        self._raw = RawRows.of(network.handler, network.example)
        self._is_built_in = row_check.is_built_in(network.handler)
        self._takes_arrays = self._is_built_in and bool(getattr(network.handler, "takes_json_arrays", False))
        self.stage_times = self._preprocess_times, self._postprocess_times = StageTimes(), StageTimes()
        self._warn_of_batches()
        if self._raw is not None and not network.finish and not network.rules:
            self.open_rows(network.handler)
        self.apply_limits()

    # --- workers and settings -------------------------------------------------------------------------------------

    @property
    def is_on_gpu(self) -> bool:
        return self.network.device != CPU

    @property
    def wanted_count(self) -> int:
        return self.workers.wanted_count

    def set_workers(self, count: int) -> None:
        if not self.is_on_gpu:
            self.services.engine.share_cpus(self.core, count)
        self.apply_limits()
        self.workers.set_count(count)
        self.watch_workers()

    async def prepare_workers(self, count: int) -> None:
        """Has the weights on every device that ``count`` workers are to use."""
        if not is_spread(self.network, count):
            await limited_runs(partial(spread, self.network, count, self.label), stuck=self.services.stuck,
                               limit_s=self.settings.startup_timeout_s, label=self.label, is_served=True,
                               passes=(OutOfMemoryError,))  # fmt: skip
            self.core.set_models(self.network.models)

    @property
    def may_take(self) -> bool:
        """Whether requests are admitted although no worker is ready: one that was lost is being replaced."""
        return self.workers.is_replacing

    def look_after_workers(self, now: int) -> bool:
        """Ends batches that are over their time, and sees which sizes fit the device."""
        if self.ceiling.look(now, self.settings.batch_size):
            self.apply_limits()
        self.batching.look()
        return self.workers.look(now)

    def runs_on(self, device: str) -> bool:
        return device == self.network.device or device in self.network.copies

    def worker_rows(self) -> list[WorkerRow]:
        return self.workers.rows()

    @property
    def weights_size(self) -> int:
        """Bytes of one copy of the weights."""
        return int(self.network.torch_model.weights_size)

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""
        failure = await self.workers.settled(timeout_s)
        if forget_unused(self.network, self.core, self.wanted_count):
            await asyncio.to_thread(give_back)
        return failure

    def apply_limits(self) -> None:
        super().apply_limits()
        self.network.context.system_properties["batch_size"] = self.settings.batch_size
        proof = self.network.batches
        if proof is not None and self.proving is None and not proof.is_settled_for(self.settings.batch_size):
            self.proving = self.loop.create_task(self._prove_batches(proof))

    @property
    def batch_size_max(self) -> int:
        """The settings' number, as far as batches of it were shown to change no answer, and fit the device."""
        wanted = self.ceiling.limited(self.settings.batch_size)
        return min([wanted, *(each.size_max for each in (self.network.batches, self.offered) if each is not None)])

    async def _prove_batches(self, proof: BatchProof) -> None:
        await try_batches(self, proof, super().apply_limits)
        await asyncio.to_thread(self.network.torch_model.settle)  # items with NaN need a second copy of the weights
        self.proving = None
        self._warn_of_batches()
        if not self.is_draining:
            self.apply_limits()

    def _warn_of_batches(self) -> None:
        if self.batch_note and self.batch_note != self._warned_note:
            self._warned_note = self.batch_note
            log.warning("%s %s", self.label, self.batch_note)

    @property
    def batch_note(self) -> str:  # type: ignore[override]
        """Why its batches are smaller than the settings ask for."""
        proof, size = self.network.batches, self.settings.batch_size
        return self.ceiling.note(size) if proof is None or size <= proof.size_max else proof.note

    @property
    def batch_probe(self) -> str:  # type: ignore[override]
        """What trying batches came to."""
        proof = self.network.batches
        if proof is None or self.settings.batch_size == 1:
            return ""
        return proof.probe or ("being tried; until then batches have "
                               f"{proof.size_max} item{'s' if proof.size_max > 1 else ''}")  # fmt: skip

    @property
    def running_max(self) -> int:
        """A GPU has a queue of its own; on a CPU more batches than cores only take turns."""
        return (1 << 31) if self.is_on_gpu else self.services.engine.running_max

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        if self.proving is not None:  # nobody waits for what it shows
            self.proving.cancel()
            await asyncio.wait([self.proving])
        await self.finish_requests()
        self.services.engine.forget_lane(self.core)
        await self.workers.ended()
        if self.proving is None and not self.core.lost_count:
            self.network.release()
        await asyncio.to_thread(give_back)

    def stats(self) -> JsonObject:
        """As a lane's, and the histograms of the stages before and after the engine."""
        own: JsonObject = {"stuck": self.core.lost_count, "batch_ceiling": self.core.ceiling}
        return {**super().stats(), **own, **self.stage_histograms()}

    # --- the way in -----------------------------------------------------------------------------------------------

    def begin(self, pending: Pending) -> None:
        """Preprocesses, here or in the pool, and submits."""
        if pending.kept is not None and self.answer_kept(pending):
            return
        if pending.inputs is not None:
            self._submit(pending, pending.inputs)
            return
        if self._raw is not None and not (pending.flags or pending.query_is_input or pending.stages):
            request = pending.exchange.request
            if self._raw.takes(request):
                pending.is_raw = True
                try:
                    pending.ticket = self.core.submit_bytes(
                        pending, request.body, request.arrived_at, self.deadline(pending)
                    )
                except OverflowError:
                    self.answer_error(pending, self.refusal("queue full"))
                    return
                pending.stage = SUBMITTED
                self.announce_soon()
                return
        if self.network.handler.is_quick(len(pending.exchange.request.body)):
            self._prepared(pending, self._prepare(pending) if self._is_built_in else self._prepare_guarded(pending))
            return
        prepare = partial(self._prepare, pending)
        if len(pending.exchange.request.body) >= SIZE_MIN:
            prepare = partial(put_off_during, prepare)
        self.in_pool(prepare, partial(self._prepared, pending), waits=True)

    def _prepare(self, pending: Pending) -> torch.Tensor | ServeError:
        """Body to input tensor. Any thread."""
        began = time.monotonic_ns()
        prepared = self._preprocess(pending)
        ended = time.monotonic_ns()
        pending.preprocess_ns = ended - began
        if pending.stages is not None:
            pending.stages.times["admission"] = (pending.arrived_at, began)
            pending.stages.times["preprocess"] = (began, ended)
        return prepared

    def _prepare_guarded(self, pending: Pending) -> torch.Tensor | ServeError:
        """As `_prepare`, on the loop, by an archive's own code."""
        try:
            return self._guarded(lambda: self._prepare(pending))
        except HandlerTimeout:
            return handler_overrun("preprocess", self.settings)

    def _guarded(self, call: Callable[[], T]) -> T:
        """An archive's own code on the loop. Raises HandlerTimeout if it does not come to an end."""
        return self.services.loop_guard.run(call, self.settings.response_timeout_s, self.label)

    def _preprocess(self, pending: Pending) -> torch.Tensor | ServeError:
        request = pending.exchange.request
        batch = None if self._is_built_in else Batch([request.id], [request.headers])
        # On the loop thread there may be another batch, which is being answered.
        before = self.network.context.bind(batch) if batch is not None else None
        try:
            return self.network.handler.preprocess([self._row_of(pending)])
        except ServeError as error:
            return error
        except Exception as error:
            return self._handler_error(error, "preprocess", request.id)
        finally:
            if batch is not None:
                self.network.context.bind(before)
                pending.processor = batch.processors[0] if batch.processors else None

    def _row_of(self, pending: Pending) -> dict[str, Any]:
        request, config, handler = pending.exchange.request, self.services.config, self.network.handler
        decodes, lenient = config.decode_input_request, self.is_strict
        is_built_in = row_check.is_built_in(handler) and not lenient
        types: dict[str, str] = {}
        if pending.flags & codec.FIELDS:
            row = codec.split_fields(request.body, request.query)
        else:
            row = codec.decode_request(
                request, decode=decodes, types=types, lenient=lenient, is_built_in=is_built_in, in_slices=True,
                takes_arrays=self._takes_arrays,
            )  # fmt: skip
            if pending.query_is_input:
                codec.add_query(row, request.query, types=types, lenient=lenient)
        if is_built_in:
            row_check.check_row(handler, row, types, decodes=decodes, start_key=config.ts_header_key_sequence_start)
        return row

    def _prepared(self, pending: Pending, prepared: torch.Tensor | ServeError) -> None:
        self._preprocess_times.observe(pending.preprocess_ns / 1e9)
        self._submit(pending, prepared)

    def _submit(self, pending: Pending, prepared: torch.Tensor | list[torch.Tensor] | ServeError) -> None:
        if pending.stage == OVER:
            return  # expired or hung up meanwhile
        if isinstance(prepared, ServeError):
            if self.is_strict and isinstance(prepared, InputError):
                prepared = HandlerError("Prediction failed")  # TorchServe's answer to any exception of a handler
            self.answer_error(pending, prepared)
            return
        try:
            pending.ticket = self.core.submit(
                pending, prepared, pending.arrived_at, self.deadline(pending), False, pending.wants_tensors
            )
            pending.stage = SUBMITTED
            self.announce_soon()
        except OverflowError:
            self.answer_error(pending, self.refusal("queue full"))
        except self.services.engine.core.InputRefused as error:
            refusal: ServeError = InputError(str(error))
            self.answer_error(pending, HandlerError("Prediction failed") if self.is_strict else refusal)
        except (TypeError, ValueError) as error:
            self.answer_error(pending, self._handler_error(error, "preprocess", pending.exchange.request.id))

    # --- the way out ----------------------------------------------------------------------------------------------

    def complete(self, completion: Any) -> None:
        """A batch came to an end: row i of its output goes to request i."""
        owners: list[Pending | None] = completion.owners
        self.finished_at = completion.finished_at
        for owner in owners:
            if owner is not None:
                owner.started_at = completion.started_at
                if owner.stages is not None and not owner.wants_tensors:  # of rows only the total is told
                    owner.stages.note_native(completion, completion.stamps[owners.index(owner)][1])
        self.note_batch(completion, owners)
        if completion.code != "ok":
            self._complete_failed(owners, completion)
            return
        if self.rows is None or any(owners := self.keep_outputs(owners, completion)):
            self.answer_run(owners, completion)

    def answer_run(self, owners: list[Pending | None], completion: Any) -> None:
        """Answers what has run."""
        if self._raw is not None and self._answer_rows(self._raw, owners, completion):
            return
        if any(owner is not None and owner.wants_tensors for owner in owners):
            owners = self._give_tensors(owners, completion)
            if not any(owners):
                return
        if self._is_built_in and is_large(completion.output if completion.finished is None else completion.finished):
            self._answer_in_pool(owners, completion)
            return
        requests = [owner.exchange.request if owner is not None else None for owner in owners]
        batch = Batch(
            [request.id if request is not None else "" for request in requests],
            [request.headers if request is not None else () for request in requests],
        )
        if not self._is_built_in:
            batch.processors = [owner.processor if owner is not None else None for owner in owners]
        context = self.network.context
        before = context.bind(batch)
        try:
            self._answer_batch(owners, completion)
        finally:
            context.bind(before)

    def _answer_batch(self, owners: list[Pending | None], completion: Any) -> None:
        """Answers a batch, to which the context is bound."""
        context, handler = self.network.context, self.network.handler
        began = time.monotonic_ns()
        try:
            handler.context = context
            answers = partial(self.network.answers, handler, completion)
            results = answers() if self._is_built_in else self._guarded(answers)
            check_results(results, len(owners))
        except HandlerTimeout:
            self._complete_failed_postprocess(owners, handler_overrun("postprocess", self.settings))
            return
        except Exception as error:
            self._complete_failed_postprocess(owners, error)
            return
        finally:
            self._postprocess_times.observe((time.monotonic_ns() - began) / 1e9)
        for index, (owner, result) in enumerate(zip(owners, results, strict=True)):
            if owner is None:
                continue
            try:
                response = self._response(result, context, index)
                if owner.stages is not None:
                    delivered_at = owner.stages.times["delivery"][1]
                    owner.stages.times["postprocess"] = (delivered_at, time.monotonic_ns())
                self.answer(owner, response)
            except Exception as error:
                # The others' answers are not touched by this one's.
                self._complete_failed_postprocess([owner], error)

    def _answer_in_pool(self, owners: list[Pending | None], completion: Any) -> None:
        """Answers a batch of many numbers: the loop waits neither for lists nor for JSON of them."""
        network, respond = self.network, partial(self._response, is_large=True)
        answers = LargeAnswers(network.handler, network.context, owners, respond)

        def made(responses: list[Response | Exception]) -> None:
            self._postprocess_times.observe(answers.duration_s)
            for owner, response in zip(owners, responses, strict=True):
                if owner is None:
                    continue
                if isinstance(response, Response):
                    self.answer(owner, response)
                else:
                    self._complete_failed_postprocess([owner], response)

        self.in_pool(partial(answers.make, lambda twin: network.answers(twin, completion)), made, waits=False)

    def _answer_rows(self, raw: RawRows, owners: list[Pending | None], completion: Any) -> bool:
        """Answers a batch of raw requests; returns whether it was one."""
        for owner in owners:
            if owner is not None and not owner.is_raw:
                return False
        rows: list[bytes | memoryview | None] | None = completion.rows()
        if rows is None or any(row is not None and len(row) > self.services.config.max_response_size for row in rows):
            return False  # the other way has the words for it
        headers = raw.headers(completion.output)
        for owner, row in zip(owners, rows, strict=True):
            if owner is not None and row is not None:
                self.answer(owner, Response(200, row, content_type=RAW_TYPE, reason="", headers=headers))
        return True

    def _give_tensors(self, owners: list[Pending | None], completion: Any) -> list[Pending | None]:
        """Rows of the output go to those who want them as they are; returns the owners without these."""
        takers = [owner for owner in owners if isinstance(owner, Row) and owner.wants_tensors]
        others = [None if owner is not None and owner.wants_tensors else owner for owner in owners]
        try:
            # All of them are of one protocol, which has one set of names for a model.
            configured = takers[0].whole.output_names
            outputs, names = named_outputs(self.network.output(completion.output), configured)
        except ServeError as error:
            self._complete_failed_postprocess(list(takers), error)
            return others
        for first, rows in runs_of_rows(owners):
            if any(row.stage == OVER for row in rows):
                continue  # of a whole that has ended
            for row in rows:
                if row is not row.whole:  # else it ends with its answer
                    self.forget(row)
            own = [output[first : first + len(rows)] for output in outputs]
            rows[0].whole.tensors_came(rows, completion.started_at, own, names)
        return others

    def _response(self, result: Any, context: Any, index: int, *, is_large: bool = False) -> Response:
        body = codec.encode_result(result, None if self.is_strict else self._warn_of_nan, in_slices=is_large)
        size_max = self.services.config.max_response_size
        if len(body) > size_max:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={size_max}; "
                "raise it in config.properties"
            )
        head = answer_head(context, index, is_strict=self.is_strict)
        headers = dict(head.headers)
        content_type = headers.pop("content-type", None)
        # TorchServe sends an empty phrase when the handler set none, and no content type of its own.
        return Response(head.status, body, content_type=content_type, reason=head.reason, headers=headers)

    def _warn_of_nan(self) -> None:
        if not self._has_warned_of_nan:
            self._has_warned_of_nan = True
            log.warning("%s: %s", self.label, codec.NAN_WARNING)

    def _complete_failed(self, owners: list[Pending | None], completion: Any) -> None:
        if completion.code == "interrupted":
            for owner in live(owners):
                self.answer_error(owner, overrun_error(self.settings, owner, is_strict=self.is_strict))
            return
        error = failed_run_error(self.name, completion.code, completion.message, is_strict=self.is_strict)
        waiting = live(owners)
        if waiting and completion.code != "device_lost":  # which is logged once, not for each request
            ids = request_ids(waiting)
            log.error("request %s failed in %s: %s", ids, self.label, completion.message.strip(),
                      extra=self.worker_log.about_requests(ids))  # fmt: skip
        for owner in waiting:
            self.answer_error(owner, error)

    def _complete_failed_postprocess(self, owners: list[Pending | None], error: Exception) -> None:
        waiting = live(owners)
        failure = error
        if not isinstance(failure, ServeError):
            failure = self._handler_error(error, "postprocess", request_ids(waiting))
        for owner in waiting:
            self.answer_error(owner, failure)

    def _handler_error(self, error: Exception, stage: str, ids: str) -> ServeError:
        model_dir = self.network.context.system_properties["model_dir"]
        failure = describe_failure(error, model_dir)
        if not failure.is_own:  # of a built-in handler or ours
            failure = replace(failure, where=stage)
        if not failure.is_expected:
            log.error("request %s failed in %s of %s: %s\n%s", ids, stage, self.label, failure.line(),
                      failure.traceback, extra=self.worker_log.about_requests(ids))  # fmt: skip
        return handler_error(failure)
