"""How far apart two answers are: rounding is a small number, everything else is infinity."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.proof.comparison import difference, dtypes, rows

Pair = namedtuple("Pair", "left right")
Other = namedtuple("Other", "left wrong")
INF, NAN = math.inf, math.nan


@dataclass
class Scores:
    logits: torch.Tensor


def t(*numbers: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


CASES: dict[str, tuple[Any, Any, float]] = {
    "equal": (t(1.0, 2.0), t(1.0, 2.0), 0.0),
    "relative to the largest": (t(1.0, -200.0), t(2.0, -200.0), 1 / 200),
    "a small magnitude is a scale too": (t(1e-5), t(1.1e-5), 0.1),
    "nothing expected": (t(0.0), t(1e-7), 0.1),
    "a shape": (t(1.0), t(1.0, 1.0), INF),
    "a dimension": (t(1.0), torch.tensor(1.0), INF),
    "no numbers": (torch.zeros(0, 3), torch.zeros(0, 3), 0.0),
    "another float dtype": (t(1.0), t(1.0, dtype=torch.float64), 0.0),
    "a float for a whole number": (t(1), t(1.0), INF),
    "a bool for a whole number": (t(1), t(True), INF),
    "whole numbers are exact": (t(100085), t(100084), INF),
    "another whole dtype": (t(7), t(7, dtype=torch.int32), 0.0),
    "large whole numbers": (t(2**53), t(2**53 + 1), INF),
    "bools": (t(True, False), t(True, True), INF),
    "complex": (t(1 + 1j), t(1 + 2j), 1.0),
    "same NaN": (t(NAN, 1.0), t(NAN, 1.0), 0.0),
    "NaN elsewhere": (t(NAN, 1.0), t(1.0, NAN), INF),
    "NaN for a number": (t(1.0), t(NAN), INF),
    "a number for NaN": (t(NAN), t(1.0), INF),
    "infinities": (t(INF, -INF, 4.0), t(INF, -INF, 5.0), 0.25),
    "an infinity of the other sign": (t(INF), t(-INF), INF),
    "NaN for an infinity": (t(INF), t(NAN), INF),
    "nested": ({"a": (t(1.0), [t(2.0)])}, {"a": (t(1.0), [t(3.0)])}, 0.5),
    "a name": ({"a": t(1.0)}, {"b": t(1.0)}, INF),
    "a name too many": ({"a": t(1.0)}, {"a": t(1.0), "b": t(1.0)}, INF),
    "kinds of mappings": (OrderedDict(a=t(1.0)), {"a": t(1.0)}, 0.0),
    "a list for a tuple": ((t(1.0),), [t(1.0)], INF),
    "an output too few": ((t(1.0), t(1.0)), (t(1.0),), INF),
    "a named tuple and a plain one": (Pair(t(1.0), t(2.0)), (t(1.0), t(2.0)), 0.0),
    "named tuples of other names": (Pair(t(1.0), t(2.0)), Other(t(1.0), t(2.0)), INF),
    "None": ((t(1.0), None), (t(1.0), None), 0.0),
    "None for a tensor": ((t(1.0), None), (t(1.0), t(1.0)), INF),
    "texts": ("cat", "dog", INF),
    "whole numbers of Python": (3, 4, INF),
    "floats of Python": (2.0, 3.0, 0.5),
    "a bool for one": (1, True, INF),
    "a number for a tensor": (t(3.0), 3.0, INF),
    "dataclasses": (Scores(t(2.0)), Scores(t(3.0)), 0.5),
    "records": (SimpleNamespace(x=t(2.0)), SimpleNamespace(x=t(3.0)), 0.5),
    "records of other names": (SimpleNamespace(x=t(2.0)), SimpleNamespace(y=t(2.0)), INF),
    "arrays": (np.array([2.0]), np.array([3.0]), 0.5),
    "lists of floats count as a tensor": ([[1.0, -200.0]], [[2.0, -200.0]], 1 / 200),
    "lists of whole numbers": ([1, 2], [1, 3], INF),
    "null stands where NaN is": ([None, 2.0], [None, 3.0], 0.5),
    "null for a number": ([1.0, 2.0], [None, 2.0], INF),
    "ragged lists": ([[1.0], [2.0, 3.0]], [[1.0], [2.0, 3.3]], 0.1),
    "lists of a text": (["a", 1.0], ["a", 2.0], 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_difference_is_rounding_or_infinite(case: str) -> None:
    expected, got, right = CASES[case]
    assert difference(expected, got) == pytest.approx(right, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_a_sparse_and_a_quantized_tensor_compare_by_their_numbers() -> None:
    assert difference(t(0.0, 2.0).to_sparse(), t(0.0, 3.0)) == 0.5
    assert difference(torch.quantize_per_tensor(t(1.0, 2.0), 1.0, 0, torch.quint8), t(1.0, 2.0)) == 0.0


def test_rows_of_a_batch_keep_the_nesting() -> None:
    several = (torch.arange(3), None, 7, torch.tensor(5))
    output = {"a": torch.arange(6).view(3, 2), "b": several, "c": Pair(t(1, 2), "x")}
    part = rows(output, 1, 1)
    assert part["a"].tolist() == [[2, 3]]
    assert part["b"][0].tolist() == [1] and part["b"][1:3] == (None, 7) and part["b"][3].item() == 5
    assert isinstance(part["c"], Pair) and part["c"].left.tolist() == [2] and part["c"].right == "x"


def test_dtypes_stand_in_order() -> None:
    assert dtypes({"a": t(1.0), "b": (t(1), None, [t(True)])}) == [torch.float32, torch.int64, torch.bool]
