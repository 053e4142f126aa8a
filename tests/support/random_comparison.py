"""Whether an answer is the model's output: plain torch and Python, nothing of the server's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def tensors_of(output: Any) -> list[torch.Tensor]:
    """All tensors of a nested output, in order."""
    return [each for each in leaves_of(output) if isinstance(each, torch.Tensor)]


def leaves_of(output: Any) -> list[Any]:
    if isinstance(output, Mapping):
        return [leaf for each in output.values() for leaf in leaves_of(each)]
    if isinstance(output, (tuple, list)):
        return [leaf for each in output for leaf in leaves_of(each)]
    return [output]


def rows_of(output: Any) -> Any:
    """The first row of each tensor, nested as before."""
    if isinstance(output, torch.Tensor):
        return output[0]
    if isinstance(output, Mapping):
        return {key: rows_of(each) for key, each in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(rows_of(each) for each in output)
    return output


def differs(expected: Any, got: Any, tolerance: float, *, is_json: bool = False, any_float: bool = False) -> str:
    """What is different, or ``""``.

    Args:
        tolerance: of floating-point numbers, relative to the largest finite one of their tensor.
        is_json: ``got`` has lists for tensors and tuples, and null for what is not finite.
        any_float: floating-point dtypes may differ.
    """
    if isinstance(expected, torch.Tensor):
        if is_json:
            return _json_differs(expected, got, tolerance)
        if not isinstance(got, torch.Tensor):
            return f"a {type(got).__name__} instead of a tensor"
        both_float = expected.is_floating_point() and got.is_floating_point()
        if expected.dtype != got.dtype and not (any_float and both_float):
            return f"{got.dtype} instead of {expected.dtype}"
        return _tensors_differ(expected, got, tolerance)
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping) or list(expected) != list(got):
            return f"{_shown(got)} instead of the names {list(expected)}"
        pairs = [(str(key), expected[key], got[key]) for key in expected]
    elif isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(expected) != len(got):
            return f"{_shown(got)} instead of {len(expected)} outputs"
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(expected, got, strict=True))]
    else:
        if not is_json and expected is not None and isinstance(got, torch.Tensor) and got.numel() == 1:
            got = got.item()  # bytes have no plain numbers
        return "" if type(expected) is type(got) and expected == got else f"{_shown(got)} instead of {expected!r}"
    for place, left, right in pairs:
        found = differs(left, right, tolerance, is_json=is_json, any_float=any_float)
        if found:
            return f"{place}: {found}"
    return ""


def _json_differs(expected: torch.Tensor, got: Any, tolerance: float) -> str:
    flat = [got]
    for size in expected.shape:
        if not all(isinstance(each, list) and len(each) == size for each in flat):
            return f"{_shown(got)} instead of shape {list(expected.shape)}"
        flat = [each for part in flat for each in part]
    kind = (bool,) if expected.dtype is torch.bool else (int, float) if expected.is_floating_point() else (int,)
    right = expected.reshape(-1)
    numbers = []
    for value, wanted in zip(flat, right.tolist(), strict=True):
        if value is None and isinstance(wanted, float) and not math.isfinite(wanted):
            numbers.append(wanted)
        elif isinstance(value, kind) and isinstance(value, bool) == (expected.dtype is torch.bool):
            numbers.append(value)
        else:
            return f"{_shown(value)} instead of {wanted}"
    dtype = torch.float64 if expected.is_floating_point() else expected.dtype
    return _tensors_differ(right, torch.tensor(numbers, dtype=dtype), tolerance)


def _tensors_differ(expected: torch.Tensor, got: torch.Tensor, tolerance: float) -> str:
    if expected.shape != got.shape:
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    if not expected.is_floating_point():
        return "" if torch.equal(expected, got) else f"{_shown(got.tolist())} instead of {_shown(expected.tolist())}"
    expected, got = expected.double(), got.double()
    odd = ~expected.isfinite()
    same_places = torch.equal(odd, ~got.isfinite())
    if not same_places or not torch.equal(expected[odd].nan_to_num(7.0), got[odd].nan_to_num(7.0)):
        return f"other numbers are not finite: {_shown(got.tolist())} instead of {_shown(expected.tolist())}"
    right, left = expected[~odd], got[~odd]
    if not right.numel():
        return ""
    scale = max(float(right.abs().max()), 1e-6)
    difference = float((right - left).abs().max()) / scale
    if difference <= tolerance:
        return ""
    return f"off by {difference:.2g} of the largest: {_shown(got.tolist())} instead of {_shown(expected.tolist())}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 400 else text[:400] + "..."
