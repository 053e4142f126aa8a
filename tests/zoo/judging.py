"""How far an answer is from what is right, and what an error may say."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

# What an error's text must not have: frames, files of ours or torch's, addresses, advice to load unsafely.
UNREADABLE = re.compile(
    r"Traceback|most recent call|\bframe #\d|0x[0-9a-f]{6,}|\.(?:cpp|cc|h|py):\d+|File \"|weights_only=False|C\+\+ "
    r"stack|^Internal error"
)
# By dtype of the right answer. Rounding differs between kernels; a float64 that went through float32 is off by 1e-7.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
LOWERED_BOUND = 0.05  # of `precision: bf16`, as `precisionErrorMax` promises


def difference(right: Any, got: Any) -> float:
    """Largest difference relative to the largest finite magnitude of its tensor; inf where kinds or places differ.

    Whole numbers, bools, texts and None are equal or infinitely far. Both are nested alike: tensors, numbers, texts,
    None, dicts, lists and tuples (a list stands for a tuple).
    """
    if isinstance(right, torch.Tensor):
        return _between(right, got) if isinstance(got, torch.Tensor) else math.inf
    if isinstance(right, dict):
        if not isinstance(got, dict) or sorted(map(str, right)) != sorted(got):
            return math.inf
        return max((difference(right[key], got[str(key)]) for key in right), default=0.0)
    if isinstance(right, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(right) != len(got):
            return math.inf
        return max((difference(a, b) for a, b in zip(right, got, strict=True)), default=0.0)
    if isinstance(right, float) and isinstance(got, (int, float)):
        return abs(right - got) / max(abs(right), 1e-6)
    return 0.0 if type(right) is type(got) and right == got else math.inf


def _between(right: torch.Tensor, got: torch.Tensor) -> float:
    if right.shape != got.shape or right.dtype != got.dtype:
        return math.inf
    if not right.numel():
        return 0.0
    if not right.is_floating_point():
        return 0.0 if torch.equal(right, got) else math.inf
    a, b = right.double(), got.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    if not torch.equal(a[a.isinf()], b[b.isinf()]):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    scale = max(float(a[finite].abs().max()), 1e-6)
    return float((a[finite] - b[finite]).abs().max()) / scale


def bound(right: Any, precision: str) -> float:
    """The largest `difference` that is rounding."""
    if precision != "fp32":
        return LOWERED_BOUND
    return max((BOUNDS.get(each.dtype, 0.0) for each in tensors(right)), default=0.0)


def tensors(output: Any) -> list[torch.Tensor]:
    """Those of a nested output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [each for part in parts for each in tensors(part)]


def unreadable(text: str) -> str:
    """The part of an error's text that no client should read; "" if there is none."""
    found = UNREADABLE.search(text)
    return found.group() if found else ""
