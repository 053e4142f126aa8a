"""How answers of several calls differ, in the words of `pyserve check`."""

from __future__ import annotations

import json
from typing import Any

from pyserve.commands.answer_differences import AnswersDiffer, describe_difference


def bodies(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


def test_rounding_is_no_difference_and_everything_else_is() -> None:
    assert describe_difference(*bodies({"a": [1.0, 2]}, {"a": [1.0004, 2]})) == ""
    assert describe_difference(*bodies([float("nan")], [float("nan")])) == ""
    assert describe_difference(*bodies({"a": [1, 2]}, {"a": [1, 3]})) == '2 and 3 at ["a"][1]'
    assert describe_difference(*bodies([1], [1, 2])) == "1 and 2 elements"
    assert describe_difference(*bodies({"a": 1}, {"b": 1})) == '["a"] and ["b"]'
    assert describe_difference(b"\xff", b"\xfe") != ""


def test_mixed_up_order_is_told_from_other_differences() -> None:
    alone = bodies("a", "b", "c")
    assert AnswersDiffer.of(alone, alone) is None
    mixed = AnswersDiffer.of(bodies("b", "a", "c"), alone)
    assert mixed is not None and (mixed.at, mixed.other, mixed.is_order) == (0, 1, True)
    other = AnswersDiffer.of(bodies("a", "x", "c"), alone)
    assert other is not None and (other.at, other.is_order) == (1, False)
    assert AnswersDiffer.of(bodies("x"), [None]) is None
