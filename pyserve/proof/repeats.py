"""Whether a network answers one question in one way: what draws random numbers, keeps something, or looks at what else
is in the batch does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pyserve.proof.batch_probe import Run, outcome, rows_are_independent
from pyserve.proof.comparison import difference

_ITEMS = 2
# How often each item is asked: the first call may set something up, and a coin shows one side twice.
_TIMES = 4
# What is smaller is the order of additions, which threads may change.
_NOISE = 1e-6
# Items of the batches that are made of them.
_COMPOSED = (2, 3)


def why_not_repeated(run: Run, items: Sequence[Sequence[torch.Tensor]]) -> str:
    """Why one question has more than one answer, by asking it again; ``""`` if it has one.

    Args:
        run: tensors [n, ...] -> its output.
        items: each a tuple of tensors [1, ...].

    Returns:
        words that follow "the model".
    """
    for item in items[:_ITEMS]:
        first = outcome(run, item)
        for _ in range(_TIMES - 1):
            again = outcome(run, item)
            if isinstance(first, type) or isinstance(again, type):
                if first is not again:
                    return "fails for an input that it also answers"
                continue
            found = difference(first, again)
            if found > _NOISE:
                by = "in shape, a whole number or NaN" if math.isinf(found) else f"by {found:.1e} (relative)"
                return f"answers one question in two ways, apart {by}: it draws random numbers, or keeps something"
    return ""


def why_composed(run: Run, items: Sequence[Sequence[torch.Tensor]]) -> str:
    """Why an answer is not its item's alone, by asking for one in other company; ``""`` if it is. As above."""
    if all(rows_are_independent(run, items, count) for count in _COMPOSED):
        return ""
    return "answers an item otherwise beside other items than beside copies of it"
