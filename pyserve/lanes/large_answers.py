"""Large outputs of the native lane: which they are, and their answers, made in the pool and not on the loop."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pyserve.context import Context
from pyserve.errors import HandlerError
from pyserve.full_collections import put_off
from pyserve.lanes.pending import Pending
from pyserve.request.messages import Response

# Numbers of a batch's output that are made JSON on the loop: it takes 2 ms.
NUMBERS_HERE_MAX = 16 << 10

# One answer of a batch: its result, the context that its head is in, and its place in the batch.
Respond = Callable[[Any, Context, int], Response]


def is_large(output: Any) -> bool:
    """Whether ``output``, of a batch, has too many numbers for the loop."""
    if isinstance(output, torch.Tensor):
        return output.numel() > NUMBERS_HERE_MAX
    return _number_count(output, 0) > NUMBERS_HERE_MAX


def _number_count(output: Any, depth: int) -> int:
    if isinstance(output, torch.Tensor):
        return output.numel()
    parts = output.values() if isinstance(output, Mapping) else output
    if depth > 8 or not isinstance(output, (Mapping, list, tuple)):
        return 0
    return sum(_number_count(part, depth + 1) for part in parts)


def check_results(results: Any, count: int) -> None:
    """Whether a handler's postprocess returned one for each of ``count`` items.

    Raises:
        HandlerError: it did not.
    """
    if not isinstance(results, list):
        text = f"postprocess returned a {type(results).__name__}, not a list of {count}"
        raise HandlerError("Invalid model predict output", detail={"text": text})
    if len(results) != count:
        text = f"postprocess returned a list of {len(results)} for a batch of {count}"
        raise HandlerError("number of batch response mismatched", detail={"text": text})


class LargeAnswers:
    """Of one batch of a built-in handler.

    Args:
        handler: which stays with the loop; a copy of it makes these answers, with a context of its own.
        owners: whose requests they are; None for a row that nobody waits for any more.
        respond: makes an answer of a result.

    Attributes:
        duration_s: how long `make` took.
    """

    def __init__(self, handler: Any, context: Context, owners: Sequence[Pending | None], respond: Respond):
        requests = [owner.exchange.request if owner is not None else None for owner in owners]
        self._handler = handler
        self._context = context.for_batch(
            [request.id if request is not None else "" for request in requests],
            [request.headers if request is not None else () for request in requests],
        )
        self._owners = owners
        self._respond = respond
        self.duration_s = 0.0

    def make(self, answers: Callable[[Any], Any]) -> list[Response | Exception]:
        """One per owner, of what ``answers`` has the handler make. Any thread."""
        began = time.monotonic_ns()
        with put_off():
            responses = self._responses(answers)
        ended = time.monotonic_ns()
        self.duration_s = (ended - began) / 1e9
        for owner in self._owners:
            if owner is not None and owner.stages is not None:
                owner.stages.times["postprocess"] = (began, ended)
        return responses

    def _responses(self, answers: Callable[[Any], Any]) -> list[Response | Exception]:
        twin = copy.copy(self._handler)
        twin.context = self._context
        try:
            results = answers(twin)
            check_results(results, len(self._owners))
        except Exception as error:
            return [error] * len(self._owners)
        if twin._warned_not_finite:
            self._handler._warned_not_finite = True
        return [self._answer(result, index) for index, result in enumerate(results)]

    def _answer(self, result: Any, index: int) -> Response | Exception:
        try:
            return self._respond(result, self._context, index)
        except Exception as error:  # the others' answers are not touched by this one's
            return error
