"""What becomes JSON, how, and where in a result something is that cannot."""

from __future__ import annotations

import datetime
import json
import uuid
from collections import namedtuple
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyserve.request.json_encoding import dump, find_not_json

NAN, INFINITY = float("nan"), float("inf")


class Color(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


@dataclass
class Box:
    corners: Any
    label: str = "cat"


class Hostile:
    def tolist(self) -> Any:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": np.arange(3), "b": [np.float32(0.5), np.int64(7)]}, {"a": [0, 1, 2], "b": [0.5, 7]}),
        ([np.bool_(True)], [True]),
        ({"t": torch.ones(2, 1), "g": torch.ones((), requires_grad=True)}, {"t": [[1.0], [1.0]], "g": 1.0}),
        (Box(np.zeros((1, 2)), "dog"), {"corners": [[0.0, 0.0]], "label": "dog"}),
        ([datetime.date(2026, 1, 23), datetime.datetime(2026, 1, 23, 1, 2, 3)], ["2026-01-23", "2026-01-23T01:02:03"]),
        ([datetime.timedelta(seconds=90), Decimal("2"), Decimal("0.5")], [90.0, 2, 0.5]),
        ([Color.RED, Level.HIGH, uuid.UUID(int=1), PurePosixPath("a/b")],
         ["red", 3, "00000000-0000-0000-0000-000000000001", "a/b"]),
        (namedtuple("P", "x y")(1, 2), [1, 2]),
        ({1: None, "x": (1, 2)}, {"1": None, "x": [1, 2]}),
    ],
)  # fmt: skip
def test_values_of_many_types_have_a_form(value: Any, expected: Any) -> None:
    assert json.loads(dump(value)) == expected
    assert find_not_json(value) is None


def test_plain_values_are_written_exactly_as_torchserve_writes_them() -> None:
    value = {"b": [1, 2.5, None, True, "gr\u00fc\u00df"], "a": {}}
    assert dump(value, lambda: None) == dump(value) == json.dumps(value, indent=2).encode()


@pytest.mark.parametrize(
    ("value", "as_null", "as_torchserve"),
    [
        (NAN, "null", "NaN"),
        ({"a": [1.0, -INFINITY]}, '{"a": [1.0, null]}', '{"a": [1.0, -Infinity]}'),
        ([np.array([NAN, 2.0]), Box(NAN)], '[[null, 2.0], {"corners": null, "label": "cat"}]',
         '[[NaN, 2.0], {"corners": NaN, "label": "cat"}]'),
    ],
)  # fmt: skip
def test_what_json_has_no_number_for_is_null_and_told(value: Any, as_null: str, as_torchserve: str) -> None:
    told: list[int] = []
    assert json.dumps(json.loads(dump(value, lambda: told.append(1)))) == as_null
    assert told == [1]
    assert json.dumps(json.loads(dump(value))) == as_torchserve


@pytest.mark.parametrize(
    ("value", "kind", "place"),
    [
        ({"boxes": [object()]}, "<class 'object'>", ' at ["boxes"][0]'),
        ([1, {"a": {2}}], "<class 'set'>", ' at [1]["a"]'),
        ({"a": b"x"}, "<class 'bytes'>", ' at ["a"]'),
        ({"a": {(1, 2): 3}}, "a key of <class 'tuple'>", ' at ["a"]'),
        ([Box({1})], "<class 'set'>", ' at [0]["corners"]'),
        ([Hostile()], "Hostile", " at [0]"),
        (1j, "<class 'complex'>", ""),
    ],
)
def test_place_and_mend_of_what_cannot_be_json(value: Any, kind: str, place: str) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        dump(value)
    found = find_not_json(value)
    assert found is not None
    assert kind in found.type
    assert found.place == place
    assert found.fix


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [NAN, x]])
def test_a_value_that_holds_itself_is_an_error(wrap: Any) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises((ValueError, RecursionError)):
        dump(wrap(endless), lambda: None)
    assert find_not_json(endless) is not None


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    | st.dictionaries(st.integers() | st.booleans(), inner, max_size=2) | st.tuples(inner, inner),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_the_quick_way_writes_what_the_standard_library_does(value: Any) -> None:
    assert dump(value) == json.dumps(value, indent=2).encode()


@pytest.mark.parametrize("depth", [1, 99, 100, 101, 102, 150])
def test_deep_values_are_written_alike(depth: int) -> None:
    value: Any = [1.5, "x"]
    for _ in range(depth):
        value = [value, {"a": 1}]
    assert dump(value) == json.dumps(value, indent=2).encode()
