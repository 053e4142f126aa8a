"""What a compiler or an author assumed of shapes: batches, lengths, sizes of pictures."""

from __future__ import annotations

import torch
from torch.export import Dim

from .case import Case, Item, floats, lengths, tensor, whole

BATCH = Dim("batch", min=1, max=64)

PERCEPTRON = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 8)
            self.b = nn.Linear(8, 5)

        def forward(self, x):
            return self.b(self.a(x).relu())
"""

POSITIONS = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(100, 8)
            self.register_buffer("positions", torch.arange(64 * 8).view(1, 64, 8).float() / 100)

        def forward(self, ids):
            return (self.e(ids) + self.positions[:, :ids.shape[1]]).cumsum(1)
"""


def _too_long(generator: torch.Generator) -> list[Item]:
    """Lengths within and beyond the table of 64, and numbers beyond the vocabulary of 100."""
    good = whole(0, 99, 2, 3, 17, 40, 64)(generator)
    bad = whole(0, 99, 65, 80, 500)(generator)
    return good + bad + [(torch.tensor([[5, 100, 3]]),), (torch.tensor([[5, -1, 3]]),)]


def _pictures(*sizes: tuple[int, int]):  # type: ignore[no-untyped-def]
    def make(generator: torch.Generator) -> list[Item]:
        return [(torch.rand(1, 3, *size, generator=generator),) for size in sizes]

    return make


_LENGTHS = ({0: BATCH, 1: Dim("length", min=2, max=64)},)

CASES = [
    Case(
        "fixed_batch_1", "exported without a dynamic batch, as torch does by default", PERCEPTRON, (tensor(16),),
        floats(16), ("exported", "compiled"), may_refuse=("exported",),
    ),
    Case(
        "fixed_batch_4", "exported for a batch of exactly 4", PERCEPTRON, (tensor(16),), floats(16),
        ("exported", "compiled"), may_refuse=("exported", "compiled"),
        example=lambda items: (torch.cat([items[0][0]] * 4),),
    ),
    Case(
        "any_batch", "nothing: a dynamic batch", PERCEPTRON, (tensor(16),), floats(16),
        ("eager", "scripted", "traced", "exported", "compiled"), may_refuse=("exported",), dynamic=({0: BATCH},),
        example=lambda items: (torch.cat([items[0][0]] * 2),), precisions=("fp32", "bf16"),
    ),
    Case(
        "declared_double", "declared as float64, but made of float32: memory would be read as what it is not",
        PERCEPTRON, (tensor(16, dtype="float64"),),
        lambda generator: [(each[0].double(),) for each in floats(16)(generator)], ("eager", "scripted", "compiled"),
        may_refuse=("eager", "scripted", "compiled"), dynamic=({0: BATCH},),
        example=lambda items: (items[0][0].float().repeat(2, 1),),
    ),
    Case(
        "declared_wider", "declared as 32 numbers, compiled for 16", PERCEPTRON, (tensor(32),), floats(32),
        ("eager", "scripted", "compiled"), may_refuse=("eager", "scripted", "compiled"), dynamic=({0: BATCH},),
        example=lambda items: (items[0][0][:, :16].repeat(2, 1),),
    ),
    Case(
        "declared_narrower", "declared as 4 numbers, compiled for 16: what lies behind them would be read", PERCEPTRON,
        (tensor(4),), floats(4), ("eager", "scripted", "compiled"), may_refuse=("eager", "scripted", "compiled"),
        dynamic=({0: BATCH},), example=lambda items: (items[0][0].repeat(2, 4),),
    ),
    Case(
        "declared_length", "exported for lengths 2 to 64, declared so", POSITIONS,
        (tensor("2..64", dtype="int64", vocabulary=100),), _too_long, ("eager", "scripted", "exported", "compiled"),
        may_refuse=("exported",), dynamic=_LENGTHS, example=lambda items: (torch.cat([items[2][0]] * 2),),
    ),
    Case(
        "undeclared_length", "exported for lengths 2 to 64, declared as any", POSITIONS, (tensor(-1, dtype="int64"),),
        _too_long, ("eager", "scripted", "exported", "compiled"), may_refuse=("exported", "compiled"),
        dynamic=_LENGTHS, example=lambda items: (torch.cat([items[2][0]] * 2),),
    ),
    Case(
        "even_pictures", "exported for pictures of even sizes", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.down = nn.Conv2d(3, 4, 2, 2)
                self.up = nn.ConvTranspose2d(4, 3, 2, 2)

            def forward(self, x):
                return (self.up(self.down(x).relu()) + x).mean((2, 3))
        """, (tensor(3, "16..64", "16..64"),), _pictures((16, 16), (32, 48), (64, 64), (17, 20), (64, 63)),
        ("eager", "scripted", "compiled"), may_refuse=("compiled",),
        dynamic=({0: BATCH, 2: 2 * Dim("h", min=8, max=32), 3: 2 * Dim("w", min=8, max=32)},),
        example=lambda items: (torch.cat([items[1][0]] * 2),),
    ),
    Case(
        "lookup", "an index beyond the table reads memory", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(10, 6))

            def forward(self, at):
                return self.table[at].sum(1)
        """, (tensor(3, dtype="int64"),),
        lambda generator: [*whole(0, 9, 3, 3, 3)(generator), (torch.tensor([[1, 2, 10]]),),
                           (torch.tensor([[0, 5000, 1]]),), (torch.tensor([[1, -11, 2]]),)],
        ("eager", "scripted", "compiled"), may_refuse=("compiled",), dynamic=({0: BATCH},),
        example=lambda items: (torch.cat([items[0][0]] * 2),),
    ),
    Case(
        "one_row_only", "written for one item: flattens the batch", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(6))

            def forward(self, x):
                return (x * self.w).reshape(1, -1).cumsum(1)[:, -3:]
        """, (tensor(6),), floats(6), ("eager", "scripted", "traced"),
    ),
    Case(
        "batch_inside_length", "rows of the batch end up within other rows", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x):
                return self.fc(x).reshape(3, -1, 4).transpose(0, 1).reshape(-1, 3, 4)
        """, (tensor(3, 4),), floats(3, 4), ("eager", "scripted", "traced"),
    ),
    Case(
        "traced_length", "a user's own trace with its example's length in it", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 3)

            def forward(self, x):
                return self.fc(x).sum(1) / float(x.shape[1])
        """, (tensor("1..64", 4),), lengths(1, 5, 16, 33, 64), ("eager", "scripted"),
    ),
    Case(
        "odd_size_padding", "pads by what is missing, nothing for the example", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Conv2d(3, 4, 3, 2, 1)
                self.up = nn.ConvTranspose2d(4, 4, 2, 2)
                self.s = nn.Conv2d(3, 4, 1)

            def forward(self, x, **kwargs):
                u, s = self.up(self.a(x)), self.s(x)
                dy, dx = s.shape[2] - u.shape[2], s.shape[3] - u.shape[3]
                if dy or dx:
                    u = F.pad(u, [0, dx, 0, dy])
                return (u + s).mean((2, 3))
        """, (tensor(3, -1, -1),), _pictures((16, 16), (17, 20), (15, 31), (1, 1)),
    ),
]  # fmt: skip
