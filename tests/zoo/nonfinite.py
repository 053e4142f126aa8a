"""NaN, infinities, denormals and large numbers through what optimisers touch."""

from __future__ import annotations

import math

import torch
from torch.export import Dim

from .case import Case, Item, Items, tensor

ODD = (math.nan, math.inf, -math.inf, 1e-40, 1e38, -1e38, 3e-39, -0.0)


def _odd(*shape: int) -> Items:
    """Normal numbers with one odd number in the middle, or nothing but odd ones."""

    def make(generator: torch.Generator) -> list[Item]:
        items: list[Item] = [(torch.randn(1, *shape, generator=generator),)]
        for number in ODD:
            one = torch.randn(1, *shape, generator=generator)
            one.view(-1)[one.numel() // 2] = number
            items += [(one,), (torch.full((1, *shape), number),)]
        return items

    return make


BACKENDS = ("eager", "scripted", "traced")

CASES = [
    Case(
        "convolution_relu", "relu of a fused convolution turns NaN into 0", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.c = nn.Conv2d(3, 8, 3, padding=1)
                self.d = nn.Conv2d(8, 4, 3, padding=1)

            def forward(self, x):
                return self.d(self.c(x).relu()).relu()
        """, (tensor(3, 8, 8),), _odd(3, 8, 8), (*BACKENDS, "compiled"),
        dynamic=({0: Dim("batch", min=1, max=64)},), example=lambda items: (items[0][0].repeat(2, 1, 1, 1),),
    ),
    Case(
        "convolution_norm_pool", "normalisation folded into weights, pooling", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.n = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                                       nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

            def forward(self, x):
                return self.n(x)
        """, (tensor(3, 8, 8),), _odd(3, 8, 8), BACKENDS,
    ),
    Case(
        "linear_relu", "relu behind a linear layer", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(16, 16)
                self.b = nn.Linear(16, 4)

            def forward(self, x):
                return self.b(F.relu(self.a(x)))
        """, (tensor(16),), _odd(16), BACKENDS,
    ),
    Case(
        "activations", "each activation's answer to NaN and infinity", """
        class Net(nn.Module):
            def forward(self, x):
                return torch.cat([F.relu(x), F.gelu(x), torch.sigmoid(x), F.hardswish(x), F.silu(x), torch.tanh(x),
                                  x.clamp(-1, 1), F.elu(x), F.leaky_relu(x), F.hardtanh(x)], 1)
        """, (tensor(8),), _odd(8), BACKENDS,
    ),
    Case(
        "convolution_sum", "a residual sum and an activation fused into a convolution", """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Conv2d(4, 4, 3, padding=1)
                self.b = nn.Conv2d(4, 4, 3, padding=1)

            def forward(self, x):
                y = F.hardswish(self.a(x))
                return F.relu(self.b(y) + x).amax((2, 3))
        """, (tensor(4, 6, 6),), _odd(4, 6, 6), BACKENDS,
    ),
    Case(
        "softmax_of_infinities", "attention over a masked row", """
        class Net(nn.Module):
            def forward(self, x):
                return torch.softmax(x, 1), x.max(1).values, x.argmax(1)
        """, (tensor(8),), _odd(8), BACKENDS,
    ),
]  # fmt: skip
