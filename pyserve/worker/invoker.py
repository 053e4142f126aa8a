"""Calls a handler for a batch: requests become rows, what comes back becomes answers, and whatever goes wrong becomes
an answer for the request at fault.

A batch is a set of independent outcomes: what cannot be decoded never reaches the handler, a batch whose call fails is
called again item by item, once, and a result that cannot be encoded fails alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from pyserve import devices
from pyserve.answer_head import AnswerHead, answer_head
from pyserve.context import Batch, Context
from pyserve.errors import HandlerError, InputError, ServeError
from pyserve.handlers import row_check
from pyserve.request import codec
from pyserve.request.stages import TIMED, worker_note
from pyserve.worker.answer import (
    ANSWER,
    CHUNK,
    ERROR,
    LAST,
    RAN_TWICE,
    Answer,
    LogFailure,
    Parts,
    error_answer,
    head_bytes,
    prepared,
    settled,
)
from pyserve.worker.entry_point import EntryPoint
from pyserve.worker.failure import PREDICTION_FAILED, Failure, HandlerTimeout, describe_failure
from pyserve.worker.lost_device import DeviceLostError, lost_device
from pyserve.worker.request import DESCRIBE, Item, WorkerRequest
from pyserve.worker.result_check import Outcome, ShapeProblem, explain_shape
from pyserve.worker.spec import WorkerSpec
from pyserve.worker.streaming import STREAM_HEADER


class _ShapeError(HandlerError):
    """A handler returned something else than a list with one element per request."""


class Invoker:
    """One handler, called batch by batch.

    Args:
        entry: initialized.
        context: the model's.
        parts: where parts of streamed answers go.
        log_failure: told of each failure that is not what the handler meant: ids of the requests, and what it was.

    Attributes:
        is_calling: whether the handler runs; read by the signal handler that interrupts it.
        called_at: when `run` began, ``time.monotonic()``.
        call_began_at, call_ended_at: of the last call of the handler, ``time.monotonic_ns()``.
        has_answered: whether some request of the last batch was answered otherwise than with an error.
        sent: tickets of the last batch whose answers have been sent.
        device_loss: what is wrong with the device, once a failure has broken it; `leave` ends the process for that.
    """

    def __init__(
        self, spec: WorkerSpec, entry: EntryPoint, context: Context, *, parts: Parts | None = None,
        log_failure: LogFailure = lambda ids, failure: None,
    ):  # fmt: skip
        self._spec = spec
        self._entry = entry
        self._context = context
        self._parts = parts or Parts()
        self._log_failure = log_failure
        self._has_warned_of_nan = False
        self.is_calling = False
        self.called_at = 0.0
        self.call_began_at = self.call_ended_at = 0
        self.has_answered = False
        self.sent: set[int] = set()
        self.device_loss = ""
        self.leave: Callable[[str], object] = lambda loss: None
        self._timed: frozenset[int] = frozenset()
        self._began_at = 0

    def run(self, items: list[Item]) -> list[Answer]:
        """One final answer per item, but for those that have been sent: parts of streamed answers are sent meanwhile,
        and, where requests are run again one by one, the answers of those before.
        """  # fmt: skip
        began_at = self._began_at = time.monotonic_ns()
        self.called_at = began_at / 1e9
        self.has_answered = False
        self.sent.clear()
        self._timed = frozenset()
        answers: list[Answer] = []
        requests: list[WorkerRequest] = []
        for item in items:
            request, refusal = self.read(item)
            if refusal is not None:
                answers.append(refusal)
                continue
            if request.flags & DESCRIBE:
                answers += self._run_batch([request])
            else:
                requests.append(request)
        if requests:
            first, *more = self._split(requests)
            self._timed = frozenset(request.ticket for request in requests if request.flags & TIMED)
            if more:
                answers += settled(self._run_batch(first))
                for together in more:
                    answers += settled(self._run_batch(together))
            else:
                answers = self._run_batch(first, before=answers)
        return self._noted(answers)

    def _noted(self, answers: list[Answer]) -> list[Answer]:
        """With the times that some requests ask for."""
        if not self.has_answered:
            self.has_answered = any(answer[1] != ERROR for answer in answers)
        if not self._timed:
            return answers
        times = (self._began_at, self.call_began_at, self.call_ended_at, time.monotonic_ns())
        return [
            (ticket, kind, status, worker_note(head, *times) if ticket in self._timed else head, body)
            for ticket, kind, status, head, body in answers
        ]

    def _split(self, requests: list[WorkerRequest]) -> list[list[WorkerRequest]]:
        """Those that one call may answer. Handlers look at the first request only to see whether an explanation is
        wanted, and of what class."""
        if len(requests) == 1:
            return [requests]
        explained = [request for request in requests if request.header("explain") == "True"]
        if not explained:
            return [requests]
        others = [request for request in requests if request.header("explain") != "True"]
        takes_first = self._entry.inherits("explain_handle")
        groups = [others, *([request] for request in explained)] if takes_first else [others, explained]
        return [group for group in groups if group]

    # --- in -------------------------------------------------------------------------------------------------------

    @property
    def model_dir(self) -> str:
        """Folder of the unpacked archive."""
        return self._spec.model_dir

    def context_copy(self) -> Context:
        """A copy of the context, for a call during which there are others."""
        return self._context.for_batch((), ())

    def read(self, item: Item) -> tuple[WorkerRequest, Answer | None]:
        """The request of ``item``; and its answer, if its body cannot be decoded."""
        request = WorkerRequest(item)
        try:
            self._decode(request)
        except ServeError as error:
            return request, error_answer(request.ticket, error.body())
        except BaseException as error:  # one broken body must not cost the others
            return request, self.fail_element(request, error)
        return request, None

    def _decode(self, request: WorkerRequest) -> None:
        if request.flags & DESCRIBE:
            request.set_types({})
            return
        spec, handler = self._spec, self._entry.handler
        is_built_in = row_check.is_built_in(handler) and not spec.lenient
        types: dict[str, str] = {}
        if request.flags & codec.FIELDS:
            row = codec.split_fields(request.body, request.query)
            types = dict.fromkeys(row, "")
        else:
            row = codec.decode_request(
                request, decode=spec.decode_input, types=types, lenient=spec.lenient, is_built_in=is_built_in
            )
            if request.query:
                codec.add_query(row, request.query, types=types, lenient=spec.lenient)
        request.set_types(types)
        if is_built_in:
            row_check.check_row(handler, row, types, decodes=spec.decode_input, start_key=spec.header_keys[1])
        request.row = row

    # --- the call -------------------------------------------------------------------------------------------------

    def _run_batch(self, requests: list[WorkerRequest], before: list[Answer] | None = None) -> list[Answer]:
        """Args: ``before``: answers that go with these, if there is nothing else to be run."""
        call = Call(self, requests)
        if len(requests) > 1:
            for request in requests:
                request.keep_body()
        outcome = call.invoke()
        try:
            if outcome.error is None:
                answers = call.answers(outcome.results)
                return before + answers if before else answers
        finally:
            call.close()
        failure = self._described(outcome.error)
        if not failure.is_expected and failure.status not in (504, 507) and not outcome.is_shape:
            self.device_loss = lost_device()
        may_retry = len(requests) > 1 and not (
            outcome.is_shape or call.has_streamed or isinstance(outcome.error, HandlerTimeout)
        )
        if not (may_retry and self.may_run_again(failure)):
            return (before or []) + self.fail(requests, failure)
        if self.device_loss:
            raise DeviceLostError(self.device_loss)
        if failure.status == 507:
            return (before or []) + self._retry_halves(requests)
        return self._run_each_again(requests, before)

    def _run_each_again(self, requests: list[WorkerRequest], before: list[Answer] | None) -> list[Answer]:
        """One by one. Should one of them end this process, those before it are answered, those after it have run once.
        ``before`` is None where there are others in the batch of which that is not known.
        """  # fmt: skip
        answers = before or []
        for request in requests:
            is_sent = before is not None and self._parts.begin_alone(request.ticket, self._noted(answers))
            if is_sent:
                self.sent.update(ticket for ticket, *_ in answers)
                answers = []
            for ticket, kind, status, head, body in self._run_again([request]):
                answers.append((ticket, kind, status, RAN_TWICE if is_sent and kind == ERROR else head, body))
            if self.device_loss:  # the others are another worker's
                break
        return answers

    def may_run_again(self, failure: Failure) -> bool:
        """Whether requests that failed together are called again with fewer others."""
        return not self._spec.has_side_effects and (failure.status == 507 or self._spec.isolate_errors)

    def _run_again(self, requests: list[WorkerRequest]) -> list[Answer]:
        for request in requests:
            request.put_body_back()
            with contextlib.suppress(Exception):
                self._decode(request)  # the call that failed may have changed its rows
        return settled(self._run_batch(requests))

    def _retry_halves(self, requests: list[WorkerRequest]) -> list[Answer]:
        """Memory ran out: what did not fit at once may fit in two goes."""
        devices.give_back()
        middle = len(requests) // 2
        first = self._run_again(requests[:middle])
        return first if self.device_loss else first + self._run_again(requests[middle:])

    def fail_element(self, request: WorkerRequest, error: BaseException) -> Answer:
        """The answer of a request whose result cannot be used."""
        return self.fail([request], self._described(error))[0]

    def _described(self, error: BaseException) -> Failure:
        failure = describe_failure(error, self._spec.model_dir)
        if self._spec.lenient and isinstance(error, InputError):  # as TorchServe answers any exception of a handler
            told = HandlerError(PREDICTION_FAILED)
            return dataclasses.replace(failure, status=told.status, type=told.type, message=told.message)
        return failure

    def fail(self, requests: list[WorkerRequest], failure: Failure) -> list[Answer]:
        """One answer per request that says what failed; one record in the log."""
        if not failure.is_expected:
            self._log_failure([request.id for request in requests], failure)
        body = {"status": failure.status, "type": failure.type, "message": failure.message, "detail": failure.detail()}
        return [error_answer(request.ticket, body) for request in requests]

    def leave_if_lost(self) -> None:
        """Where calls overlap: to be called when a failure has been answered, which may have broken the device."""
        if loss := lost_device():
            self.leave(loss)

    def encode(self, value: Any, request: WorkerRequest, context: Context, index: int, *, kind: int) -> Answer:
        """A result as an answer.

        Raises:
            HandlerError: it cannot be encoded, or is too large.
        """
        body: Any = value
        if type(value) is not bytes:
            if isinstance(value, BaseException):
                return self.fail_element(request, value)
            body = self.encode_body(value, context, index)
        if len(body) > self._spec.max_response_size:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={self._spec.max_response_size}; "
                "raise it in config.properties",
                detail={"where": self._entry.place},
            )
        head = self.head(context, index)
        return (request.ticket, kind, head.status, head_bytes(head), body)

    def head(self, context: Context, index: int) -> AnswerHead:
        """What the handler set for an answer.

        Raises:
            HandlerError: it cannot be sent; names the handler.
        """
        try:
            return answer_head(context, index, is_strict=self._spec.lenient)
        except HandlerError as error:
            error.detail["where"] = self._entry.place
            raise

    def encode_body(self, value: Any, context: Context, index: int) -> Any:
        """A result, or a part of it, as bytes.

        Raises:
            HandlerError: it cannot be encoded; names the place in it, and the handler.
        """
        if type(value) is not str:
            value = prepared(value, context, index)
        try:
            return codec.encode_result(value, self._warn_of_nan if self._spec.nan_as_null else None)
        except HandlerError as error:
            error.detail["text"] = f"element {index} of the result: {error.detail['text']}"
            error.detail["where"] = self._entry.place
            raise

    def _warn_of_nan(self) -> None:
        if not self._has_warned_of_nan:
            self._has_warned_of_nan = True
            logging.getLogger("pyserve.worker").warning("%s: %s", self._entry.place, codec.NAN_WARNING)


class Call:
    """One call of the handler: its batch, its context, and what was streamed while it ran.

    Its context is about its batch until the next call is made, so a call is made when those before it are answered.
    """

    def __init__(
        self, invoker: Invoker, requests: list[WorkerRequest], *, streamed: set[int] | None = None,
        parts: Parts | None = None, context: Context | None = None,
    ):  # fmt: skip
        self._invoker = invoker
        self._requests = requests
        self._parts = parts or invoker._parts
        self._streamed: set[int] = streamed if streamed is not None else set()
        deadlines = [request.deadline for request in requests]
        # The very object that `initialize` was given, which handlers keep.
        self.context = context or invoker._context
        self._batch = Batch([request.id for request in requests], [request.headers for request in requests],
                            deadlines if any(deadlines) else ())  # fmt: skip
        self._batch.sink = self
        self.context.bind(self._batch)
        metrics = self.context.metrics
        if metrics is not None:
            metrics.bind(self.context.request_ids or {})
        if requests[0].flags & DESCRIBE:
            self.rows: list[dict[str, Any]] = [{}]
        else:
            self.rows = [request.row for request in requests]

    @property
    def has_streamed(self) -> bool:
        return bool(self._streamed)

    def close(self) -> None:
        """Its answers have been made: the context that stays with the handler holds no body, and sends no part."""
        self._batch.sink = None
        self.rows = []

    def invoke(self) -> Outcome:
        """Calls the handler and checks the shape of what it returns."""
        invoker = self._invoker
        try:
            try:
                invoker.is_calling = True
                invoker.call_began_at = time.monotonic_ns()
                returned = invoker._entry(self.rows, self.context)
                if inspect.iscoroutine(returned):
                    returned = invoker._entry.run(returned)
                if inspect.isgenerator(returned):
                    returned = self._drain(returned)
            finally:
                invoker.is_calling = False
                invoker.call_ended_at = time.monotonic_ns()
        except _ShapeError as error:
            return Outcome([], error, is_shape=True)
        except BaseException as error:  # SystemExit and the like too: a handler must not take the worker along
            return Outcome([], error)
        try:
            return Outcome(self.checked(returned), None)
        except BaseException as error:  # of any kind too: it asks the object what it is
            return Outcome([], error, is_shape=True)

    def checked(self, returned: Any) -> list[Any]:
        """``returned`` if it is a list with one element per request.

        Raises:
            _ShapeError: in TorchServe's words; the detail says what was returned and how to fix it.
        """
        count = len(self._requests)
        if isinstance(returned, list) and len(returned) == count:
            return returned
        problem = explain_shape(returned, count) or ShapeProblem("type", "returned a stream", "yield lists")
        raise _ShapeError(
            "number of batch response mismatched" if isinstance(returned, list) else "Invalid model predict output",
            detail={
                "text": f"the handler {problem.what}", "exception": "ValueError", "where": self._invoker._entry.place,
                "fix": f"{problem.fix}; `pyserve check` tries it with several batch sizes",
            },
        )  # fmt: skip

    def _drain(self, generator: Iterator[Any]) -> list[Any]:
        """The parts that a generator yields; the last one is what is answered in the end."""
        count = len(self._requests)
        held: list[Any] | None = None
        try:
            for parts in generator:
                batch = parts if isinstance(parts, list) and (count > 1 or len(parts) == 1) else [parts]
                self.checked(batch)
                if held is not None and not self._send_all(held):
                    generator.close()  # type: ignore[attr-defined]
                    break
                held = [self.settled(index, part) for index, part in enumerate(batch)]
        except BaseException:
            if held is not None and self.has_streamed:  # what was yielded before the failure
                self._send_all(held)
            raise
        return held if held is not None else [b""] * count

    def settled(self, index: int, part: Any) -> Any:
        """A part as it is now, or why it has no bytes: a generator may change what it yielded in its next step."""
        if isinstance(part, (bytes, str, BaseException)):
            return part
        try:
            return bytes(self._invoker.encode_body(part, self.context, index))
        except Exception as error:
            return error

    def _send_all(self, parts: list[Any]) -> bool:
        sent = [self.send_part(index, part, self.context) for index, part in enumerate(parts)]
        return any(sent)

    def send_part(self, index: int, part: Any, context: Context) -> bool:
        """`streaming.PartSink`."""
        request = self._requests[index]
        parts = self._parts
        if parts.is_cancelled(request.ticket):
            return False
        if isinstance(part, BaseException):
            raise part
        body = part if type(part) is bytes else self._invoker.encode_body(part, context, index)
        head = b""
        status = 200
        if index not in self._streamed:
            context.set_response_header(index, STREAM_HEADER, "true")
            set_head = self._invoker.head(context, index)
            status, head = set_head.status, head_bytes(set_head)
            self._streamed.add(index)
        parts.send((request.ticket, CHUNK, status, head, body))
        return True

    def is_cancelled(self, index: int | None = None) -> bool:
        """`streaming.PartSink`."""
        is_cancelled = self._parts.is_cancelled
        asked = self._requests if index is None else [self._requests[index]]
        return all(is_cancelled(request.ticket) for request in asked)

    def answers(self, results: list[Any]) -> list[Answer]:
        """The final answers, one per request."""
        invoker = self._invoker
        answers = []
        for index, (request, result) in enumerate(zip(self._requests, results, strict=True)):
            try:
                value = self._drain_one(index, result) if inspect.isgenerator(result) else result
                kind = LAST if index in self._streamed else ANSWER
                answers.append(invoker.encode(value, request, self.context, index, kind=kind))
            except BaseException as error:  # the others' answers are not touched by this one's
                answers.append(invoker.fail_element(request, error))
        return answers

    def _drain_one(self, index: int, generator: Iterator[Any]) -> Any:
        invoker = self._invoker
        held: Any = b""
        is_first = True
        try:
            invoker.is_calling = True  # the code of a generator runs here
            for part in generator:
                if not is_first and not self.send_part(index, held, self.context):
                    generator.close()  # type: ignore[attr-defined]
                    break
                held, is_first = self.settled(index, part), False
        except BaseException:
            if index in self._streamed:  # what was yielded before the failure
                self.send_part(index, held, self.context)
            raise
        finally:
            invoker.is_calling = False
        return held
