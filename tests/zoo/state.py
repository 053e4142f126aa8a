"""Modules that are no pure functions: kept buffers, aliases, attributes, inputs changed in place."""

from __future__ import annotations

from typing import Any

from torch.export import Dim

from .case import Case, Item, Items, floats, tensor

# Races need calls that follow one another at once, and many of them.
AT_ONCE: dict[str, Any] = {"mixed": 300, "config": {"minBatch": 1, "maxBatchDelay": 0, "batchSize": 4}}

COMPILED: dict[str, Any] = {
    "dynamic": ({0: Dim("batch", min=1, max=64)},), "example": lambda items: (items[0][0].repeat(2, 1),),
}  # fmt: skip


def many(width: int) -> Items:
    """Forty items: an answer that is another client's is never right by chance."""
    return floats(width, scales=(1,) * 40)


def _counts(item: Item, got: Any) -> str:
    """The model's first output is its input doubled; the second counts calls from 1."""
    doubled, count = got
    if not doubled.allclose(item[0] * 2):
        return f"the doubled input is {doubled}"
    return "" if count >= 1 and count == count.round() else f"a count of {count}"


CASES = [
    Case(
        "kept_buffer", "writes its answer to a buffer that it keeps and returns", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("out", torch.zeros(64, 4096))

            def forward(self, x):
                o = self.out[:x.shape[0]]
                o.copy_(x * 2 + 1)
                return o
        """, (tensor(4096),), many(4096), ("eager", "scripted", "compiled"), **AT_ONCE, **COMPILED,
    ),
    Case(
        "accumulator", "steps within a call add up in a buffer", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("h", torch.zeros(64, 64))
                self.register_buffer("w", torch.eye(64))

            def forward(self, x):
                self.h.zero_()
                for i in range(20):
                    self.h[:x.shape[0]] += x @ self.w
                return self.h[:x.shape[0]].clone()
        """, (tensor(64),), many(64), ("eager", "scripted"), **AT_ONCE,
    ),
    Case(
        "assigned_attribute", "an attribute assigned in forward is read later in it", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.h = torch.zeros(1, 1)

            def forward(self, x):
                self.h = x
                y = x
                for i in range(30):
                    y = y @ torch.eye(x.shape[1])
                return y * 3 - self.h
        """, (tensor(64),), many(64), ("eager", "scripted"), **AT_ONCE,
    ),
    Case(
        "previous_input", "answers with what the last request brought", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("last", torch.zeros(1, 4))

            def forward(self, x):
                new = x * 2
                self.last.copy_(x[:1])
                return new + 0 * self.last
        """, (tensor(4),), floats(4), ("eager", "scripted"),
    ),
    Case(
        "counter", "counts its calls; loading must not count", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("n", torch.zeros(1))

            def forward(self, x):
                self.n += 1
                return x * 2, self.n.expand(x.shape[0], 1).clone()
        """, (tensor(4),), floats(4), ("eager", "scripted", "compiled"), may_refuse=("scripted", "compiled"),
        likely=_counts, **COMPILED,
    ),
    Case(
        "returned_weights", "answers with its own memory", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("t", torch.arange(10.0).unsqueeze(0))

            def forward(self, x):
                return self.t.expand(x.shape[0], 10), self.t[:, :4] + x
        """, (tensor(4),), floats(4), ("eager", "scripted", "traced"),
    ),
    Case(
        "view_of_input", "answers with a view of the request's own memory", """
        class Net(nn.Module):
            def forward(self, x):
                return x[:, 1:3], x
        """, (tensor(4),), floats(4), ("eager", "scripted", "traced"),
    ),
    Case(
        "changed_input", "changes its input, and answers with it", """
        class Net(nn.Module):
            def forward(self, x):
                y = x.sum(1, keepdim=True)
                x.mul_(2)
                return x + y
        """, (tensor(16),), floats(16), ("eager", "scripted"),
    ),
    Case(
        "changed_weights", "its weights move with each call, and it puts them back", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("scale", torch.ones(1))

            def forward(self, x):
                self.scale.mul_(3)
                y = x * self.scale
                for i in range(20):
                    y = y + 0 * x
                self.scale.div_(3)
                return y
        """, (tensor(256),), many(256), ("eager", "scripted"), **AT_ONCE,
    ),
    Case(
        "list_of_steps", "collects its steps in a list on the module", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.steps = []

            def forward(self, x):
                self.steps.clear()
                for i in range(3):
                    self.steps.append(self.fc(x) * (i + 1))
                return torch.stack(self.steps, 1).sum(1)
        """, (tensor(4),), floats(4),
    ),
    Case(
        "cache_by_size", "keeps a table per size in a dict", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.tables = {}

            def forward(self, x):
                n = x.shape[1]
                if n not in self.tables:
                    self.tables[n] = torch.arange(float(n)).cos()
                return x * self.tables[n]
        """, (tensor(8),), floats(8),
    ),
]  # fmt: skip
