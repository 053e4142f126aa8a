"""How far two answers of one model are apart: outputs of a network, or answers read from JSON.

A difference is relative to the largest number expected in its tensor, since that is what a change in the order of
additions scales with. Everything that rounding cannot explain (a shape, a name, a whole number, a NaN that stands
elsewhere) is an infinite difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# What two ways to compute one thing may differ by, as `difference` counts. Sums of a network are some hundred
# roundings long, in fp32 of 6e-8 each, in tf32 and fp16 of 5e-4 and in bf16 of 4e-3, most of which cancel. In int8
# a number just beside the middle between two whole ones becomes the other one: a step of 4e-3 or, with 7 bits, 8e-3.
ROUNDING: dict[str, float] = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2, "fp16": 5e-3, "int8": 5e-2}

# Magnitude below which numbers count as if they were of this one. Small, because a model may answer in seconds
# or metres; not zero, because noise around a sum of exactly 0 has no scale.
MAGNITUDE_MIN = 1e-6


def difference(expected: Any, got: Any) -> float:
    """The largest difference between two outputs, relative to the largest finite magnitude expected in its tensor.

    Takes tensors, numpy arrays, numbers, bools, None, texts, bytes, lists, tuples, named tuples, mappings, objects
    with attributes (dataclasses and the like) and any nesting of these. Named tuples and plain ones compare by
    position; a list of floating-point numbers, as JSON has it, counts as one tensor.

    Returns:
        0.0 for equal ones; infinity where the structure, a shape, the kind of dtype (bool, whole, floating point,
        complex), the places of NaN or infinities, or anything but floating-point numbers differs.
    """
    if isinstance(expected, (torch.Tensor, np.ndarray)) or isinstance(got, (torch.Tensor, np.ndarray)):
        return _of_tensors(expected, got)
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or expected.keys() != got.keys():
            return math.inf
        return _largest((expected[key], got[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return _of_sequences(expected, got)
    if isinstance(expected, float) and isinstance(got, float):
        return _of_tensors(torch.tensor(expected, dtype=torch.float64), torch.tensor(got, dtype=torch.float64))
    if type(expected) is not type(got):
        return math.inf
    if _has_attributes_only(expected):
        return difference(vars(expected), vars(got))
    return 0.0 if bool(expected == got) else math.inf


def rows(output: Any, first: int, count: int) -> Any:
    """Rows ``first`` to ``first + count`` of every tensor [n, ...] in a batched output, in the same nesting.

    What has no rows (0-dimensional tensors, numbers, texts, None) belongs to every row and stays.
    """
    if isinstance(output, (torch.Tensor, np.ndarray)):
        return output[first : first + count] if output.ndim else output
    if isinstance(output, Mapping):
        return {key: rows(value, first, count) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        parts = [rows(each, first, count) for each in output]
        if isinstance(output, list):
            return parts
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output


def dtypes(output: Any) -> list[torch.dtype]:
    """The dtypes of all tensors in an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output.dtype]
    if isinstance(output, Mapping):
        return [dtype for value in output.values() for dtype in dtypes(value)]
    if isinstance(output, (list, tuple)):
        return [dtype for value in output for dtype in dtypes(value)]
    return []


def _has_attributes_only(value: Any) -> bool:
    """Whether it is a record: a dataclass, a SimpleNamespace, or an object that knows no equality but identity."""
    if not hasattr(value, "__dict__") or isinstance(value, type) or callable(value):
        return False
    is_record = hasattr(value, "__dataclass_fields__") or isinstance(value, SimpleNamespace)
    return is_record or type(value).__eq__ is object.__eq__


def _largest(pairs: Any) -> float:
    return max((difference(expected, got) for expected, got in pairs), default=0.0)


def _of_sequences(expected: Any, got: Any) -> float:
    if isinstance(expected, list) is not isinstance(got, list) or not isinstance(got, (list, tuple)):
        return math.inf
    names = getattr(expected, "_fields", None), getattr(got, "_fields", None)
    if len(expected) != len(got) or (all(names) and names[0] != names[1]):
        return math.inf
    if isinstance(expected, list):
        numbers = (number_list(expected), number_list(got))
        if numbers[0] is not None and numbers[1] is not None:
            return _of_tensors(*numbers)
    return _largest(zip(expected, got, strict=True))


def number_list(values: Any) -> torch.Tensor | None:
    """Nested lists of floating-point numbers, null for what is not one, as a tensor; None if they are anything else."""
    leaf: Any = values
    while isinstance(leaf, list) and leaf:
        leaf = leaf[0]
    if not isinstance(leaf, float) and leaf is not None:
        return None
    try:
        array = np.array(values, dtype=object)
    except ValueError:  # ragged
        return None
    if not all(isinstance(each, float) or each is None for each in array.flat):
        return None
    return torch.from_numpy(array.astype(np.float64))  # None becomes NaN


def _of_tensors(expected: Any, got: Any) -> float:
    left, right = _tensor(expected), _tensor(got)
    if left is None or right is None or left.shape != right.shape or _kind(left.dtype) != _kind(right.dtype):
        return math.inf
    if left.numel() == 0:
        return 0.0
    if not left.is_floating_point() and not left.is_complex():
        return 0.0 if torch.equal(left.to(torch.int64), right.to(torch.int64)) else math.inf
    if left.is_complex():
        left, right = torch.view_as_real(left.resolve_conj()), torch.view_as_real(right.resolve_conj())
    left, right = left.double(), right.double()
    finite = torch.isfinite(left)
    if not torch.equal(finite, torch.isfinite(right)):
        return math.inf
    if not bool(finite.all()):
        odd_left, odd_right = left[~finite], right[~finite]
        if not torch.equal(torch.nan_to_num(odd_left, nan=0.0), torch.nan_to_num(odd_right, nan=0.0)):
            return math.inf
        left, right = left[finite], right[finite]
        if left.numel() == 0:
            return 0.0
    scale = max(float(left.abs().max()), MAGNITUDE_MIN)
    return float((left - right).abs().max()) / scale


def _tensor(value: Any) -> torch.Tensor | None:
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(np.array(value))
        except TypeError:  # texts, objects
            return None
    if not isinstance(value, torch.Tensor):
        return None
    value = value.detach()
    if value.is_quantized:
        value = value.dequantize()
    return (value.to_dense() if value.layout is not torch.strided else value).cpu()


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "whole"
