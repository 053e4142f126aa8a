"""Whether two ways to run one network give the same answers, on inputs made to disagree."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pyserve.proof.comparison import MAGNITUDE_MIN, difference, dtypes
from pyserve.proof.moved_inputs import moved, moved_apart, rounded
from pyserve.proof.probe_inputs import Probe
from pyserve.proof.small_parts import SmallParts, leaves
from pyserve.torch_error import cause_of

Run = Callable[[list[torch.Tensor]], Any]

# From here on rounding alone may turn the numbers of two ways to compute into anything.
LARGE_MIN = 1e3
# An answer that is so many times as far from one of higher precision as torch's own is hardly worse.
_AS_GOOD = 1.25
# So many times as far as an answer moves with its input, see `moved_inputs`: two ways to compute round more than once.
_STEPS = 16
_OWN_STEPS = 4
# Probes on which a part that looks wrong at full precision is looked at again, beside what rounding does there.
_AGAIN_MAX = 8
# Of probes at a lower precision, of which more have to show a part that is wrong: rounding is as large as parts are.
_SHARE = 0.5


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
        for right, lowered, judged in zip(*places, strict=True):
            own, apart = difference(right, lowered), min(difference(right, judged), difference(lowered, judged))
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
    precisions: Precisions | None = None, exact: Run | None = None,
) -> Agreement:  # fmt: skip
    """Compares ``candidate`` with ``truth``: answers, their dtypes, structure, NaN, and what is refused.

    Args:
        tolerance: of `pyserve.proof.comparison.difference`.
        is_enough: asked before each probe, with how many were compared.
        expected: what ``truth`` gave for each number of a probe so far; filled in.
        precisions: where the candidate runs at a lower precision. Asked of each probe, as what is wrong may be small
            beside the rest of its tensor.
        exact: what answers in double precision, or raises. Asked where rounding could be why the two differ, see
            `_Judge`.
    """
    expected = {} if expected is None else expected
    judge = _Judge(truth, tolerance, exact)
    largest, compared = 0.0, 0
    parts, suspected = SmallParts(tolerance, share=0.0 if precisions is None else _SHARE), list[int]()
    for number, probe in enumerate(probes):
        if is_enough(number):
            break
        compared = number + 1
        if number not in expected:
            expected[number] = _answer(truth, probe.inputs)
        got = _answer(candidate, probe.inputs)
        worst, objection = judge.compared(probe, expected[number], got)
        if precisions is None:
            suspected += [number] if parts.note(expected[number], expected[number], got) else []
        elif math.isfinite(worst) and not isinstance(got, _Refusal):
            answers = precisions.answers(probe)
            if answers is not None:
                parts.note(*answers, got)
            if objection:
                apart = None if answers is None else precisions.explain(*answers, got, tolerance)
                worst, objection = (worst, objection) if apart is None else (apart, "")
        if objection:
            return Agreement(worst, number + 1, objection)
        largest = max(largest, worst)
    if precisions is not None:
        return Agreement(largest, compared, parts.objection())
    chosen = ((number, probes[number]) for number in suspected[:_AGAIN_MAX])
    again = ((*judge.rounded(each, expected[number]), _answer(candidate, each.inputs)) for number, each in chosen)
    return Agreement(largest, compared, parts.confirmed(again))


def _answer(run: Run, inputs: Sequence[torch.Tensor]) -> Any:
    try:
        return run([each.clone() for each in inputs])
    except Exception as error:  # the model's own code
        return _Refusal(cause_of(str(error)) or type(error).__name__)


class _Judge:
    """Compares pairs of answers.

    Where an answer is next to nothing, a difference that is large beside it may be what rounding left: of numbers that
    are all alike, and of zeros behind weights that are not, a normalization makes zero, 3e-4, or anything between. Such
    a difference counts as none

    - if ``truth`` itself moves as far when the numbers of such an input do, each by one step of its own;
    - if the candidate is hardly farther from what is exact than ``truth``, or some times as far and that is nothing
      beside ordinary answers.

    It is asked in the order of the probes: the first answer is an ordinary one.
    """

    def __init__(self, truth: Run, tolerance: float, exact: Run | None):
        self._truth, self._tolerance, self._exact = truth, tolerance, exact
        self._ordinary: Any = None

    def compared(self, probe: Probe, wanted: Any, got: Any) -> tuple[float, str]:
        """The difference of one pair of answers, and what is against the second."""
        if isinstance(wanted, _Refusal):
            if isinstance(got, _Refusal):
                return 0.0, ""
            return math.inf, f"it answers {probe.name}, which the model refuses ({wanted.cause})"
        if isinstance(got, _Refusal):
            return math.inf, f"it fails on {probe.name}: {got.cause}"
        if self._ordinary is None:
            self._ordinary = wanted
        worst = difference(wanted, got)
        if dtypes(wanted) != dtypes(got):
            return math.inf, f"its answer has other dtypes on {probe.name}"
        if worst <= self._tolerance or (math.isfinite(worst) and self._is_rounding(probe, wanted, got)):
            return min(worst, self._tolerance), ""
        by = "in shape, structure, a whole number or NaN" if math.isinf(worst) else f"by {worst:.1e} (relative)"
        return worst, f"its answer differs {by} on {probe.name}"

    def rounded(self, probe: Probe, wanted: Any) -> tuple[Any, Any]:
        """The right answer, and one that is off by torch's rounding: ``wanted``, where what is exact is known."""
        exact = None if self._exact is None else _answer(self._exact, probe.inputs)
        if exact is not None and not isinstance(exact, _Refusal):
            return exact, wanted
        return wanted, rounded(partial(_answer, self._truth), probe.inputs, leaves(wanted))

    def _is_rounding(self, probe: Probe, wanted: Any, got: Any) -> bool:
        """Of each tensor by itself: that one hangs on rounding says nothing about another."""
        shifted = leaves(_answer(self._truth, moved(probe.inputs))) if _is_large(probe) else []
        apart = leaves(_answer(self._truth, moved_apart(probe.inputs))) if _is_constant(probe) else []
        right = leaves(_answer(self._exact, probe.inputs)) if self._exact is not None else []
        places = [leaves(each) for each in (wanted, got, self._ordinary)]
        count = len(places[0])
        if not count or any(len(each) != count for each in places):
            return False
        return all(
            difference(one, other) <= self._tolerance
            or (len(shifted) == count and _is_moved(one, other, shifted[at], _STEPS))
            or (len(apart) == count and _is_moved(one, other, apart[at], _OWN_STEPS))
            or (len(right) == count and self._is_as_near(right[at], one, other, usual))
            for at, (one, other, usual) in enumerate(zip(*places, strict=True))
        )

    def _is_as_near(self, right: Any, wanted: Any, got: Any, usual: Any) -> bool:
        own, apart = difference(right, wanted), difference(right, got)
        if not math.isfinite(own):
            return False
        is_nothing = apart * _magnitude(right) <= self._tolerance * _magnitude(usual)
        return apart <= _AS_GOOD * own or (apart <= _STEPS * own and is_nothing)


def _is_moved(wanted: Any, got: Any, moved: Any, steps: int) -> bool:
    moves = difference(wanted, moved)
    return math.isfinite(moves) and difference(wanted, got) <= steps * moves


def _magnitude(value: Any) -> float:
    """By which `difference` divides."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    return max(float(torch.nan_to_num(value, 0.0, 0.0, 0.0).abs().max()), MAGNITUDE_MIN)


def _is_large(probe: Probe) -> bool:
    return any(bool((each.abs() > LARGE_MIN).any()) for each in probe.inputs if each.is_floating_point())


def _is_constant(probe: Probe) -> bool:
    """Whether all numbers of one of its inputs are alike, and not zero."""
    return any(
        each.is_floating_point() and each[0].numel() > 1 and bool((each == each.flatten()[0]).all() and each.any())
        for each in probe.inputs
    )
