"""Requests that belong together go to the same worker, one after the other (``sequenceBatching``).

A handler of this kind keeps something between the requests of a sequence: the words said so far, a decoder's state.
So each sequence stays with one worker, and its next request is handed over only when the last one was answered; a batch
then holds at most one request of each sequence. Every worker has a queue of its own for that: a lane of one worker.

When a worker ends, so do its sequences: what they had is lost. The next request of a sequence that ended without its
handler's doing is told so, once, unless it says that it begins one; with ``compat=strict`` it begins one all the same.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from pyserve.archive.model_config import ModelConfig
from pyserve.errors import ConflictError, JsonObject, OverloadedError, ServeError
from pyserve.lanes.engine_lane import ring_capacity
from pyserve.lanes.lane import Lane
from pyserve.lanes.limits import SWEEP_INTERVAL_S, start_client_limit
from pyserve.lanes.pending import OVER, Pending
from pyserve.lanes.python import DESCRIBE, PythonLane
from pyserve.lanes.refusals import as_queue_full, worker_died_error
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_rows import WorkerRow
from pyserve.lanes.worker_slot import Condition, joined
from pyserve.request.ids import new_id
from pyserve.request.messages import ExtraHeaders, Response
from pyserve.worker.spec import WorkerSpec

log = logging.getLogger(__name__)

SEQUENCE_PREFIX = "ts-seq-"
# Without sequenceMaxIdleMSec; sequences that nobody ends would take all places for ever.
IDLE_MAX_S = 60.0
ENDED_KEPT_MAX = 10_000


class Sequence:
    """Requests that share an id.

    Attributes:
        member: the lane, of one worker, that has its state.
        running: the request that was handed over and is not answered yet.
        waiting: those after it.
        worker_id: of the worker that has its state, as far as that is known.
        has_state: a request of it was given to a worker.
    """

    def __init__(self, id: str, member: _Member):
        self.id = id
        self.member = member
        self.running: Pending | None = None
        self.waiting: deque[Pending] = deque()
        self.worker_id: int | None = None
        self.has_state = False
        self.started_at = self.used_at = time.monotonic()


class _Member(PythonLane):
    """One worker's lane; reports when a request has come to its end."""

    def __init__(self, *arguments: Any, on_answer: Callable[[Response], None],
                 on_over: Callable[[Pending, bool], None], on_complete: Callable[[_Member], None],
                 **named: Any):  # fmt: skip
        super().__init__(*arguments, **named)
        self._on_answer = on_answer
        self._on_over = on_over
        self._on_complete = on_complete
        self._seen_id: int | None = None
        self.used_at = 0.0  # when it last had a request

    @property
    def worker_id(self) -> int | None:
        """The engine's id of its worker, another one for each process; None while there is none."""
        rows = self.core.workers()
        return next((int(row["id"]) for row in rows if row["state"] in ("ready", "stopping")), None)

    @property
    def isolates(self) -> bool:
        """Never: what a second run would find of its sequence's state is not what the first one did."""
        return False

    def answer(self, pending: Pending, response: Response) -> None:
        if pending.stage != OVER:
            self._on_answer(response)
        super().answer(pending, response)

    def forget(self, pending: Pending) -> None:
        was_submitted = pending.was_submitted
        super().forget(pending)
        self._on_over(pending, was_submitted)

    def complete(self, completion: Any) -> None:
        id = self.worker_id
        if id != self._seen_id:  # first: what the last worker had must not be given to the next
            self._seen_id = id
            self._on_complete(self)
        super().complete(completion)


