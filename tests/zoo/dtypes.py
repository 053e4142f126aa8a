"""Numbers that are no float32: exact whole numbers, bools, complex, double, half."""

from __future__ import annotations

import torch

from .case import Case, Item, floats, tensor, whole


def _large(generator: torch.Generator) -> list[Item]:
    numbers = [2**53 + 1, -(2**53) - 1, 2**62 + 3, 100_085, 0]
    return [(torch.tensor([[number, 1, -7]]),) for number in numbers]


def _picture_bytes(generator: torch.Generator) -> list[Item]:
    return [(torch.randint(0, 256, (1, 3, 8, 8), generator=generator, dtype=torch.uint8),) for _ in range(4)]


PRECISE = ("fp32", "bf16")

CASES = [
    Case(
        "ids_in_a_buffer", "lowered precision rounds whole numbers: 100085 becomes 99840", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.register_buffer("ids", torch.tensor([100085, 99999, 257, 1]))

            def forward(self, x):
                return self.fc(x), self.ids.expand(x.shape[0], 4).clone()
        """, (tensor(4),), floats(4), ("eager", "scripted"), precisions=PRECISE, may_refuse=("bf16",),
    ),
    Case(
        "bool_buffer", "lowered precision turns a mask into numbers", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self.register_buffer("mask", torch.tensor([True, False, True, True]))

            def forward(self, x):
                return self.fc(x).masked_fill(~self.mask, 0.5)
        """, (tensor(4),), floats(4), ("eager", "scripted"), precisions=PRECISE,
    ),
    Case(
        "complex_buffer", "lowered precision drops imaginary parts", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.randn(9, dtype=torch.complex64))

            def forward(self, x):
                return torch.fft.irfft(torch.fft.rfft(x.float()) * self.w, n=16)
        """, (tensor(16),), floats(16), ("eager", "scripted"), precisions=PRECISE, may_refuse=("bf16",),
    ),
    Case(
        "double_inside", "sums in double, which lowered precision must leave alone", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("offset", torch.tensor([1e8], dtype=torch.float64))

            def forward(self, x):
                return (x.double() + self.offset - 1e8).float()
        """, (tensor(4),), floats(4), ("eager", "traced"), precisions=PRECISE,
    ),
    Case(
        "cancelling", "lowered precision leaves nothing of a small difference", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("offset", torch.full((4,), 1000.0))

            def forward(self, x):
                return (torch.tanh(x) + self.offset) - self.offset
        """, (tensor(4),), floats(4, scales=(1, 0.5, 1, 2, 1)), ("eager", "scripted"), precisions=PRECISE,
        may_refuse=("bf16",), rounding=2e-3,
    ),
    Case(
        "positions_in_float", "lowered precision rounds positions above 256", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("at", torch.arange(600.0))

            def forward(self, x):
                return torch.cos(self.at * 0.5) * x
        """, (tensor(1),), floats(1), ("eager", "scripted"), precisions=PRECISE, may_refuse=("bf16",),
    ),
    Case(
        "large_whole_numbers", "whole numbers beyond float64", """
        class Net(nn.Module):
            def forward(self, n):
                return n * 2 // 2 + 1, n % 1000
        """, (tensor(3, dtype="int64"),), _large, ("eager", "scripted", "traced"),
    ),
    Case(
        "small_whole_numbers", "int32 in, int32 and bool out", """
        class Net(nn.Module):
            def forward(self, n):
                return n + n, n > 3
        """, (tensor(4, dtype="int32"),),
        lambda generator: [(each[0].to(torch.int32),) for each in whole(-9, 9, 4, 4, 4)(generator)],
        ("eager", "scripted", "traced"),
    ),
    Case(
        "double_all_through", "float64 in and out, to its own precision", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4).double()

            def forward(self, x):
                return self.fc(x)
        """, (tensor(4, dtype="float64"),),
        lambda generator: [(each[0].double(),) for each in floats(4)(generator)], ("eager", "scripted", "traced"),
    ),
    Case(
        "half_in_and_out", "float16 in and out", """
        class Net(nn.Module):
            def forward(self, x):
                return x * 2 + 1
        """, (tensor(4, dtype="float16"),),
        lambda generator: [(each[0].half(),) for each in floats(4)(generator)], ("eager", "scripted", "traced"),
    ),
    Case(
        "half_weights", "float16 inside of float32", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.n = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(288, 3)).half()

            def forward(self, x):
                return self.n(x.half()).float()
        """, (tensor(3, 8, 8),),
        lambda generator: [(torch.rand(1, 3, 8, 8, generator=generator),) for _ in range(4)], ("eager", "scripted"),
        rounding=5e-3,
    ),
    Case(
        "bytes_of_pictures", "uint8, which wraps around", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                return self.conv(x.float() / 255).mean((2, 3)), (x + 200).flatten(1)[:, :5]
        """, (tensor(3, 8, 8, dtype="uint8"),), _picture_bytes, ("eager", "scripted", "traced"),
    ),
    Case(
        "chosen_classes", "whole numbers out of a network", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(16, 40)

            def forward(self, x):
                return self.fc(x).topk(3, dim=1).indices
        """, (tensor(16),), floats(16), ("eager", "scripted", "traced"),
    ),
    Case(
        "attention", "a transformer's layer, which lowered precision refuses easily", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.e = nn.Embedding(30, 16)
                self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                self.register_buffer("at", torch.arange(32))
                self.p = nn.Embedding(32, 16)

            def forward(self, ids):
                return self.layer(self.e(ids) + self.p(self.at[:ids.shape[1]])).mean(1)
        """, (tensor("1..32", dtype="int64", vocabulary=30),), whole(0, 29, 8, 1, 32, 13), precisions=PRECISE,
    ),
    Case(
        "recurrent", "an LSTM, with its states", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.g = nn.LSTM(4, 6, 2, batch_first=True)

            def forward(self, x):
                y, (h, c) = self.g(x)
                return y, h.transpose(0, 1), c.transpose(0, 1)
        """, (tensor("1..64", 4),),
        lambda generator: [(torch.rand(1, n, 4, generator=generator),) for n in (16, 3, 40, 1)],
        ("eager", "scripted"), precisions=PRECISE, may_refuse=("bf16",),
    ),
]  # fmt: skip
