"""Whether a model's answer for an item depends on the items that share its batch.

It must not, unless somebody says that it is meant: which requests meet in a batch is chance. Softmax over the batch,
statistics of it, scales of dynamic quantisation, a recurrent network that takes the batch for time, and compiled code
that was made for one batch size all look right as long as they are asked alone. So do groups with three places, and
copies that are dropped, as long as only unlike items meet, and products with zero as long as all numbers are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pyserve.proof.comparison import ROUNDING, difference, rows
from pyserve.proof.moved_inputs import rounded
from pyserve.proof.probe_inputs import ProbeRows
from pyserve.proof.small_parts import SmallParts, leaves
from pyserve.torch_error import cause_of

Run = Callable[[Sequence[torch.Tensor]], Any]

# Sizes up to this are tried one by one, larger ones by doubling.
SIZES_MAX = 8
# Which of the items that are alike stand in a batch of them.
_ALIKE = (0, 0, 1, 0, 2, 0, 1, 0)


def probe_sizes(largest: int) -> list[int]:
    """Batch sizes to try, in order: each up to 8, then 16, 32 and so on, and the largest."""
    doubled = [1 << power for power in range(4, max(largest, 1).bit_length())]
    return sorted({*range(2, min(largest, SIZES_MAX) + 1), *doubled, *([largest] if largest > 1 else [])})


@dataclass(frozen=True)
class RowNumbers:
    """Which of some numbered rows are of which kind of `ProbeRows`."""

    unlike: tuple[int, ...]
    not_finite: tuple[int, ...] = ()
    alike: tuple[int, ...] = ()

    @classmethod
    def of(cls, unlike: int, not_finite: int, alike: int) -> RowNumbers:
        """Of rows that are numbered in this order, so many of each kind."""
        middle = unlike + not_finite
        return cls(tuple(range(unlike)), tuple(range(unlike, middle)), tuple(range(middle, middle + alike)))


@dataclass(frozen=True)
class Step:
    """A batch to try.

    Attributes:
        numbers: of its rows.
        shown: batches of up to so many are shown when this one and all before it have passed.
        what: is special about its rows, in words that follow "a batch of 4".
    """

    numbers: tuple[int, ...]
    shown: int = field(compare=False)
    what: str = ""


def special_steps(numbers: RowNumbers, largest: int) -> list[Step]:
    """Batches with NaN and infinities in some rows, and batches of rows that are alike; at most ``largest`` rows."""
    found = []
    mixed: list[int] = []
    for place, odd in enumerate(numbers.not_finite):
        mixed += [numbers.unlike[2 * place % len(numbers.unlike)], odd]
    count = len(mixed) if len(mixed) <= largest else 2
    for first in range(0, len(mixed), count or 1):
        found.append(Step(tuple(mixed[first : first + count]), 1, " with NaN or infinities in another item"))
    if numbers.alike:
        found.append(Step(_alike(numbers, min(largest, len(_ALIKE))), 1, " like items"))
    return found


def size_step(numbers: RowNumbers, size: int) -> Step:
    """A batch of unlike rows; above 8 half of them are alike, since there places for like ones may be full."""
    like = size // 2 if size > SIZES_MAX and numbers.alike else 0
    unlike = tuple(numbers.unlike[place % len(numbers.unlike)] for place in range(size - like))
    return Step(unlike + _alike(numbers, like), size)


def steps(numbers: RowNumbers, largest: int) -> list[Step]:
    """What to try for batches of up to ``largest``, in order: a pair, whose difference says most, then what is special,
    which has to pass before any batch is shown, then larger ones.
    """
    if largest < 2:
        return []
    pair, *larger = (size_step(numbers, size) for size in probe_sizes(largest))
    first = [replace(pair, shown=1), *special_steps(numbers, largest)]
    first[-1] = replace(first[-1], shown=2)
    return [*first, *larger]


def _alike(numbers: RowNumbers, count: int) -> tuple[int, ...]:
    places = (_ALIKE[place % len(_ALIKE)] for place in range(count))
    return tuple(numbers.alike[place % len(numbers.alike)] for place in places)


class BatchProbe:
    """Compares batches with what their items give alone.

    Args:
        run: the model: tensors [n, ...] -> its output, n rows of any nesting.
        rows: to make batches of.
        tolerance: of `pyserve.proof.comparison.difference`.
    """

    def __init__(self, run: Run, rows: ProbeRows, tolerance: float):
        self._run = run
        self._items = rows.items
        self._tolerance = tolerance
        self._alone: dict[int, Any] = {}
        self._parts = SmallParts(tolerance, probes_min=2)  # a pair shows most
        self._suspected: dict[int, Any] = {}  # answers in batches, of each item the last that looks wrong in a part
        self._off: dict[int, Any] = {}  # what `_rounded` gave
        self.numbers = RowNumbers.of(len(rows.unlike), len(rows.not_finite), len(rows.alike))

    def alone(self, number: int) -> Any:
        """The output for one item alone. Raises whatever the model raises."""
        if number not in self._alone:
            self._alone[number] = self._run([each.clone() for each in self._items[number]])
        return self._alone[number]

    def try_step(self, step: Step) -> str:
        """Why answers depend on the batch, by one batch; ``""`` if they do not."""
        problem = self._problem_of(step)
        if problem and step.what:  # if it is for its size alone, that says more
            return self._problem_of(size_step(self.numbers, len(step.numbers))) or problem
        return problem

    def _problem_of(self, step: Step) -> str:
        chosen = [number for number in step.numbers if not self._is_refused(number)]
        if len(chosen) < len(step.numbers) and not set(chosen) & set(self.numbers.not_finite):
            return ""
        size = len(chosen)
        expected = [self.alone(number) for number in chosen]
        columns = zip(*(self._items[number] for number in chosen), strict=True)
        try:
            output = self._run([torch.cat(list(column)) for column in columns])
        except Exception as error:  # of the model's own code, which may raise anything
            return f"a batch of {size}{step.what} fails where each of its items alone does not: {cause_of(str(error))}"
        for place, alone in enumerate(expected):
            found = difference(alone, rows(output, place, 1))
            if not found <= self._tolerance:
                by = "in its shape, a whole number or NaN" if found == float("inf") else f"by {found:.1e} (relative)"
                return f"the answer of an item in a batch of {size}{step.what} differs {by} from its answer alone"
        # At a lower precision rounding is as large as parts are.
        if self._tolerance > ROUNDING["fp32"]:
            return ""
        is_suspicious = False
        for place, number in enumerate(chosen):
            row = rows(output, place, 1)
            if self._parts.note(self.alone(number), self.alone(number), row):
                is_suspicious, self._suspected[number] = True, row
        if not is_suspicious:
            return ""
        # Each item once: what rounding does to one it does in batches of many sizes.
        problem = self._parts.confirmed((self.alone(number), self._rounded(number), row)
                                        for number, row in self._suspected.items())  # fmt: skip
        return f"in a batch of {size}{step.what}, {problem.removesuffix(' inputs')} items" if problem else ""

    def _rounded(self, number: int) -> Any:
        """The output for one item alone, off by what rounding does to it."""
        if number not in self._off:
            self._off[number] = rounded(self._run, self._items[number], leaves(self.alone(number)))
        return self._off[number]

    def _is_refused(self, number: int) -> bool:
        """Whether the model fails for NaN or infinities. A batch that fails is run again one by one."""
        if number not in self.numbers.not_finite:
            return False
        try:
            self.alone(number)
        except Exception:  # of the model's own code
            return True
        return False


def rows_are_independent(run: Run, items: Sequence[Sequence[torch.Tensor]], count: int) -> bool:
    """Whether the first of ``count`` rows is answered alike beside copies of itself and beside other rows."""
    others = [items[index % len(items)] for index in range(count)]
    beside_others = outcome(run, [torch.cat(list(column)) for column in zip(*others, strict=True)])
    beside_itself = outcome(run, [torch.cat([each] * count) for each in others[0]])
    if isinstance(beside_others, type) or isinstance(beside_itself, type):
        return False
    return difference(rows(beside_itself, 0, 1), rows(beside_others, 0, 1)) <= ROUNDING["fp32"]


def outcome(run: Run, inputs: Sequence[torch.Tensor]) -> Any:
    """What ``run`` gives for a copy of ``inputs``, or the kind of error that it ends in."""
    try:
        return run([each.clone() for each in inputs])
    except Exception as error:  # the model's own code
        return type(error)
