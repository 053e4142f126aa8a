"""Continuous batching: the handler is called again and again with all requests that are under way.

    step 1   data = [row of A]                 A's first part
    step 2   data = [{}, row of B]             A's next part, B's first: B joined without waiting for A
    step 3   data = [{}]                       A is over, its criterion said so

TorchServe's contract: from its second step on a request's row is empty, the handler keeps what it needs in
``context.cache`` under the request's id, and ``context.stopping_criteria[i](result)`` says of each result whether its
request is over: True, False, or None for one that is not streamed.

A step that fails is tried again without the requests that have joined in it, then item by item, so that it costs only
the one at fault. Before that the cache gets back what it held. Where that cannot be done, because a request's state is
kept elsewhere or in an object of the handler's own, the request fails with the step: wrong parts would be worse.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pyserve import devices
from pyserve.context import Context
from pyserve.errors import HandlerError
from pyserve.telemetry.custom_metrics import MetricsReport
from pyserve.worker.answer import ANSWER, LAST, Answer, Parts
from pyserve.worker.failure import Failure, HandlerTimeout, describe_failure
from pyserve.worker.invoker import Call, Invoker
from pyserve.worker.request import DESCRIBE, Item, WorkerRequest

if TYPE_CHECKING:
    from pyserve.worker.answer import ChannelParts

_CONTAINERS = (dict, list, set, deque)
# What a step replaces and does not change.
_VALUES = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)


class Job:
    """One request under way.

    Attributes:
        batch: the batch that it came in.
        has_begun: a step with it has succeeded: its row is empty from now on.
        has_streamed: a part of its answer has left.
        is_over: its final answer has left.
    """

    __slots__ = ("batch", "has_begun", "has_streamed", "is_over", "request")

    def __init__(self, batch: int, request: WorkerRequest):
        self.batch = batch
        self.request = request
        self.has_begun = self.has_streamed = self.is_over = False

    @property
    def final_kind(self) -> int:
        """Of its last answer."""
        return LAST if self.has_streamed else ANSWER


class _JobParts(Parts):
    """Parts of the answers of one step's jobs, sent at once."""

    def __init__(self, channel: Any, jobs: list[Job]):
        self._channel = channel
        self._batches = {job.request.ticket: job.batch for job in jobs}

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        self._channel.send(self._batches[answer[0]], [answer])

    def is_cancelled(self, ticket: int) -> bool:
        """Whether its client has gone."""
        return bool(self._channel.is_cancelled(ticket))


class _Saved:
    """What the cache held of one request before a step: its entry, and containers in that."""

    def __init__(self, cache: Any, id: str):
        self._cache = cache
        self._id = id
        self._entry = cache.get(id) if isinstance(cache, dict) else None
        self._copies = [
            (each, each.copy()) for each in (self._entry, *_values(self._entry)) if type(each) in _CONTAINERS
        ]

    def is_whole(self) -> bool:
        """Whether `put_back` brings all of it back; not if there was nothing."""
        if self._entry is None:
            return False
        whole, *inner = [copy for _, copy in self._copies] or [(self._entry,)]
        return all(type(each) in _CONTAINERS or _is_kept(each) for each in _values(whole)) and all(
            _is_kept(each) for copy in inner for each in _values(copy)
        )

    def put_back(self) -> None:
        """Makes the cache hold it again."""
        if not isinstance(self._cache, dict):
            return
        if self._entry is None:
            self._cache.pop(self._id, None)
            return
        self._cache[self._id] = self._entry
        for container, copy in self._copies:
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(copy)
            else:
                container.extend(copy)


def _values(container: Any) -> Iterable[Any]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, (list, set, deque, tuple)) else ()


def _is_kept(value: Any) -> bool:
    """Whether a step puts another in its place rather than changing it; a criterion it calls last, if at all."""
    torch = sys.modules.get("torch")
    return type(value) in _VALUES or (torch is not None and isinstance(value, torch.Tensor)) or callable(value)


def serve_continuously(
    channel: Any, invoker: Invoker, parts: ChannelParts, context: Context, report: MetricsReport
) -> None:
    """Serves until the server closes the channel, which raises EOFError here.

    Args:
        invoker: made with ``parts``.
        context: the model's.
    """
    _RunningBatch(channel, invoker, parts, context).serve(report)


