"""Answers that depend on what else is in the batch."""

from __future__ import annotations

import torch
from torch.export import Dim

from .case import Case, Items, floats, tensor

X, ITEMS = (tensor(4),), floats(4)


def _with_head(line: str) -> str:
    return f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = self.fc(x)
        return {line}
"""


ALL = ("eager", "scripted", "traced")


def _case(name: str, trap: str, line: str, backends: tuple[str, ...] = ALL, items: Items = ITEMS) -> Case:
    return Case(name, trap, _with_head(line), X, items, backends)


CASES = [
    Case(
        "softmax_over_batch", "softmax over dimension 0", _with_head("F.softmax(y, dim=0)"), X, ITEMS,
        (*ALL, "compiled"), dynamic=({0: Dim("batch", min=1, max=64)},),
        example=lambda items: (items[0][0].repeat(2, 1),),
    ),
    Case(
        "softmax_over_fixed_batch", "the same, exported for a batch of exactly 4: one row cannot be answered rightly",
        _with_head("F.softmax(y, dim=0)"), X, ITEMS, ("compiled",), may_refuse=("compiled",),
        example=lambda items: (items[0][0].repeat(4, 1),),
    ),
    _case("batch_statistics", "normalised by the batch's own mean",
          "(y - y.mean(0)) / (y.std(0, unbiased=False) + 1e-3) + y"),
    _case("largest_of_batch", "divided by the batch's largest number", "y / x.abs().max().clamp(min=1e-6)"),
    _case("sorted_batch", "sorts the batch's rows", "y.sort(0).values"),
    _case("running_sum", "adds up over the batch", "y.cumsum(0)"),
    _case("reversed_batch", "answers in reverse", "y.flip(0)"),
    _case("rolled_batch", "each row gets its neighbour's answer", "y.roll(1, 0)"),
    _case("position_in_batch", "adds the row's number", "y + torch.arange(float(y.shape[0])).unsqueeze(1)",
          ("eager", "scripted")),
    _case("similarity_to_batch", "attends over the batch", "F.softmax(y @ y.t() / 8, 1) @ y"),
    _case("rare_leak", "one number of the first row, only if it is large", "y + F.relu(x[:1, :1] - 50)",
          items=lambda generator: [*ITEMS(generator), (torch.tensor([[90.0, 1, 2, 3]]),)]),
    Case(
        "sequence_first", "a GRU without batch_first: the batch is its time", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.g = nn.GRU(4, 4)

            def forward(self, x):
                return self.g(x)[0]
        """, (tensor(5, 4),), floats(5, 4, scales=(1, 1, 2, 3, 1)), ("eager", "scripted", "traced"),
    ),
    Case(
        "training_norm", "batch statistics of a layer that never left training", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 6)

            def forward(self, x):
                y = self.fc(x).unsqueeze(-1).expand(-1, -1, 4) * torch.arange(1.0, 5.0)
                return F.batch_norm(y, None, None, training=True)
        """, (tensor(4),), floats(4), ("eager", "scripted", "traced"),
    ),
    Case(
        "dynamic_int8", "one scale of eight bits for the whole batch", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(16, 8)

            def forward(self, x):
                low, high = torch.aminmax(x)
                scale = ((high - low) / 255).clamp(min=1e-8)
                whole = torch.round(x / scale).clamp(-255, 255)
                return self.fc(whole * scale)
        """, (tensor(16),), floats(16), ("eager", "scripted", "traced"),
    ),
    Case(
        "meant_to_depend", "depends on the batch, and says that it is meant", _with_head("y - y.mean(0) * 0"), X, ITEMS,
        config={"batchDependent": "allowed"},
    ),
]  # fmt: skip
