"""What is said about the shape of results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyserve.worker.result_check import explain_shape


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
