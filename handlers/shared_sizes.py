"""Inputs that share a dimension, such as a text's ids and their mask: one size in one request, and filled up alike.

A mask that came shorter than its ids would be filled up by itself to the same size, and its model would compute
something else than was asked. So the sizes are compared as they came, before anything is filled up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from pyserve.handler import InputError
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.input_config import shared_dimensions


def filled_up(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A request's inputs, each [n, ...] and allowed by its spec, padded.

    Raises:
        InputError: inputs that share a dimension have different sizes there; the text names both, and what works.
    """
    check_shared(specs, tensors)
    return [spec.padded(tensor) for spec, tensor in zip(specs, tensors, strict=True)]


def check_shared(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> None:
    """Whether inputs, as they came, have one size where they share a dimension. InputError if not."""
    if len(specs) > 1:
        for name, places in _shared(tuple(specs)):
            sizes = [tensors[index].shape[axis + 1] for index, axis in places]
            if len(set(sizes)) > 1:
                raise InputError(_text(name, [specs[index].name for index, _ in places], sizes))


@functools.lru_cache(maxsize=256)
def _shared(specs: tuple[TensorSpec, ...]) -> list[tuple[str, list[tuple[int, int]]]]:
    return list(shared_dimensions(specs).items())


def _text(name: str, inputs: list[str], sizes: list[int]) -> str:
    came = ", ".join(f"{each!r} has {size}" for each, size in zip(inputs, sizes, strict=True))
    if name:
        return f"the inputs share the dimension {name!r}, but {came}; send the same number of entries for each"
    return (
        f"the inputs are padded and share their size, but {came}; send the same number of entries for each (inputs "
        "with sizes of their own have different names under 'same' in model-config.yaml)"
    )
