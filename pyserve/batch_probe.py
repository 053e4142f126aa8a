"""Whether a model's answer for an item depends on the items that share its batch.

It must not, unless somebody says that it is meant: which requests meet in a batch is chance. Softmax over the batch,
statistics of it, scales of dynamic quantisation, a recurrent network that takes the batch for time, and compiled code
that was made for one batch size all look right as long as they are asked alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyserve.comparison import ROUNDING, difference, rows
from pyserve.torch_error import cause_of

Item = tuple[torch.Tensor, ...]
Run = Callable[[Sequence[torch.Tensor]], Any]

# Different items that a probe is made of; larger batches repeat them.
ITEMS_MAX = 8


def probe_sizes(largest: int) -> list[int]:
    """Batch sizes to try, the cheapest first: a pair, an odd one and the largest."""
    return sorted({size for size in (2, 3, largest) if 1 < size <= largest})


class BatchProbe:
    """Compares batches with what their items give alone.

    Args:
        run: the model: tensors [n, ...] -> its output, n rows of any nesting.
        items: each a tuple of tensors [1, ...], of one shape and with different numbers; at most ITEMS_MAX are used.
        tolerance: of `pyserve.comparison.difference`.
    """

    def __init__(self, run: Callable[[Sequence[torch.Tensor]], Any], items: Sequence[Item], tolerance: float):
        self._run = run
        self._items = list(items)[:ITEMS_MAX]
        self._tolerance = tolerance
        self._alone: dict[int, Any] = {}

    def alone(self, index: int) -> Any:
        """The output for one item alone. Raises whatever the model raises."""
        if index not in self._alone:
            self._alone[index] = self._run([each.clone() for each in self._items[index]])
        return self._alone[index]

    def try_size(self, size: int) -> str:
        """Why answers depend on the batch, by a batch of ``size`` items; ``""`` if they do not."""
        chosen = [index % len(self._items) for index in range(size)]
        expected = [self.alone(index) for index in chosen]
        columns = zip(*(self._items[index] for index in chosen), strict=True)
        try:
            output = self._run([torch.cat(list(column)) for column in columns])
        except Exception as error:  # of the model's own code, which may raise anything
            return f"a batch of {size} fails where each of its items alone does not: {cause_of(str(error))}"
        for place, alone in enumerate(expected):
            found = difference(alone, rows(output, place, 1))
            if not found <= self._tolerance:
                by = "in its shape, a whole number or NaN" if found == float("inf") else f"by {found:.1e} (relative)"
                return f"the answer of an item in a batch of {size} differs {by} from its answer alone"
        return ""


def probe_batches(
    run: Callable[[Sequence[torch.Tensor]], Any], items: Sequence[Item], sizes: Sequence[int], tolerance: float
) -> str:
    """Tries batches of ``sizes``. Arguments as of `BatchProbe`.

    Returns:
        why answers depend on the batch, or ``""``.
    """
    probe = BatchProbe(run, items, tolerance)
    return next((text for size in sizes if (text := probe.try_size(size))), "")


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
