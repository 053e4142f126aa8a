"""What may be wrong with what a handler returned: its shape, an element that is no JSON, answers that differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Sums of a batch are made in another order than those of one row.
_RELATIVE_MAX = 1e-2
_ABSOLUTE_MAX = 1e-3


class ShapeProblem(NamedTuple):
    """Not a list with one element per request."""

    kind: str
    what: str
    fix: str


def explain_shape(returned: Any, count: int) -> ShapeProblem | None:
    """What is wrong with ``returned`` as the result of a batch of ``count``; None if its shape is right."""
    per_row = "return a list with one element per element of data, in order"
    if isinstance(returned, list):
        size = len(returned)
        if size == count:
            return None
        if size == 1:
            fix = ". Your handler reads data[0] only?"
        elif size > count:
            fix = ". Does it add to a list that it keeps, or return one list per row without the outer list?"
        else:
            fix = ". Does it leave out rows?"
        return ShapeProblem("length", f"returned {size} for {count}", per_row + fix)
    if returned is None:
        return ShapeProblem("none", f"returned None for {count}", f"{per_row}; does a path of it end without return?")
    kind = type(returned).__name__
    if hasattr(returned, "__next__") or hasattr(returned, "__anext__"):
        return None  # streamed
    if kind == "dict":
        return ShapeProblem("dict", f"returned dict for {count}", f"{per_row}; for one request that is [result]")
    fix = f"{per_row}; call .tolist() on tensors and arrays" if hasattr(returned, "tolist") else per_row
    return ShapeProblem("type", f"returned {kind} for {count}", fix)


# --- answers of several calls -----------------------------------------------------------------------------------------


class AnswersDiffer(NamedTuple):
    """A request of a batch got another answer than alone.

    Attributes:
        at: number of the request in the batch, from 0.
        is_order: it got that of request ``other`` instead.
        text: the difference.
    """

    at: int
    other: int
    is_order: bool
    text: str

    @classmethod
    def of(cls, answers: Sequence[bytes], alone: Sequence[bytes | None]) -> AnswersDiffer | None:
        """The first difference between the ``answers`` of a batch and those of each request ``alone``."""
        for index, (got, expected) in enumerate(zip(answers, alone, strict=True)):
            if expected is None:
                continue
            text = describe_difference(expected, got)
            if not text:
                continue
            for other, candidate in enumerate(alone):
                if candidate is not None and other != index and not describe_difference(candidate, got):
                    return cls(index, other, True, text)
            return cls(index, -1, False, text)
        return None


def describe_difference(expected: bytes, got: bytes) -> str:
    """How two bodies differ, ``""`` if they say the same; numbers may differ by rounding."""
    if expected == got:
        return ""
    try:
        return _difference(json.loads(expected), json.loads(got), "")
    except (ValueError, RecursionError):
        return f"{_short(expected)} and {_short(got)}"


def _difference(expected: Any, got: Any, place: str) -> str:
    if isinstance(expected, dict) and isinstance(got, dict):
        if expected.keys() != got.keys():
            return _both(sorted(map(str, expected)), sorted(map(str, got)), place)
        parts = [_difference(expected[key], got[key], f"{place}[{json.dumps(key)}]") for key in expected]
        return next((part for part in parts if part), "")
    if isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            return f"{len(expected)} and {len(got)} elements{' at ' * bool(place)}{place}"
        parts = [_difference(a, b, f"{place}[{index}]") for index, (a, b) in enumerate(zip(expected, got, strict=True))]
        return next((part for part in parts if part), "")
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        both_nan = expected != expected and got != got  # noqa: PLR0124 - NaN
        close = math.isclose(expected, got, rel_tol=_RELATIVE_MAX, abs_tol=_ABSOLUTE_MAX)
        return "" if both_nan or close else _both(expected, got, place)
    return "" if expected == got else _both(expected, got, place)


def _both(expected: Any, got: Any, place: str) -> str:
    texts = f"{_short(json.dumps(expected).encode())} and {_short(json.dumps(got).encode())}"
    return f"{texts}{' at ' * bool(place)}{place}"


def _short(text: bytes) -> str:
    shown = text.decode("utf-8", "replace")
    shown = "".join(char if char.isprintable() else "?" for char in shown)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
