"""Divisions with a remainder: which of a program's backends may get wrong by a whole divisor."""

from __future__ import annotations

import math
from typing import Any

from pyserve.backends.lookups import schema_name

# Whole numbers up to here times small ones are exact in fp32, and ordinary inputs are not above them.
_WHOLE_MAX = 1 << 20
# What gives whole numbers that are not below zero, and what only moves numbers.
_NOT_NEGATIVE = ("argmax", "argmin", "topk", "sort", "argsort", "max", "min", "arange")
_MOVING = (
    "to", "_to_copy", "view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "slice", "select", "permute",
    "transpose", "clone", "contiguous", "repeat", "detach", "lift_fresh_copy",
)  # fmt: skip


def counts_inexactly(node: Any) -> bool:
    """Whether a node of floating-point numbers has a quotient rounded down, and what it is rounded from decides.

    torch finds the remainder first, which is exact; others divide and round down. 0.7 in fp32 goes into 3.5 five times
    and a bit; so -3.5 is in the sixth part below zero, but its quotient is rounded to -5. Quotients by powers of two
    are not rounded, and those by whole numbers never up to the next whole one.
    """
    is_floor = _name(node) == "floor_divide" or node.kwargs.get("rounding_mode") == "floor"
    return is_floor and not (_is_power_of_two(node.args[1]) or _is_whole(node.args[1]))


def steps_on_quotient(node: Any) -> bool:
    """Whether a node takes whole numbers of quotients, for which OpenVINO multiplies by a constant's reciprocal: it has
    -3.0000002 for -21 / 7, of which the whole number below is another one. By powers of two there is no difference.
    """
    name = _name(node)
    if name in ("floor_divide", "div"):
        is_floor = name == "floor_divide" or node.kwargs.get("rounding_mode") == "floor"
        return is_floor and not _is_power_of_two(node.args[1])
    if name not in ("floor", "ceil", "round", "trunc", "frac", "to", "_to_copy"):
        return False
    if name in ("to", "_to_copy") and node.meta["val"].is_floating_point():
        return False
    quotient = _source(node.args[0], ("clamp", "clip", "floor", "ceil", "round"))
    if _name(quotient) != "div" or _is_power_of_two(quotient.args[1]):
        return False
    return not hasattr(quotient.args[1], "op") or _source(quotient.args[1]).op == "placeholder"


def leaves_inexactly(node: Any) -> bool:
    """Whether a node of floating-point numbers has a remainder that is another one if it is the dividend less the
    quotient times the divisor. With whole divisors that is right for ordinary numbers, such as those of an input.
    """
    if _name(node) not in ("remainder", "fmod") or _is_power_of_two(node.args[1]):
        return False
    return not (_is_whole(node.args[1]) and _source(node.args[0]).op == "placeholder")


def _is_power_of_two(divisor: Any) -> bool:
    return isinstance(divisor, (int, float)) and abs(math.frexp(divisor)[0]) == 0.5


def _is_whole(divisor: Any) -> bool:
    return isinstance(divisor, (int, float)) and float(divisor).is_integer() and 0 < abs(divisor) < _WHOLE_MAX


def rounds_down(node: Any) -> bool:
    """Whether a node of whole numbers rounds quotients down that may be negative. Of an input itself probes show it."""
    if _name(node) != "floor_divide" and node.kwargs.get("rounding_mode") != "floor":
        return False
    if isinstance(node.args[1], int) and node.args[1] < 0:
        return True
    dividend = _source(node.args[0])
    return dividend.op != "placeholder" and _name(dividend) not in _NOT_NEGATIVE


def _source(node: Any, more: tuple[str, ...] = ()) -> Any:
    """The node whose numbers it has, where it only moves them, or does what ``more`` says."""
    while _name(node) in (*_MOVING, *more) or _name(node) == "getitem":
        node = node.args[0]
    return node


def _name(node: Any) -> str:
    return schema_name(node).removeprefix("aten::") if node.op == "call_function" else ""
