"""What is said about results: shape, elements, and answers that differ."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pyserve.worker.result_check import AnswersDiffer, describe_difference, explain_shape


@pytest.mark.parametrize(
    ("returned", "count", "what", "fix"),
    [
        ([1], 2, "returned 1 for 2", "data[0] only?"),
        ([1, 2], 1, "returned 2 for 1", "adds? to a list|Does it add"),
        ([1, 2], 3, "returned 2 for 3", "leave out rows"),
        (None, 1, "returned None for 1", "end without return"),
        ({"a": 1}, 1, "returned dict for 1", r"\[result\]"),
        (torch.zeros(2), 2, "returned Tensor for 2", r"\.tolist\(\)"),
        ((1, 2), 2, "returned tuple for 2", "return a list"),
    ],
)
def test_wrong_shape_says_what_was_returned_and_the_mend(returned: Any, count: int, what: str, fix: str) -> None:
    problem = explain_shape(returned, count)
    assert problem is not None and problem.what == what
    assert __import__("re").search(fix.replace("data[0]", r"data\[0\]"), problem.fix)


def test_right_shapes_and_streams_are_no_problem() -> None:
    assert explain_shape([], 0) is None
    assert explain_shape([1, 2], 2) is None
    assert explain_shape((part for part in "ab"), 1) is None


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
