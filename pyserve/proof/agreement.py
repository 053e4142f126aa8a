"""Whether two ways to run one network give the same answers, on inputs made to disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyserve.proof.comparison import difference, dtypes
from pyserve.proof.probe_inputs import Probe
from pyserve.proof.small_parts import SmallParts, leaves
from pyserve.torch_error import cause_of

Run = Callable[[list[torch.Tensor]], Any]

# From here on rounding alone may turn the numbers of two ways to compute into anything.
LARGE_MIN = 1e3
# An answer at a lower precision that is so many times as far from fp32's as torch's own is hardly worse.
_AS_GOOD = 1.25
# What an input is moved by to see what rounding does: a step of fp32. Two ways to compute round more often than once.
_STEP = 2.0**-22
_STEPS = 16


@dataclass(frozen=True)
class Agreement:
    """What comparing came to.

    Attributes:
        difference: the largest one, relative; infinity if it is none of rounding. Where `Precisions` explained one, the
            smaller of those to fp32 and to torch at the lower precision.
        probes: inputs that were compared.
        objection: what is against the second way, for a person; ``""`` if nothing is.
    """

    difference: float
    probes: int
    objection: str = ""


@dataclass(frozen=True)
class _Refusal:
    cause: str


@dataclass(frozen=True)
class Precisions:
    """One network as torch runs it, at full and at a lower precision: what an answer at the lower one may be judged by.

    Of the right answer both engines may be off by some percent where a network hangs on small differences, each to its
    own side: then neither of two comparisons alone says that one of them is wrong.
    """

    full: Run
    lower: Run

    def explain(self, full: Any, lower: Any, got: Any, tolerance: float) -> float | None:
        """How far ``got`` is from what torch answers, if each of its tensors is within ``tolerance`` of that at either
        precision, or hardly farther from fp32 than torch's own at the lower one; else None.

        Args:
            full, lower: torch's answers, as of `answers`.
        """
        places = [leaves(each) for each in (full, lower, got)]
        if len({len(each) for each in places}) > 1:
            return None
        largest = 0.0
        # One by one: that a tensor hangs on small differences says nothing about another.
        for right, rounded, judged in zip(*places, strict=True):
            own, apart = difference(right, rounded), min(difference(right, judged), difference(rounded, judged))
            is_as_good = math.isfinite(own) and difference(right, judged) <= _AS_GOOD * own
            if not (apart <= tolerance or is_as_good):
                return None
            largest = max(largest, apart)
        return largest

    def answers(self, probe: Probe) -> tuple[Any, Any] | None:
        """At both precisions; None if it fails at one."""
        full, lower = _answer(self.full, probe.inputs), _answer(self.lower, probe.inputs)
        return None if isinstance(full, _Refusal) or isinstance(lower, _Refusal) else (full, lower)


def agreement(
    truth: Run, candidate: Run, probes: Sequence[Probe], tolerance: float, *,
    is_enough: Callable[[int], bool] = lambda count: False, expected: dict[int, Any] | None = None,
    precisions: Precisions | None = None,
) -> Agreement:  # fmt: skip
    """Compares ``candidate`` with ``truth``: answers, their dtypes, structure, NaN, and what is refused.

    Args:
        tolerance: of `pyserve.proof.comparison.difference`.
        is_enough: asked before each probe, with how many were compared.
        expected: what ``truth`` gave for each number of a probe so far; filled in.
        precisions: where the candidate runs at a lower precision. Asked of each probe, as what is wrong may be small
            beside the rest of its tensor.
    """
    expected = {} if expected is None else expected
    largest, compared = 0.0, 0
    parts = SmallParts(tolerance)
    for number, probe in enumerate(probes):
        if is_enough(number):
            break
        compared = number + 1
        if number not in expected:
            expected[number] = _answer(truth, probe.inputs)
        got = _answer(candidate, probe.inputs)
        worst, objection = _compared(truth, expected[number], got, probe, tolerance)
        if precisions is not None and math.isfinite(worst) and not isinstance(got, _Refusal):
            answers = precisions.answers(probe)
            if answers is not None:
                parts.note(*answers, got)
            if objection:
                apart = None if answers is None else precisions.explain(*answers, got, tolerance)
                worst, objection = (worst, objection) if apart is None else (apart, "")
        if objection:
            return Agreement(worst, number + 1, objection)
        largest = max(largest, worst)
    return Agreement(largest, compared, parts.objection())


def _answer(run: Run, inputs: Sequence[torch.Tensor]) -> Any:
    try:
        return run([each.clone() for each in inputs])
    except Exception as error:  # the model's own code
        return _Refusal(cause_of(str(error)) or type(error).__name__)


def _compared(truth: Run, wanted: Any, got: Any, probe: Probe, tolerance: float) -> tuple[float, str]:
    """The difference of one pair of answers, and what is against the second."""
    if isinstance(wanted, _Refusal):
        if isinstance(got, _Refusal):
            return 0.0, ""
        return math.inf, f"it answers {probe.name}, which the model refuses ({wanted.cause})"
    if isinstance(got, _Refusal):
        return math.inf, f"it fails on {probe.name}: {got.cause}"
    worst = difference(wanted, got)
    if dtypes(wanted) != dtypes(got):
        return math.inf, f"its answer has other dtypes on {probe.name}"
    if worst <= tolerance or (_is_large(probe) and worst <= _STEPS * _by_rounding(truth, wanted, probe)):
        return min(worst, tolerance), ""
    by = "in shape, structure, a whole number or NaN" if math.isinf(worst) else f"by {worst:.1e} (relative)"
    return worst, f"its answer differs {by} on {probe.name}"


def _is_large(probe: Probe) -> bool:
    return any(bool((each.abs() > LARGE_MIN).any()) for each in probe.inputs if each.is_floating_point())


def _by_rounding(truth: Run, wanted: Any, probe: Probe) -> float:
    """How far the right answer moves when each number of the input does by one step of rounding."""
    moved = [each * (1 + _STEP) if each.is_floating_point() else each for each in probe.inputs]
    got = _answer(truth, moved)
    return 0.0 if isinstance(got, _Refusal) else difference(wanted, got)
