"""Numbers as JSON has them -> a tensor of one kind, or which of them does not fit.

`array` is strict about types and ranges, and five times as fast as torch.tensor on lists. What it is not strict about
is looked at here: floats that a smaller kind can only call infinite, and booleans other than 0 and 1.
"""

from __future__ import annotations

import array
import math
from typing import Any

import numpy as np
import torch

from pyserve.handlers.rows import found

# dtype name -> (torch dtype, typecode of the `array` that takes its numbers from Python).
KINDS = {
    # From double at once, as numpy converts: by way of float32 some numbers would be rounded twice.
    "float16": (torch.float16, "d"),
    "bfloat16": (torch.bfloat16, "f"),
    "float32": (torch.float32, "f"),
    "float64": (torch.float64, "d"),
    "uint8": (torch.uint8, "B"),
    "uint16": (torch.uint16, "H"),
    "uint32": (torch.uint32, "I"),
    "uint64": (torch.uint64, "Q"),
    "int8": (torch.int8, "b"),
    "int16": (torch.int16, "h"),
    "int32": (torch.int32, "i"),
    "int64": (torch.int64, "q"),
    "bool": (torch.bool, "B"),
}
_KIND_OF = dict(KINDS.values())
_ARRAY_DTYPES = {torch.float16: torch.float64, torch.bfloat16: torch.float32, torch.bool: torch.uint8}
# The kinds that may call a number infinite which Python's floats can hold.
_LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32)}
_FEW_MAX = 64
_PIECE_MAX = 64 << 10


class UnfitNumberError(ValueError):
    """A value that the kind cannot hold.

    Attributes:
        position: in the flat list.
        text: what stands there and what may, safe to send to a client.
    """

    def __init__(self, position: int, text: str):
        super().__init__(text)
        self.position = position
        self.text = text


def tensor_of_numbers(flat: list[Any], dtype: torch.dtype) -> torch.Tensor:
    """``flat``, at least one value -> tensor [n]. true and false are 1 and 0, whole numbers may become floats.

    Raises:
        UnfitNumberError: one is no number, not whole though the kind is, or out of the kind's range.
    """
    typecode = _KIND_OF[dtype]
    try:
        numbers = array.array(typecode, flat if len(flat) <= _PIECE_MAX else ())
        if not numbers:
            for at in range(0, len(flat), _PIECE_MAX):  # others get the interpreter between two of them
                numbers.extend(array.array(typecode, flat[at : at + _PIECE_MAX]))
    except (TypeError, OverflowError) as error:
        raise _unfit(flat, typecode) from error
    tensor = torch.frombuffer(numbers, dtype=_ARRAY_DTYPES.get(dtype, dtype))
    largest = _LARGEST.get(dtype)
    if largest is not None:
        if dtype is torch.float16:
            with np.errstate(over="ignore"):
                tensor = torch.from_numpy(tensor.numpy().astype(np.float16))
        elif dtype is torch.bfloat16:
            tensor = tensor.to(dtype)
        # Python looks at a few numbers faster than torch starts to; NaN fails the comparison or is passed over.
        if len(flat) > _FEW_MAX or not -largest <= min(flat) <= max(flat) <= largest:
            _check_finite(flat, tensor)
    elif dtype is torch.bool:
        if tensor.max().item() > 1:
            position = next(position for position, value in enumerate(flat) if value > 1)
            raise UnfitNumberError(position, f"numbers other than 0 and 1: {found(flat[position])}")
        tensor = tensor.to(torch.bool)
    return tensor


def _check_finite(flat: list[Any], tensor: torch.Tensor) -> None:
    """A number that became infinite is out of range; one that was sent as Infinity is not."""
    # numpy looks ten times as fast; it has no bfloat16, of which float32 holds every number.
    array_ = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    infinite = np.isinf(array_)
    if not infinite.any():
        return
    for position in np.flatnonzero(infinite).tolist():
        value = flat[position]
        if not (isinstance(value, float) and math.isinf(value)):
            largest = torch.finfo(tensor.dtype).max
            raise UnfitNumberError(position, f"{found(value)}, beyond {-largest:.6g} to {largest:.6g}")


def _unfit(flat: list[Any], typecode: str) -> UnfitNumberError:
    for position, value in enumerate(flat):
        try:
            array.array(typecode, (value,))
        except (TypeError, OverflowError):
            return UnfitNumberError(position, found(value))
    raise AssertionError("every value fits alone")
