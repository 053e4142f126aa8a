"""Calls a handler for a batch: requests become rows, what comes back becomes answers, and whatever goes wrong becomes
an answer for the request at fault.

A batch is a set of independent outcomes: what cannot be decoded never reaches the handler, a batch whose call fails is
called again item by item, once, and a result that cannot be encoded fails alone.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from pyserve import codec
from pyserve.context import Context
from pyserve.entry_point import EntryPoint
from pyserve.errors import HandlerError, JsonObject, ServeError
from pyserve.failure import Failure, HandlerTimeout, describe_failure
from pyserve.streaming import STREAM_HEADER, encode_part
from pyserve.worker_spec import WorkerSpec

# csrc/frame.h
ANSWER, ERROR, CHUNK, LAST = range(4)
DESCRIBE = 1

Item = tuple[int, int, bytes, bytearray]  # ticket, flags, head, body
Answer = tuple[int, int, int, bytes, Any]  # ticket, kind, status, head, body
LogFailure = Callable[[list[str], Failure], None]


class Parts:
    """Where parts of streamed answers go; this one has nowhere to send them."""

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        raise NotImplementedError

    def is_cancelled(self, ticket: int) -> bool:
        """Whether nobody waits for the answer any more."""
        return False


class WorkerRequest:
    """One request as it came over the wire, with what `codec.decode_request` asks for."""

    __slots__ = ("body", "flags", "headers", "id", "query", "row", "ticket")

    def __init__(self, item: Item):
        self.ticket, self.flags, head, self.body = item
        self.id, headers, self.query = head.decode("latin-1").split("\0")
        texts = headers.split("\n") if headers else []
        self.headers: list[tuple[str, Any]] = list(zip(texts[::2], texts[1::2], strict=True))
        self.row: dict[str, Any] = {}

    def header(self, name: str, default: str = "") -> str:
        """Value of header ``name`` (any case); of a repeated one the last."""
        found = default
        for key, value in self.headers:
            if key.lower() == name:
                found = value
        return found

    @property
    def content_type(self) -> str:
        """Media type in lower case without parameters, ``""`` if there is none."""
        return self.header("content-type").partition(";")[0].strip().lower()


class Outcome(NamedTuple):
    """What a call of the handler gave: results, one per request, or what it raised."""

    results: list[Any]
    error: BaseException | None


class Invoker:
    """One handler, called batch by batch.

    Args:
        entry: initialized.
        context: the model's.
        parts: where parts of streamed answers go.
        log_failure: told of each failure that is not what the handler meant: ids of the requests, and what it was.

    Attributes:
        is_calling: whether the handler runs; read by the signal handler that interrupts it.
        called_at: when it was called, ``time.monotonic()``.
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
        self._warned_not_finite = False
        self.is_calling = False
        self.called_at = 0.0

    def run(self, items: list[Item]) -> list[Answer]:
        """One final answer per item. Parts of streamed answers are sent meanwhile."""
        answers: list[Answer] = []
        requests: list[WorkerRequest] = []
        for item in items:
            request = WorkerRequest(item)
            try:
                self._decode(request)
            except ServeError as error:
                answers.append(_error_answer(request.ticket, error.body()))
                continue
            if request.flags & DESCRIBE:
                answers += self._run_batch([request])
            else:
                requests.append(request)
        if requests:
            answers += self._run_batch(requests)
        return answers

    # --- in -------------------------------------------------------------------------------------------------------

    def _decode(self, request: WorkerRequest) -> None:
        if request.flags & DESCRIBE:
            return
        request.row = row = codec.decode_request(request, decode=self._spec.decode_input)
        if request.query:
            for part in request.query.replace(";", "&").split("&"):
                key, _, value = part.partition("=")
                if key:
                    row[unquote_plus(key)] = unquote_plus(value)
        if "body" in row:
            # TorchServe's handlers find a parameter's own content type under its name.
            content_type = request.header("content-type")
            if content_type:
                request.headers.append(("body", {"content-type": content_type}))

    # --- the call -------------------------------------------------------------------------------------------------

    def _run_batch(self, requests: list[WorkerRequest]) -> list[Answer]:
        call = _Call(self, requests)
        outcome = call.invoke()
        if outcome.error is None:
            return call.answers(outcome.results)
        failure = describe_failure(outcome.error, self._spec.model_dir)
        may_retry = len(requests) > 1 and not call.has_streamed and not isinstance(outcome.error, HandlerTimeout)
        if may_retry and failure.status == 507:
            return self._retry_halves(requests)
        if may_retry and self._spec.isolate_errors:
            return [answer for request in requests for answer in self._run_batch([request])]
        if not failure.is_expected:
            self._log_failure([request.id for request in requests], failure)
        body = {"status": failure.status, "type": failure.type, "message": failure.message, "detail": failure.detail()}
        return [_error_answer(request.ticket, body) for request in requests]

    def _retry_halves(self, requests: list[WorkerRequest]) -> list[Answer]:
        """Memory ran out: what did not fit at once may fit in two goes."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        middle = len(requests) // 2
        return self._run_batch(requests[:middle]) + self._run_batch(requests[middle:])

    def fail_element(self, request: WorkerRequest, error: BaseException) -> Answer:
        """The answer of a request whose result cannot be used."""
        failure = describe_failure(error, self._spec.model_dir)
        if not failure.is_expected:
            self._log_failure([request.id], failure)
        body = {"status": failure.status, "type": failure.type, "message": failure.message, "detail": failure.detail()}
        return _error_answer(request.ticket, body)

    def encode(self, value: Any, request: WorkerRequest, context: Context, index: int, *, kind: int) -> Answer:
        """A result as an answer.

        Raises:
            HandlerError: it cannot be encoded, or is too large.
        """
        if type(value) is not bytes and type(value) is not str:
            if isinstance(value, BaseException):
                return self.fail_element(request, value)
            value = self._prepared(value, context, index)
        body = value if type(value) is bytes else codec.encode_result(value)
        if len(body) > self._spec.max_response_size:
            raise HandlerError(
                f"the answer has {len(body)} bytes, more than max_response_size={self._spec.max_response_size}; "
                "raise it in config.properties"
            )
        status, phrase = context.get_response_status(index)
        return (request.ticket, kind, status, _head(phrase, context.get_response_headers(index)), body)

    def _prepared(self, value: Any, context: Context, index: int) -> Any:
        """What JSON has no word for, made into something that it has."""
        image = sys.modules.get("PIL.Image")
        if image is not None and isinstance(value, image.Image):
            import io

            file = io.BytesIO()
            value.save(file, "PNG")
            if context.get_response_content_type(index) is None:
                context.set_response_content_type(index, "image/png")
            return file.getvalue()
        return value


class _Call:
    """One call of the handler: its batch, its context, and what was streamed while it ran."""

    def __init__(self, invoker: Invoker, requests: list[WorkerRequest]):
        self._invoker = invoker
        self._requests = requests
        self._streamed: set[int] = set()
        self.context = invoker._context.for_batch(
            [request.id for request in requests], [request.headers for request in requests]
        )
        self.context.cl_socket = self
        metrics = self.context.metrics
        if metrics is not None:
            metrics.bind(self.context.request_ids)
        if requests[0].flags & DESCRIBE:
            self._rows: list[dict[str, Any]] = [{}]
        else:
            self._rows = [request.row for request in requests]

    @property
    def has_streamed(self) -> bool:
        return bool(self._streamed)

    def invoke(self) -> Outcome:
        """Calls the handler and checks the shape of what it returns."""
        invoker = self._invoker
        try:
            try:
                invoker.called_at = time.monotonic()
                invoker.is_calling = True
                returned = invoker._entry(self._rows, self.context)
                if inspect.iscoroutine(returned):
                    returned = invoker._entry.run(returned)
                if inspect.isgenerator(returned):
                    returned = self._drain(returned)
            finally:
                invoker.is_calling = False
            return Outcome(_checked(returned, len(self._requests)), None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and the like too: a handler must not take the worker along
            return Outcome([], error)

    def _drain(self, generator: Iterator[Any]) -> list[Any]:
        """The parts that a generator yields; the last one is what is answered in the end."""
        count = len(self._requests)
        held: list[Any] | None = None
        for parts in generator:
            batch = parts if isinstance(parts, list) and (count > 1 or len(parts) == 1) else [parts]
            _checked(batch, count)
            if held is not None and not self._send_all(held):
                generator.close()  # type: ignore[attr-defined]
                break
            held = batch
        return held if held is not None else [b""] * count

    def _send_all(self, parts: list[Any]) -> bool:
        sent = [self.send_part(index, part, self.context) for index, part in enumerate(parts)]
        return any(sent)

    def send_part(self, index: int, part: Any, context: Context) -> bool:
        """`streaming.PartSink`."""
        request = self._requests[index]
        parts = self._invoker._parts
        if parts.is_cancelled(request.ticket):
            return False
        head = b""
        status = 200
        if index not in self._streamed:
            self._streamed.add(index)
            context.set_response_header(index, STREAM_HEADER, "true")
            status, phrase = context.get_response_status(index)
            head = _head(phrase, context.get_response_headers(index))
        parts.send((request.ticket, CHUNK, status, head, encode_part(part)))
        return True

    def answers(self, results: list[Any]) -> list[Answer]:
        """The final answers, one per request."""
        invoker = self._invoker
        answers = []
        for index, (request, result) in enumerate(zip(self._requests, results, strict=True)):
            try:
                value = self._drain_one(index, result) if inspect.isgenerator(result) else result
                kind = LAST if index in self._streamed else ANSWER
                answers.append(invoker.encode(value, request, self.context, index, kind=kind))
            except Exception as error:
                answers.append(invoker.fail_element(request, error))
        return answers

    def _drain_one(self, index: int, generator: Iterator[Any]) -> Any:
        held: Any = b""
        is_first = True
        for part in generator:
            if not is_first and not self.send_part(index, held, self.context):
                generator.close()  # type: ignore[attr-defined]
                break
            held, is_first = part, False
        return held


def _checked(returned: Any, count: int) -> list[Any]:
    """``returned`` if it is a list of ``count``.

    Raises:
        HandlerError: in TorchServe's words; the detail says what was returned and how to mend it.
    """
    if not isinstance(returned, list):
        kind = type(returned).__name__
        if returned is None:
            mend = "return the answers: a list with one element per element of data"
        elif count == 1:
            mend = "wrap it: return [result]"
        else:
            mend = f"return a list with one element per element of data, {count} here, in order"
        raise HandlerError(
            "Invalid model predict output",
            detail={"text": f"the handler returned {kind} for a batch of {count}; {mend}", "exception": "TypeError"},
        )
    if len(returned) != count:
        hint = "Does it read data[0] only? " if len(returned) == 1 else ""
        raise HandlerError(
            "number of batch response mismatched",
            detail={
                "text": f"the handler returned a list of {len(returned)} for a batch of {count}; return one element "
                f"per element of data, in order. {hint}`pyserve check` tries it with several batch sizes",
                "exception": "ValueError",
            },
        )
    return returned


def _head(phrase: str | None, headers: dict[str, str]) -> bytes:
    if not phrase and not headers:
        return b""
    texts = [phrase or "", *(text for pair in headers.items() for text in pair)]
    return "\n".join(text.replace("\n", " ").replace("\r", " ") for text in texts).encode("latin-1", "replace")


def _error_answer(ticket: int, body: JsonObject) -> Answer:
    told = {"status": body.get("status", body.get("code", 500)), "type": body["type"], "message": body["message"],
            "detail": body.get("detail", {})}  # fmt: skip
    return (ticket, ERROR, told["status"], b"", json.dumps(told).encode())


def report_failure(report: Callable[..., None]) -> LogFailure:
    """Sends failures as records of the log, each as one."""

    def log_failure(ids: list[str], failure: Failure) -> None:
        text = f"request {', '.join(ids)} failed in {failure.where}: {failure.line()}\n{failure.traceback}"
        report("log", level=logging.getLevelName(logging.ERROR), logger="", text=text,
               request_id=ids[0] if len(ids) == 1 else None)  # fmt: skip

    return log_failure
