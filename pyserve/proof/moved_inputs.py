"""Inputs that are moved by what rounding does to a number: what comes of it in an answer no engine has to get right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pyserve.proof.small_parts import leaves

# A step of fp32.
_STEP = 2.0**-22
# Of each number's own, which shows more of it.
_OWN_STEP = 2.0**-23
# What a network of some dozen layers is off by in fp32, of its largest number.
_NETWORK = 1e-6
# Ways to move inputs apart.
_MOVES = 6


def moved(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All numbers up by one step."""
    return [each * (1 + _STEP) if each.is_floating_point() else each for each in inputs]


def moved_apart(inputs: Sequence[torch.Tensor], seed: int = 0) -> list[torch.Tensor]:
    """Each number up or down by a step of its own. The same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    return [
        each * (1 + _OWN_STEP * (2 * torch.randint(0, 2, each.shape, generator=generator) - 1))
        if each.is_floating_point() else each for each in inputs
    ]  # fmt: skip


def rounded(
    run: Callable[[list[torch.Tensor]], Any], inputs: Sequence[torch.Tensor], answers: list[torch.Tensor]
) -> list[torch.Tensor]:
    """``answers`` off by rounding: by as much as they move with their inputs. Where they do not move (whole numbers,
    zeros, what is cut off first) by what networks are off.

    Args:
        run: what gives them; it may raise, or give something else where it cannot answer.
        answers: all tensors in the answer to ``inputs``.
    """
    is_moved = any(each.is_floating_point() for each in inputs)
    # Several times: a single number is by chance rounded to what it was.
    found = [leaves(run(moved_apart(inputs, seed))) for seed in range(_MOVES if is_moved else 0)]
    shapes = [each.shape for each in answers]
    found = [each for each in found if [part.shape for part in each] == shapes]
    return [_off(answer, [each[at] for each in found]) for at, answer in enumerate(answers)]


def _off(answer: torch.Tensor, moved: Sequence[torch.Tensor]) -> torch.Tensor:
    if not answer.is_floating_point() or not answer.numel():
        return answer
    off = torch.zeros_like(answer)
    for each in moved:
        off = torch.maximum(off, (each - answer).abs().nan_to_num(0.0, 0.0, 0.0))
    return answer + (off if off.any() else _NETWORK * answer.nan_to_num(0.0, 0.0, 0.0).abs().max())
