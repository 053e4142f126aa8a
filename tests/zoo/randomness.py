"""Models that draw: each answer must be a draw of its own."""

from __future__ import annotations

from typing import Any

import torch

from .case import Case, Item, floats, tensor

X = (tensor(64),)


def _dropped(item: Item, got: Any) -> str:
    """Half of the numbers are left out, the others doubled."""
    kept = got == item[0] * 2
    if not bool((kept | (got == 0)).all()):
        return "a number is neither left out nor doubled"
    return "" if 8 <= int((got != 0).sum()) <= 56 or bool((item[0] == 0).all()) else "too many or too few left out"


def _around(item: Item, got: Any) -> str:
    """The input plus standard normal noise."""
    noise = got - item[0]
    return "" if float(noise.abs().max()) < 6.5 and 0.5 < float(noise.std()) < 1.6 else "no standard normal noise"


def _coins(item: Item, got: Any) -> str:
    """Zeros and ones."""
    return "" if bool(((got == 0) | (got == 1)).all()) and 8 <= int(got.sum()) <= 56 else "no fair coins"


def _model(line: str) -> str:
    return f"""
class Net(nn.Module):
    def forward(self, x):
        {line}
"""


ALL = ("eager", "scripted", "traced")
FLOATS = floats(64, scales=(1, 1, 2, 3))

CASES = [
    Case("dropout_left_on", "a trace keeps dropout; a constant mask would look right",
         _model("return F.dropout(x, 0.5)"), X, FLOATS, ALL, likely=_dropped, varies=True),
    Case("noise", "noise drawn once and kept", _model("return x + torch.randn_like(x)"), X, FLOATS, ALL,
         likely=_around, varies=True),
    Case("coins", "coins of the probabilities' own", _model("return torch.bernoulli(torch.full_like(x, 0.5))"), X,
         FLOATS, ALL, likely=_coins, varies=True),
    Case(
        "seeded_noise", "seeded in forward: each answer the same, in a batch too", _model(
            "torch.manual_seed(0)\n        return x + torch.randn(x.shape)"), X, FLOATS, ("eager",),
    ),
    Case(
        "own_generator", "a generator of its own, seeded anew in each call", """
        class Net(nn.Module):
            def forward(self, x):
                generator = torch.Generator().manual_seed(5)
                return x + torch.randn(x.shape, generator=generator)
        """, X, FLOATS, ("eager",),
    ),
    Case(
        "tiny_dropout", "leaves out one number in ten thousand", _model("return F.dropout(x, 0.0001)"), X, FLOATS,
        ("eager", "scripted", "traced"),
        likely=lambda item, got: "" if bool(((got == 0) | torch.isclose(got, item[0] / 0.9999)).all()) else "neither",
    ),
]  # fmt: skip
