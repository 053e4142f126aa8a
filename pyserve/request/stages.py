"""Where a request's time went: when each of its stages began and ended, for ``Server-Timing`` and spans.

Kept only for requests that ask for it, with ``x-server-timing: 1``, or when the configuration does so for all.

    admission     from its arrival until somebody began to preprocess it (native lane)
    preprocess    its body becomes an input
    queue         until a worker took it
    staging       gathering the batch; python lane: the way to the worker process
    inference     the network, or the handler's call
    postprocess   the result becomes an answer
    delivery      what is between them: until the loop came to it
"""

from __future__ import annotations

import time
from typing import Any

from pyserve.errors import BadRequestError, shown
from pyserve.request.messages import ASK_HEADER, Request, Response

ANSWER_HEADER = "Server-Timing"
# Behind the head of a worker's answer: when it began, called, had called and was done, ns of time.monotonic_ns().
WORKER_MARK = b"\nx-pyserve-stages\n"
# Flag of an item that wants that.
TIMED = 4
_YES, _NO = ("1", "true"), ("0", "false")


class Stages:
    """The stages of one request so far.

    Attributes:
        is_told: whether the answer is to tell them.
        times: name -> (began, ended), ns of ``time.monotonic_ns()``.
        release: why its batch left the queue (csrc/release.h); ``""`` while it has not.
        batch_size: requests in that batch.
        span: the request's span, if there are spans.
    """

    __slots__ = ("batch_size", "is_told", "release", "span", "times")

    def __init__(self, *, is_told: bool):
        self.is_told = is_told
        self.times: dict[str, tuple[int, int]] = {}
        self.release = ""
        self.batch_size = 0
        self.span: Any = None

    def note_native(self, completion: Any, queued_at: int) -> None:
        """A batch of the native lane came to an end."""
        self._note_batch(completion)
        self.times["queue"] = (queued_at, completion.started_at)
        self.times["staging"] = (completion.started_at, completion.staged_at)
        self.times["inference"] = (completion.staged_at, completion.finished_at)
        self.times["delivery"] = (completion.finished_at, time.monotonic_ns())

    def note_python(self, completion: Any, arrived_at: int, head: bytes) -> bytes:
        """A worker process answered. Returns the answer's head without what the worker noted."""
        self._note_batch(completion)
        self.times["queue"] = (arrived_at, completion.started_at)
        rest, mark, text = head.rpartition(WORKER_MARK)
        try:
            began, called, returned, ended = [int(each) for each in text.split(b",")] if mark else []
        except ValueError:
            self.times["inference"] = (completion.started_at, completion.finished_at)
            return rest if mark else head
        self.times["staging"] = (completion.started_at, began)
        self.times["preprocess"] = (began, called)
        self.times["inference"] = (called, returned)
        self.times["postprocess"] = (returned, ended)
        self.times["delivery"] = (ended, time.monotonic_ns())
        return rest

    def _note_batch(self, completion: Any) -> None:
        self.release = completion.release
        self.batch_size = completion.batch_size

    def tell(self, response: Response, arrived_at: int) -> None:
        """Adds the header, behind what a handler has put there itself."""
        now = time.monotonic_ns()
        metrics = [_metric(name, began, ended) for name, (began, ended) in self.times.items()]
        if self.release:
            metrics.append(f'batch;desc="{self.release}";size={self.batch_size}')
        metrics.append(_metric("total", arrived_at, now))
        headers = dict(response.headers)
        own = [headers.pop(name) for name in list(headers) if name.lower() == ANSWER_HEADER.lower()]
        headers[ANSWER_HEADER] = ", ".join([*own, *metrics])
        response.headers = headers


def asked_stages(request: Request) -> Stages | None:
    """What the client wants to know; None if it does not say.

    Raises:
        BadRequestError: the header says neither yes nor no.
    """
    text = request.header(ASK_HEADER).lower()
    if text in _YES or text in _NO:
        return Stages(is_told=text in _YES)
    if not text and not any(name.lower() == ASK_HEADER for name, _ in request.headers):
        return None
    raise BadRequestError(f"Header {ASK_HEADER} must be 1 or 0, not {shown(text) if text else 'empty'}.")


def worker_note(head: bytes, *times: int) -> bytes:
    """A worker's answer head with what `Stages.note_python` takes from it."""
    return head + WORKER_MARK + b"%d,%d,%d,%d" % times


def _metric(name: str, began: int, ended: int) -> str:
    return f"{name};dur={max(0, ended - began) / 1e6:.3f}"