class _RunningBatch:
    """The requests that are under way."""

    def __init__(self, channel: Any, invoker: Invoker, parts: ChannelParts, context: Context):
        self._channel = channel
        self._invoker = invoker
        self._parts = parts
        self._context: Any = context  # handlers give it further attributes
        self._jobs: list[Job] = []
        vars(context).setdefault("cache", {})  # TorchServe's handlers make it in `initialize`

    def serve(self, report: MetricsReport) -> None:
        """One step after the other; waits only while there is no request."""
        channel = self._channel
        while True:
            report_ms = report.look()
            wait_ms = 0 if self._jobs else report_ms
            while (batch := channel.receive(wait_ms)) is not None:
                channel.begin(batch.id)
                for item in batch.items:
                    self._join(batch.id, item)
                wait_ms = 0
            self._drop_cancelled()
            if self._jobs:
                began = time.perf_counter()
                self._step(self._jobs)
                self._jobs = [job for job in self._jobs if not job.is_over]
                report.note_prediction(time.perf_counter() - began)

    # --- requests come and go -------------------------------------------------------------------------------------

    def _join(self, batch: int, item: Item) -> None:
        if item[1] & DESCRIBE:
            self._parts.batch = batch
            self._channel.send(batch, self._invoker.run([item]))
            return
        request, refusal = self._invoker.read(item)
        if refusal is not None:
            self._channel.send(batch, [refusal])
            return
        # Clients may send ids of their own; what is in the cache for one request is not another's.
        taken = {job.request.id for job in self._jobs}
        id, count = request.id, 1
        while request.id in taken:
            count += 1
            request.id = f"{id}~{count}"
        self._jobs.append(Job(batch, request))

    def _drop_cancelled(self) -> None:
        """Those whose clients have gone leave: nobody reads their answers, but the server counts them."""
        gone = set(self._channel.cancelled_tickets()) if self._jobs else ()
        for job in self._jobs:
            if job.request.ticket in gone:
                self._end(job, (job.request.ticket, job.final_kind, 200, b"", b""))
        self._jobs = [job for job in self._jobs if not job.is_over]

    def _end(self, job: Job, answer: Answer) -> None:
        job.is_over = True
        with contextlib.suppress(Exception):  # what the handler calls its cache may be anything
            self._context.cache.pop(job.request.id, None)
        try:
            self._channel.send(job.batch, [answer])
        except ValueError as error:  # headers that are too large for the wire
            self._channel.send(job.batch, [self._invoker.fail_element(job.request, error)])

    # --- a step ---------------------------------------------------------------------------------------------------

    def _step(self, jobs: list[Job]) -> None:
        """One call of the handler; several, if it fails."""
        invoker = self._invoker
        saved = [_Saved(self._context.cache, job.request.id) for job in jobs] if len(jobs) > 1 else []
        for job in jobs:
            if saved and not job.has_begun:
                job.request.keep_body()
        streamed = {index for index, job in enumerate(jobs) if job.has_streamed}
        sent_before = len(streamed)
        requests = [job.request for job in jobs]
        call = Call(invoker, requests, streamed=streamed, parts=_JobParts(self._channel, jobs))
        before = call.context.stopping_criteria
        invoker.called_at = time.monotonic()
        outcome = call.invoke()
        for index in streamed:
            jobs[index].has_streamed = True
        try:
            if outcome.error is None:
                self._answer(jobs, call, outcome.results, are_new=call.context.stopping_criteria is not before)
                return
        finally:
            call.close()
        failure = describe_failure(outcome.error, invoker.model_dir)
        may_retry = not (
            outcome.is_shape or len(streamed) > sent_before or isinstance(outcome.error, HandlerTimeout)
        ) and invoker.may_run_again(failure)
        if len(jobs) > 1 and may_retry:
            self._try_again(jobs, saved, failure)
        else:
            self._fail(jobs, failure)

    def _fail(self, jobs: list[Job], failure: Failure) -> None:
        answers = self._invoker.fail([job.request for job in jobs], failure)
        for job, answer in zip(jobs, answers, strict=True):
            self._end(job, answer)
        self._invoker.leave_if_lost()

    def _try_again(self, jobs: list[Job], saved: list[_Saved], failure: Failure) -> None:
        """Calls the handler for fewer requests at a time."""
        lost, old, new = [], [], []
        for job, held in zip(jobs, saved, strict=True):
            if not job.has_begun:
                new.append(job)
            elif held.is_whole():
                old.append(job)
            else:
                lost.append(job)
        for held in saved:
            held.put_back()
        if lost:
            self._fail(lost, failure)
        for job in new:
            job.request.put_body_back()
            with contextlib.suppress(Exception):
                self._invoker._decode(job.request)
        for job in old:
            job.request.row = {}
        for group in _groups(old, new, is_memory=failure.status == 507):
            self._step(group)

    def _answer(self, jobs: list[Job], call: Call, results: list[Any], *, are_new: bool) -> None:
        for index, (job, result) in enumerate(zip(jobs, results, strict=True)):
            try:
                if not self._is_over(call, index, result, len(jobs), are_new=are_new):
                    call.send_part(index, result, call.context)
                    job.has_streamed = job.has_begun = True
                    job.request.row = {}
                    job.request.body = bytearray()
                    continue
                answer = self._invoker.encode(result, job.request, call.context, index, kind=job.final_kind)
            except EOFError:
                raise
            except BaseException as error:  # the others' answers are not touched by this one's
                answer = self._invoker.fail_element(job.request, error)
            self._end(job, answer)

    def _is_over(self, call: Call, index: int, result: Any, count: int, *, are_new: bool) -> bool:
        """Whether ``result`` is the last of its request.

        Args:
            are_new: the call has set the criteria; else they are those of `initialize` or of a step before, as in
                TorchServe, of which there may be more than requests.

        Raises:
            HandlerError: there is no criterion for it.
        """
        criteria = call.context.stopping_criteria
        if not criteria or isinstance(result, BaseException):
            return True
        if len(criteria) < count or (are_new and len(criteria) > count):
            raise HandlerError(
                "Prediction failed",
                detail={
                    "text": f"context.stopping_criteria has {len(criteria)} elements for a batch of {count}",
                    "exception": "ValueError", "where": self._invoker._entry.place,
                    "fix": "set one criterion per element of data, in order, in each call",
                },
            )  # fmt: skip
        criterion = criteria[index]
        if criterion is None:
            return True
        self._invoker.is_calling = True  # it is the handler's code
        try:
            said = criterion(result)
        finally:
            self._invoker.is_calling = False
        return said is None or bool(said)


def _groups(old: list[Job], new: list[Job], *, is_memory: bool) -> list[list[Job]]:
    """How a step that failed is divided."""
    jobs = [*old, *new]
    if is_memory:  # what did not fit at once may fit in two goes
        devices.give_back()
        middle = (len(jobs) + 1) // 2
        return [group for group in (jobs[:middle], jobs[middle:]) if group]
    if old and new:
        return [old, *([job] for job in new)]
    return [[job] for job in jobs]
