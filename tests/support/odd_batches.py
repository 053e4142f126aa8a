"""Batches on which two ways to compute one operator might disagree: ties, signs of zero, limits, what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

BATCHES = (1, 2, 3, 7)
# Sizes of a free dimension that inputs have in turn; all are within 1..64.
SIZES = (5, 1, 8, 33, 64)

_BOOLS = ["some", "none", "all", "few"]
_WHOLE = ["random", "ties", "small", "zeros", "ones", "negative", "limits", "beyond fp32", "beyond int32", "large",
          "thousands", "rising"]  # fmt: skip
_FLOATS = [
    "random", "ties", "signed zeros", "zeros", "-zeros", "halves", "whole", "negative", "unit", "tiny", "denormal",
    "denormal among", "hundreds", "thousands", "million", "1e6 all", "constant", "ones", "one nan", "all nan",
    "one inf", "one -inf", "all inf", "one 1e30", "1e30", "beyond fp32", "limits of int32", "uint8", "rising",
    "falling", "one large", "nearly alike", "thirds", "negative halves", "row of zeros", "row of nan", "1e-30",
    "1e-20", "1e10", "sparse",
]  # fmt: skip


def odd_batches(
    shape: Sequence[int | str], dtype: torch.dtype, vocabulary: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """At least 40 batches of items of ``shape``, with what is special about each; the same ones every time.

    Args:
        shape: of an item; a text is a free size.
        vocabulary: whole numbers are below this one.
    """
    generator = torch.Generator().manual_seed(3)
    kinds = _FLOATS if dtype.is_floating_point else _BOOLS if dtype is torch.bool else _WHOLE
    for number, kind in enumerate(kinds * (40 // len(kinds) + 1)):
        batch = BATCHES[(number + number // len(kinds)) % len(BATCHES)]
        size = SIZES[number % len(SIZES)]
        sizes = [batch, *(size if isinstance(each, str) else each for each in shape)]
        yield f"{kind}, {sizes}", _filled(kind, sizes, dtype, generator, vocabulary)


def _filled(
    kind: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator, vocabulary: int | None
) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < {"none": 0.0, "all": 1.0, "some": 0.5, "few": 0.1}[kind]
    if not dtype.is_floating_point:
        return _whole_numbers(kind, shape, dtype, generator, vocabulary)
    return _floats(kind, shape, generator).to(dtype)


def _floats(kind: str, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    whole = torch.randint(-3, 4, shape, generator=generator).float()
    coin = torch.rand(shape, generator=generator) < 0.5
    ramp = torch.arange(normal.numel(), dtype=torch.float32).reshape(shape)
    one = torch.zeros(shape, dtype=torch.bool)
    one.view(-1)[one.numel() // 2] = True
    row = torch.zeros(shape, dtype=torch.bool)
    row[-1] = True
    made = {
        "random": lambda: normal,
        "ties": lambda: whole,
        "signed zeros": lambda: torch.where(coin, 0.0, -0.0),
        "zeros": lambda: torch.zeros(shape),
        "-zeros": lambda: torch.full(shape, -0.0),
        "halves": lambda: whole + 0.5,
        "negative halves": lambda: -whole.abs() - 0.5,
        "whole": lambda: whole * 7,
        "negative": lambda: -3 * normal.abs() - 0.1,
        "unit": lambda: torch.rand(shape, generator=generator),
        "tiny": lambda: normal * 1e-6,
        "denormal": lambda: torch.where(coin, 1e-40, -1e-40),
        "denormal among": lambda: torch.where(coin, 1e-40, normal),
        "hundreds": lambda: normal * 100,
        "thousands": lambda: normal * 1e3,
        "million": lambda: (normal * 5e5).clamp(-1e6, 1e6),
        "1e6 all": lambda: torch.where(coin, 1e6, -1e6),
        "constant": lambda: torch.full(shape, 37.5),
        "ones": lambda: torch.ones(shape),
        "one nan": lambda: torch.where(one, math.nan, normal),
        "all nan": lambda: torch.full(shape, math.nan),
        "one inf": lambda: torch.where(one, math.inf, normal),
        "one -inf": lambda: torch.where(one, -math.inf, normal),
        "all inf": lambda: torch.where(coin, math.inf, -math.inf),
        "one 1e30": lambda: torch.where(one, 1e30, normal),
        "1e30": lambda: normal * 1e30,
        "beyond fp32": lambda: torch.where(coin, 16777216.0, 16777218.0),
        "limits of int32": lambda: torch.where(coin, 2147483648.0, -2147483648.0),
        "uint8": lambda: torch.randint(0, 256, shape, generator=generator).float(),
        "rising": lambda: ramp / 4,
        "falling": lambda: -ramp,
        "one large": lambda: torch.where(one, 9e5, normal),
        "nearly alike": lambda: 1 + normal * 1e-6,
        "thirds": lambda: whole / 3,
        "row of zeros": lambda: torch.where(row, 0.0, normal),
        "row of nan": lambda: torch.where(row, math.nan, normal),
        "1e-30": lambda: normal * 1e-30,
        "1e-20": lambda: normal * 1e-20,
        "1e10": lambda: normal * 1e10,
        "sparse": lambda: torch.where(torch.rand(shape, generator=generator) < 0.8, 0.0, normal),
    }[kind]()
    return made.contiguous()


def _whole_numbers(
    kind: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator, vocabulary: int | None
) -> torch.Tensor:
    info = torch.iinfo(dtype)
    low, high = (info.min, info.max) if vocabulary is None else (0, vocabulary - 1)
    first, last = {
        "random": (-100, 100), "ties": (0, 1), "small": (-4, 9), "negative": (-90, -1), "large": (-1000000, 1000000),
        "thousands": (-4000, 4000), "beyond fp32": (16777210, 16777225), "beyond int32": (1 << 31, (1 << 31) + 9),
    }.get(kind, (0, 0))  # fmt: skip
    first, last = (min(max(each, low), high) for each in (first, last))
    made = torch.randint(first, last + 1, shape, generator=generator)
    if kind == "limits":
        made = torch.where(torch.rand(shape, generator=generator) < 0.5, low, high)
    elif kind == "rising":
        made = torch.arange(made.numel()).reshape(shape) % min(high + 1, 100)
    elif kind in ("zeros", "ones"):
        made = torch.full(shape, int(kind == "ones"))
    return made.to(dtype)
