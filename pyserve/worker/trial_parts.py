"""Whether small parts of answers depend on the batch: a score below one beside coordinates of 640, in which the
difference of all numbers hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyserve.proof.comparison import ROUNDING, number_list
from pyserve.proof.small_parts import SmallParts
from pyserve.worker.failure import HandlerTimeout

Answers = Callable[[Sequence[int]], list[Any]]

# Answers that are looked at again: of one batch, and of all.
_AGAIN_EACH = 2
_AGAIN_MAX = 16


class TrialParts:
    """Compares answers at full precision.

    How much rounding does to a part is not known of a handler. But to numbers that are large it does at least as much:
    what is right in the large ones and not in the small ones is no rounding. And an item beside copies of itself is
    computed just as beside other items, numbers that are drawn at random and rounded ones included.
    """

    def __init__(self) -> None:
        self._seen, self._sure = (SmallParts(ROUNDING["fp32"], probes_min=2) for _ in range(2))
        self._again = 0

    def problem(self, answers: Answers, numbers: Sequence[int], alone: dict[int, Any], together: Sequence[Any]) -> str:
        """How the answers to the rows ``numbers`` in one batch depend on it; ``""`` if they do not.

        Args:
            answers: what gives those to other rows that are run together.
        """
        if len(set(numbers)) == 1:  # beside copies of itself an item is whatever it is
            return ""
        suspected = []
        for place, number in enumerate(numbers):
            right, got = tensors_in(alone[number]), tensors_in(together[place])
            if self._seen.note(right, _off(right, right, got), got):
                suspected.append(place)
        if not self._seen.objection():
            return ""
        for place in suspected[: min(_AGAIN_EACH, _AGAIN_MAX - self._again)]:
            self._again += 1
            try:
                first, second = (tensors_in(answers([numbers[place]] * len(numbers))[place]) for _ in range(2))
            except HandlerTimeout:
                raise
            except Exception:  # of the model's own code, or for want of memory: nothing is known
                continue
            got = tensors_in(together[place])
            self._sure.note(first, _off(first, second, got), got)
        return self._sure.objection()


def differ_in_parts(one: Any, other: Any) -> bool:
    """Whether two answers to one request differ in a part that is small beside the rest."""
    right, got = tensors_in(one), tensors_in(other)
    return SmallParts(ROUNDING["fp32"], probes_min=1).note(right, _off(right, right, got), got)


def tensors_in(answer: Any) -> list[torch.Tensor]:
    """All numbers of an answer as `difference` groups them, each group [1, ...]."""
    if isinstance(answer, torch.Tensor):
        return [answer.detach().cpu()[None]]
    if isinstance(answer, np.ndarray):
        return tensors_in(torch.from_numpy(np.array(answer))) if answer.dtype.kind == "f" else []
    if isinstance(answer, dict):
        return [each for value in answer.values() for each in tensors_in(value)]
    if isinstance(answer, list) and (numbers := number_list(answer)) is not None:
        return [numbers[None]]
    if isinstance(answer, (list, tuple)):
        return [each for value in answer for each in tensors_in(value)]
    return []


def _off(right: list[torch.Tensor], again: list[torch.Tensor], got: list[torch.Tensor]) -> list[torch.Tensor]:
    """``right``, off by as much as ``again`` and as the large numbers of ``got`` are."""
    if len({len(right), len(again), len(got)}) > 1:
        return right
    return [_off_tensor(*each) for each in zip(right, again, got, strict=True)]


def _off_tensor(right: torch.Tensor, again: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    if not right.is_floating_point() or not right.numel() or not right.shape == again.shape == got.shape:
        return right
    right, again, got = right.double(), again.double(), got.double()
    sizes = right.abs().nan_to_num(0.0, 0.0, 0.0)
    errors = (got - right).abs().nan_to_num(0.0, 0.0, 0.0)
    return right + (again - right).abs().clamp(min=float(errors[sizes >= sizes.amax() / 2].amax()))
