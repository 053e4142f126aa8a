"""Answers as a worker process sends them, and where parts of them go that are sent before the last one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from pyserve.answer_head import AnswerHead
from pyserve.context import Context
from pyserve.errors import HandlerError, JsonObject
from pyserve.worker.failure import Failure

# csrc/frame.h
ANSWER, ERROR, CHUNK, LAST = range(4)
HEAD_SIZE_MAX = 1 << 20

Answer = tuple[int, int, int, bytes, Any]  # ticket, kind, status, head, body

# Head of the error of a request that was run a second time in this process: it is not to be run a third time.
RAN_TWICE = b"ran twice"

LogFailure = Callable[[list[str], Failure], None]


class Parts:
    """Where parts of streamed answers go; this one has nowhere to send them."""

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        raise NotImplementedError

    def is_cancelled(self, ticket: int) -> bool:
        """Whether nobody waits for the answer any more."""
        return False

    def begin_alone(self, ticket: int, answers: list[Answer]) -> bool:
        """A request is run a second time, by itself. Sends what is answered already, since it may end the process.

        Returns whether it did, so that ``answers`` need not be sent any more.
        """
        return False


def settled(answers: list[Answer]) -> list[Answer]:
    """The answers as they are now: the handler's next call may write to the same memory."""
    return [
        (ticket, kind, status, head, body if type(body) is bytes else bytes(body))
        for ticket, kind, status, head, body in answers
    ]


def head_bytes(told: AnswerHead) -> bytes:
    """Phrase and headers, joined by newlines; nothing if there are none.

    Raises:
        HandlerError: they are too large.
    """
    if not told.reason and not told.headers:
        return b""
    texts = [told.reason, *(text for pair in told.headers.items() for text in pair)]
    head = "\n".join(texts).encode("latin-1")
    if len(head) > HEAD_SIZE_MAX:
        raise HandlerError(f"the response headers have {len(head)} bytes; {HEAD_SIZE_MAX} are allowed")
    return head


def prepared(value: Any, context: Context, index: int) -> Any:
    """What JSON has no word for, made into something that it has."""
    image_class = getattr(sys.modules.get("PIL.Image"), "Image", None)
    if image_class is not None and isinstance(value, image_class):
        import io

        file = io.BytesIO()
        value.save(file, "PNG")
        if context.get_response_content_type(index) is None:
            context.set_response_content_type(index, "image/png")
        return file.getvalue()
    return value


def error_answer(ticket: int, body: JsonObject) -> Answer:
    """An error as the server makes its answer of it."""
    told = {"status": body.get("status", body.get("code", 500)), "type": body["type"], "message": body["message"],
            "detail": body.get("detail", {})}  # fmt: skip
    return (ticket, ERROR, told["status"], b"", json.dumps(told).encode())


def report_failure(report: Callable[..., None]) -> LogFailure:
    """Sends failures as records of the log, each as one."""

    def log_failure(ids: list[str], failure: Failure) -> None:
        text = f"request {', '.join(ids)} failed in {failure.where}: {failure.line()}\n{failure.traceback}"
        report("log", level=logging.getLevelName(logging.ERROR), logger="", text=text, request_id=",".join(ids))

    return log_failure


class ChannelParts(Parts):
    """Parts of streamed answers, sent at once."""

    def __init__(self, channel: Any):
        self._channel = channel
        self.batch = 0

    def send(self, answer: Answer) -> None:
        """Sends one part."""
        self._channel.send(self.batch, [answer])

    def begin_alone(self, ticket: int, answers: list[Answer]) -> bool:
        """As said there."""
        for answer in answers:
            self._channel.send(self.batch, [answer])
        self._channel.begin_alone(ticket)
        return True

    def is_cancelled(self, ticket: int) -> bool:
        """Whether its client has gone."""
        return bool(self._channel.is_cancelled(ticket))
