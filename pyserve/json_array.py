"""A large array of numbers from a JSON body, which was read to numbers at once and not to lists of Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BY_NUMPY = {torch.uint16: np.uint16, torch.uint32: np.uint32, torch.uint64: np.uint64}


class Numbers(Protocol):
    """What the reader made: a buffer of int64, or of float64 if one of them has a fraction or an exponent."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def is_float(self) -> bool: ...


class JsonArray:
    """A regular array of at least one number, as deep as ``shape`` is long.

    Args:
        numbers: its numbers, row by row.
        read_values: makes the nested lists that the standard library would have made.
    """

    __slots__ = ("_numbers", "_read_values", "shape")

    def __init__(self, numbers: Numbers, read_values: Callable[[], list[Any]]):
        self._numbers = numbers
        self._read_values = read_values
        self.shape: tuple[int, ...] = numbers.shape

    def __len__(self) -> int:
        return self.shape[0]

    def values(self) -> list[Any]:
        """The nested lists. Costs what reading them at first would have cost."""
        return self._read_values()

    @property
    def natural_dtype(self) -> torch.dtype:
        """What torch makes of such lists: its default kind of floats, or int64 if all are whole."""
        return torch.get_default_dtype() if self._numbers.is_float else torch.int64

    def tensor(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The numbers as a tensor [*shape]: bit by bit what `handlers.json_numbers` makes of the lists.

        None if one of them does not fit ``dtype``; the lists say which.
        """
        whole = self._numbers
        numbers = torch.frombuffer(whole, dtype=torch.float64 if whole.is_float else torch.int64)
        made = _as_floats(numbers, dtype) if dtype in _FLOATS else _as_integers(numbers, dtype)
        return None if made is None else made.view(self.shape)


def _as_floats(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    # By way of float64, as Python's own numbers take it: int64 to float32 at once may round otherwise.
    doubles = numbers.to(torch.float64)
    if dtype is torch.float64:
        return doubles
    if dtype is torch.float16:
        with np.errstate(over="ignore"):
            made = torch.from_numpy(doubles.numpy().astype(np.float16))  # rounds once, from double
    else:
        made = doubles.to(torch.float32).to(dtype)
    # The numbers of the text are all finite, so one that is not any more is out of range.
    return made if bool(torch.isfinite(made).all()) else None


def _as_integers(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if numbers.dtype is not torch.int64:
        return None
    if dtype is torch.int64:
        return numbers
    low, high = (int(each) for each in torch.aminmax(numbers))
    if dtype is torch.bool:
        return numbers.to(dtype) if low >= 0 and high <= 1 else None
    limits = torch.iinfo(dtype)
    if low < limits.min or high > limits.max:
        return None
    kind = _BY_NUMPY.get(dtype)  # torch converts to few unsigned kinds
    return numbers.to(dtype) if kind is None else torch.from_numpy(numbers.numpy().astype(kind))