class SequenceLane(Lane):
    """The lane of a model whose requests come in sequences: a `PythonLane` for each worker.

    Args:
        spec: what workers are started with.
        config: the model's, for the limits of sequences.
        on_condition: told how the workers are, at every change.
        member_options: further arguments of `PythonLane`, for each.
    """

    batch_probe = "not probed: requests of this kind of model depend on those before them"

    def __init__(
        self, services: Services, spec: WorkerSpec, label: str, settings: ModelSettings, config: ModelConfig, *,
        on_condition: Callable[[Condition], None] = lambda condition: None, **member_options: Any,
    ):  # fmt: skip
        super().__init__(services, spec.name, label, settings)
        # Constant.
        self.spec = spec
        self._member_options = member_options
        self._on_condition = on_condition
        self._capacity = ring_capacity(settings)
        # All counters there are, also without a member.
        self._no_stats = services.engine.add_process_lane(self._capacity).stats() | {"running": 0, "running_max": 0}
        self._idle_max_s = (config.sequence_idle_max_ms or 0) / 1e3 or IDLE_MAX_S
        self._lifetime_max_s = (config.sequence_timeout_ms or 0) / 1e3
        self._count_max = config.sequence_count_max or 1
        self._waiting_per_sequence_max = config.sequence_queue_size or 1
        # Changes while it runs.
        self._members: list[_Member] = []
        self._sequences: dict[str, Sequence] = {}
        self._runs_in: dict[Pending, Sequence] = {}  # of requests that were handed over
        self._waits_in: dict[Pending, Sequence] = {}  # of those that were not yet
        self._ended: dict[str, ServeError] = {}  # by id: why it ended
        self._last_told: Condition | None = None  # by a member, of itself
        self._closing: list[asyncio.Task[None]] = []
        self._look_timer: asyncio.TimerHandle | None = None

    # --- workers and settings -------------------------------------------------------------------------------------

    def set_workers(self, count: int) -> None:
        """Each worker is a lane of its own. Sequences of one that goes are over."""
        while len(self._members) > count:
            member = self._members.pop()
            for sequence in [each for each in self._sequences.values() if each.member is member]:
                self._let_go(sequence)
            self._closing.append(asyncio.get_running_loop().create_task(member.close()))
        while len(self._members) < count:
            self._members.append(self._new_member())
        for member in self._members:
            member.set_workers(1)
        self._on_condition(self.condition)

    def _new_member(self) -> _Member:
        member: _Member = _Member(
            self.services, self.spec, self.label, self.settings, on_answer=self._on_answer, on_over=self._on_over,
            on_complete=self._on_change, on_condition=lambda condition: self._on_member_condition(member, condition),
            worker_number=len(self._members), **self._member_options,
        )  # fmt: skip
        return member

    def _on_member_condition(self, member: _Member, condition: Condition) -> None:
        """One worker in trouble is none of the model's, as long as there is another."""
        if member in self._members:
            self._last_told = condition
            self._on_condition(self.condition)

    @property
    def condition(self) -> Condition:
        """How the workers are, all in all."""
        return joined([member.condition for member in self._members], self._last_told)

    async def settled(self, timeout_s: float) -> str:
        """Waits until every worker is ready or gone. Returns why one is not, or ``""``."""
        failures = await asyncio.gather(*(member.settled(timeout_s) for member in self._members))
        return next(filter(None, failures), "")

    @property
    def failure(self) -> ServeError | None:
        """The error of a worker that could not be started, if it is known in full."""
        return next((member.failure for member in self._members if member.failure is not None), None)

    @property
    def wanted_count(self) -> int:
        """Workers that are there or coming."""
        return sum(member.wanted_count for member in self._members)

    @property
    def ready_count(self) -> int:
        """Workers that take batches now."""
        return sum(member.ready_count for member in self._members)

    @property
    def may_take(self) -> bool:
        """A worker is being started, or started again."""
        return any(member.may_take for member in self._members)

    @property
    def capacity(self) -> int:
        """More requests than this can never wait, whatever the settings say."""
        return self._capacity

    def apply_limits(self) -> None:
        """Brings the settings to the engine; they hold from the next batch on."""
        for member in self._members:
            member.apply_limits()

    async def close(self) -> None:
        """Finishes what was admitted, then stops the workers."""
        self.is_draining = True
        for sequence in self._sequences.values():
            self._answer_waiting(sequence, self.refusal("draining"))
        await asyncio.gather(*(member.close() for member in self._members), *self._closing)
        if self._look_timer is not None:
            self._look_timer.cancel()

    def answer_all(self, error: ServeError) -> None:
        """Answers every admitted request with ``error``."""
        for sequence in self._sequences.values():
            self._answer_waiting(sequence, error)
        for member in self._members:
            member.answer_all(error)

    # --- requests -------------------------------------------------------------------------------------------------

    def predict(self, pending: Pending) -> None:
        """Hands the request to its sequence's worker, now or when the one before it is answered."""
        if self.is_draining or not self._members:
            self.refuse(pending, self.refusal("draining" if self.is_draining else "no worker"))
            return
        if pending.flags & DESCRIBE:
            _give(self._members[0], pending)
            return
        ended = self._why_ended(pending)
        if ended is not None:
            self.answer_error(pending, ended)
            return
        sequence = self._sequence_of(pending)
        if sequence is None:
            self.refuse(pending, self._limit_refusal("maxNumSequence", self._count_max))
        elif sequence.running is None and not sequence.waiting:  # not past those whose turn has just come
            self._hand_over(sequence, pending)
        elif len(sequence.waiting) >= self._waiting_per_sequence_max:
            self.refuse(
                pending, self._limit_refusal("maxSequenceJobQueueSize", self._waiting_per_sequence_max, sequence.id)
            )
        else:
            sequence.waiting.append(pending)
            self._waits_in[pending] = sequence
            if self.times_all:
                self.begin_stages(pending)
            if pending.client_deadline:
                start_client_limit(pending)
            pending.exchange.on_disconnect = pending.cancel
        self._start_looking()

    def _why_ended(self, pending: Pending) -> ServeError | None:
        """The error of a request that continues a sequence that has ended."""
        id_key, start_key, _ = self.spec.header_keys
        request = pending.exchange.request
        sequence = self._sequences.get(request.header(id_key))
        if sequence is not None:
            self._look_after(sequence)
        error = self._ended.pop(request.header(id_key), None)
        return None if self.is_strict or request.header(start_key).strip().lower() == "true" else error

    def _sequence_of(self, pending: Pending) -> Sequence | None:
        request = pending.exchange.request
        id_key, start_key, _ = self.spec.header_keys
        id = request.header(id_key)
        if not id:
            id = SEQUENCE_PREFIX + new_id()
            request.add_headers(ExtraHeaders((id_key, id), (start_key, "true")))
        sequence = self._sequences.get(id)
        if sequence is None:
            if len(self._sequences) >= self._count_max:
                return None
            taken = [sequence.member for sequence in self._sequences.values()]
            # One whose worker is being started may turn out to be in trouble.
            able = [member for member in self._members if member.ready_count]
            able = able or [member for member in self._members if member.may_take]
            # Of those with equally many the one that has waited longest, as TorchServe's workers stand in line: a
            # sequence that is begun again is seldom where its state still lies, so that handlers see that it is over.
            member = min(able or self._members, key=lambda each: (taken.count(each), each.used_at))
            sequence = self._sequences[id] = Sequence(id, member)
        return sequence

    def _hand_over(self, sequence: Sequence, pending: Pending) -> None:
        sequence.running = pending
        sequence.used_at = sequence.member.used_at = time.monotonic()
        self._runs_in[pending] = sequence
        if not sequence.has_state:
            sequence.worker_id = sequence.member.worker_id
        _give(sequence.member, pending)

    def _on_over(self, pending: Pending, was_submitted: bool) -> None:
        sequence = self._runs_in.pop(pending, None)
        if sequence is None:
            return
        sequence.running = None
        sequence.used_at = sequence.member.used_at = time.monotonic()
        if was_submitted:
            sequence.has_state = True
            if sequence.worker_id is None:  # it was being started
                sequence.worker_id = sequence.member.worker_id
        elif not (sequence.has_state or sequence.waiting):  # refused: it has not begun
            self._sequences.pop(sequence.id, None)
        # Not from within the answer of the one before: a refusal would recurse through all that wait.
        self.loop.call_soon(self._hand_over_next, sequence)

    def _hand_over_next(self, sequence: Sequence) -> None:
        self._look_after(sequence)
        if sequence.running is None and sequence.waiting:
            pending = sequence.waiting.popleft()
            del self._waits_in[pending]
            self._hand_over(sequence, pending)
        elif self._sequences.get(sequence.id) is sequence:
            self._end_if_over(sequence, time.monotonic())  # it may never be idle for long enough to be seen

    def _on_answer(self, response: Response) -> None:
        """A handler ends sequences by naming them in a header of an answer."""
        ended = response.headers.get(self.spec.header_keys[2], "")
        for id in ended.split(";"):
            sequence = self._sequences.get(id.strip())
            if sequence is not None:
                self._end(sequence)

    def forget(self, pending: Pending) -> None:
        """Of one that waits in its sequence, or was refused; those that were handed over are the members'."""
        sequence = self._waits_in.pop(pending, None)
        if sequence is not None:
            sequence.waiting.remove(pending)
        super().forget(pending)

    def _end(self, sequence: Sequence) -> None:
        """Its id is free. What waits still runs, as the beginning of another sequence would."""
        self._forget_sequence(sequence)
        sequence.has_state = False
        if sequence.running is None:
            self._hand_over_next(sequence)

    def _forget_sequence(self, sequence: Sequence) -> None:
        if self._sequences.get(sequence.id) is sequence:
            del self._sequences[sequence.id]

    def _look_after(self, sequence: Sequence) -> None:
        """Ends it if the worker that had its state is gone."""
        if sequence.has_state and sequence.worker_id != sequence.member.worker_id:
            self._lose(sequence, "its worker ended")

    def _on_change(self, member: _Member) -> None:
        for sequence in [each for each in self._sequences.values() if each.member is member]:
            self._look_after(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Its worker is asked to stop: it finishes what runs, and no more."""
        running, sequence.running = sequence.running, None
        self._runs_in.pop(running, None)  # type: ignore[arg-type]
        self._lose(sequence, "its worker was stopped")

    def _lose(self, sequence: Sequence, why: str) -> None:
        """What its worker knew of it is lost: its requests cannot continue it."""
        log.warning("%s: sequence %s is lost: %s", self.label, sequence.id, why)
        error = worker_died_error(_told(sequence, f"sequence {sequence.id} is lost: {why}"))
        self._forget_sequence(sequence)
        running = sequence.running
        if running is not None:
            running.drop()
            sequence.member.answer_error(running, error)
        self._answer_waiting(sequence, error)
        if running is None and sequence.has_state:
            self._remember(sequence, error)

    def _answer_waiting(self, sequence: Sequence, error: ServeError) -> None:
        while sequence.waiting:
            self.answer_error(sequence.waiting[0], error)  # no longer waits then, see `forget`

    def _remember(self, sequence: Sequence, error: ServeError) -> None:
        self._ended[sequence.id] = error
        if len(self._ended) > ENDED_KEPT_MAX:
            del self._ended[next(iter(self._ended))]

    def _time_out(self, sequence: Sequence, text: str) -> None:
        log.info("%s: sequence %s ended: %s", self.label, sequence.id, text)
        if sequence.has_state:
            error = ConflictError(f"sequence {sequence.id} has ended: {text}", detail=_told(sequence, text))
            self._remember(sequence, error)
        self._forget_sequence(sequence)

    # --- limits ---------------------------------------------------------------------------------------------------

    def _limit_refusal(self, key: str, limit: int, id: str = "") -> OverloadedError:
        error = self.refusal("sequence limit")
        error.detail["limit"] = f"{key}={limit}" + (f", sequence {id}" if id else "")
        error.detail["fix"] = f"end sequences that are over, wait for the answer, or raise {key} in model-config.yaml"
        return as_queue_full(error, self.services.config)

    def _start_looking(self) -> None:
        if self._look_timer is None and self._sequences:
            self._look_timer = self.loop.call_later(SWEEP_INTERVAL_S, self._look)

    def _look(self) -> None:
        """Ends sequences that stood still or lived too long, and answers what waited past its time."""
        self._look_timer = None
        now = time.monotonic()
        for sequence in list(self._sequences.values()):
            late = [each for each in sequence.waiting if each.age_s() >= self.settings.queue_limit_s]
            for pending in late:
                self.expire(pending)
            self._look_after(sequence)
            self._end_if_over(sequence, now)
        self._start_looking()

    def _end_if_over(self, sequence: Sequence, now: float) -> None:
        """Not while it has requests: the next one would begin another of its name, and overtake them."""
        if sequence.running is not None or sequence.waiting:
            return
        if self._idle_max_s and now - sequence.used_at >= self._idle_max_s:
            self._time_out(sequence, f"idle for sequenceMaxIdleMSec={self._idle_max_s * 1e3:g}")
        elif self._lifetime_max_s and now - sequence.started_at >= self._lifetime_max_s:
            self._time_out(sequence, f"its lifetime of sequenceTimeoutMSec={self._lifetime_max_s * 1e3:g} is over")

    # --- what others ask ------------------------------------------------------------------------------------------

    def worker_rows(self) -> list[WorkerRow]:
        """The workers, as the management API shows them."""
        rows = [row for member in self._members for row in member.worker_rows()]
        for index, row in enumerate(rows):
            row.id = str(self.services.config.initial_worker_port + index)
        return rows

    @property
    def waiting_count(self) -> int:
        """Requests in the members' queues and in the sequences'."""
        return sum(member.waiting_count for member in self._members) + sum(
            len(sequence.waiting) for sequence in self._sequences.values()
        )

    @property
    def in_flight_count(self) -> int:
        """Requests admitted and not answered."""
        waiting = sum(len(sequence.waiting) for sequence in self._sequences.values())
        return sum(member.in_flight_count for member in self._members) + waiting

    def stats(self) -> JsonObject:
        """The sum of the members' counters and histograms."""
        total = dict(self._no_stats)
        for member in self._members:
            for key, value in member.stats().items():
                if key != "queue_size":
                    total[key] = _added(total[key], value)
        return total | {"queue_size": self.waiting_count}


def _give(member: _Member, pending: Pending) -> None:
    pending.lane = member
    member.predict(pending)


def _told(sequence: Sequence, text: str) -> JsonObject:
    return {"reason": "sequence ended", "sequence": sequence.id, "text": text,
            "fix": "begin another sequence; its first request may say so with the start header, true"}  # fmt: skip


def _added(left: Any, right: Any) -> Any:
    if isinstance(left, tuple):  # a histogram: bounds, counts, sum
        return left[0], [a + b for a, b in zip(left[1], right[1], strict=True)], left[2] + right[2]
    return left + right
