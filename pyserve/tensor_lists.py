"""Tensors as nested lists, large ones in pieces, so that other threads get a turn between two of them."""

from __future__ import annotations

from typing import Any

import torch

# Numbers of a piece: they take half a millisecond.
NUMBERS_MAX = 32 << 10


def to_lists(tensor: torch.Tensor) -> list[Any]:
    """``tensor.tolist()`` of a tensor of at least one dimension."""
    count = tensor.numel()
    if count <= NUMBERS_MAX:
        return tensor.tolist()
    size = count // len(tensor)
    if size > NUMBERS_MAX:
        return [to_lists(row) for row in tensor]
    values: list[Any] = []
    step = NUMBERS_MAX // size
    for at in range(0, len(tensor), step):
        values += tensor[at : at + step].tolist()
    return values
