"""The graph tells which whole numbers of its inputs a program has rows for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyserve.backends.lookups import find_lookups

Forward = Callable[..., torch.Tensor]


class Net(nn.Module):
    def __init__(self, forward: Forward):
        super().__init__()
        self.table, self.small = nn.Embedding(50, 4), nn.Embedding(7, 4)
        self.answer = forward

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        return self.answer(self, ids, numbers)


def program(forward: Forward) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    inputs = torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 9)
    return torch.export.export(Net(forward).eval(), inputs, dynamic_shapes={"ids": {0: batch}, "numbers": {0: batch}})


@pytest.mark.parametrize(
    ("forward", "ranges"),
    [
        (lambda net, ids, numbers: net.table(ids), {0: (0, 49)}),
        (lambda net, ids, numbers: net.table(ids) + net.small(ids), {0: (0, 6)}),
        (lambda net, ids, numbers: net.table(ids[:, :2].flatten(1).to(torch.int32)), {0: (0, 49)}),
        (lambda net, ids, numbers: net.table(torch.arange(ids.shape[1])) + numbers.sum(), {}),
        (lambda net, ids, numbers: net.table(torch.zeros_like(ids)), {}),
        (lambda net, ids, numbers: numbers.gather(1, ids), {0: (0, 8)}),
        (lambda net, ids, numbers: numbers.T[ids[:, 0]], {0: (-9, 8)}),
        (lambda net, ids, numbers: numbers * ids.sum(), {}),
    ],
    ids=[
        "a table",
        "the smaller of two",
        "a part, cast",
        "places of sizes",
        "of zeros",
        "gather",
        "from the end",
        "no",
    ],
)
def test_ranges(forward: Forward, ranges: dict[int, tuple[int, int]]) -> None:
    found = find_lookups(program(forward))
    assert found.problem == "" and found.ranges == ranges


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, ids, numbers: net.table(ids + 1),
        lambda net, ids, numbers: net.table(numbers.to(torch.int64)),
        lambda net, ids, numbers: numbers[:, numbers[0] > 0],
        lambda net, ids, numbers: torch.zeros(3, 50).scatter(1, ids[:3], 1.0),
        lambda net, ids, numbers: torch.zeros(3, 50).index_fill_(1, ids[0], 1.0),
        lambda net, ids, numbers: torch.zeros(3, 50).index_copy_(1, ids[0], numbers[:3, :5]),
        lambda net, ids, numbers: torch.zeros(3, 50).scatter_reduce_(1, ids[:3], numbers[:3, :5], "sum"),
        lambda net, ids, numbers: nn.functional.cross_entropy(numbers, ids[:, 0]),
    ],
    ids=["computed", "of floats", "a mask", "scatter", "fill", "copy", "reduce", "loss"],
)
def test_what_cannot_be_told_is_a_problem(forward: Forward) -> None:
    try:
        given = program(forward)
    except Exception:  # torch does not export it either
        return
    assert find_lookups(given).problem
