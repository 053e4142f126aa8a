"""Inputs that are moved by what rounding does to a number: what comes of it in an answer no engine has to get right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

# A step of fp32.
_STEP = 2.0**-22
# Of each number's own, which shows more of it.
_OWN_STEP = 2.0**-23
# What a network of some dozen layers is off by in fp32, of its largest number.
_NETWORK = 1e-6


def moved(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All numbers up by one step."""
    return [each * (1 + _STEP) if each.is_floating_point() else each for each in inputs]


def moved_apart(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each number up or down by a step of its own. The same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return [
        each * (1 + _OWN_STEP * (2 * torch.randint(0, 2, each.shape, generator=generator) - 1))
        if each.is_floating_point() else each for each in inputs
    ]  # fmt: skip


def rounded(
    run: Callable[[list[torch.Tensor]], Any], inputs: Sequence[torch.Tensor], answers: list[torch.Tensor]
) -> Any:
    """Answers that are off by rounding: those to inputs that were moved. Whole numbers cannot be: where there are no
    others, by what networks are off.

    Args:
        answers: all tensors in the answer to ``inputs``.
    """
    if any(each.is_floating_point() for each in inputs):
        return run(moved_apart(inputs))
    return [
        each + _NETWORK * torch.nan_to_num(each, 0.0, 0.0, 0.0).abs().max()
        if each.is_floating_point() and each.numel() else each for each in answers
    ]  # fmt: skip
