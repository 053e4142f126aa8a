"""Whether a request is answered alike whenever it is asked: alone, again, in a batch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Sums of a batch are made in another order than those of one row.
_RELATIVE_MAX = 1e-2
_ABSOLUTE_MAX = 1e-3


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
