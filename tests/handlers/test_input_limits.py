"""What ``input`` declares of sizes and values is checked in every item, and an error names what came and what may."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.handler import InputError, ModelLoadError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.densenet_handler import DenseNetHandler
from pyserve.handlers.json_numbers import KINDS, UnfitNumberError, tensor_of_numbers
from pyserve.handlers.tensor import TensorHandler
from pyserve.handlers.tensor_spec import TensorSpec, input_specs
from tests.support.contexts import context_for

IDS = {"name": "ids", "dtype": "int64", "shape": ["2..4"], "vocabulary": 10}


def spec(**entry: Any) -> TensorSpec:
    return TensorSpec.from_config({"input": entry})


def handler_of(*inputs: dict[str, Any]) -> TensorHandler:
    handler = TensorHandler()
    handler.prepare(context_for("/nowhere", input=list(inputs)))
    return handler


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "sizes", "told"),
    [
        ([3, -1], ((3, 3), (1, None)), "[3, any]"),
        (["2..64"], ((2, 64),), "[2..64]"),
        (["..64"], ((1, 64),), "[1..64]"),
        (["2.."], ((2, None),), "[2..]"),
        (["5..5", 1], ((5, 5), (1, 1)), "[5, 1]"),
    ],
)
def test_a_dimension_is_a_size_or_a_range(shape: list[Any], sizes: Any, told: str) -> None:
    item = spec(shape=shape)
    assert item.sizes == sizes
    assert item.shape == tuple(low if low == high else -1 for low, high in sizes)
    assert str(item) == f"float32 {told}"
    example = item.example()
    assert all(low <= size <= (high or size) for size, (low, high) in zip(example.shape[1:], sizes, strict=True))


@pytest.mark.parametrize(
    "shape", [["4..2"], ["0..2"], [".."], ["-1..3"], ["2...3"], ["2..x"], [0], [-2], [1.5], [True], ["3"]]
)
def test_a_dimension_that_is_neither_is_refused_when_the_model_is_loaded(shape: list[Any]) -> None:
    with pytest.raises(ModelLoadError, match=r"model-config\.yaml: input\.shape is .*a range such as 2\.\.64"):
        spec(shape=shape)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sizes_within_the_range_pass(size: int) -> None:
    item = spec(**IDS)
    assert item.from_nested([1] * size).shape == (1, size)
    assert item.from_bytes(bytearray(8 * size)).shape == (1, size)


@pytest.mark.parametrize("size", [1, 5, 5000])
def test_sizes_beyond_the_range_are_named(size: int) -> None:
    item = spec(**IDS)
    with pytest.raises(InputError) as nested:
        item.from_nested([1] * size)
    assert nested.value.message == (
        f"input 'ids': expected int64 [2..4] of 0 to 9, got a list of {size} instead of 2..4 at the top level"
    )
    with pytest.raises(InputError) as raw:
        item.from_bytes(bytearray(8 * size))
    assert raw.value.message == (
        f"input 'ids': expected int64 [2..4] of 0 to 9, got [{size}]: {size} instead of 2..4 in dimension 1"
    )


def test_rows_of_another_rank_are_named() -> None:
    with pytest.raises(InputError, match=r"got 2 dimensions instead of 1: \[2, 1\]"):
        spec(**IDS).check(torch.zeros(3, 2, 1, dtype=torch.int64))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_whole_numbers_outside_a_vocabulary_are_named(dtype: str) -> None:
    item = spec(dtype=dtype, shape=[2, 2], vocabulary=100)
    allowed = np.array([[0, 99], [1, 2]], dtype)
    assert item.from_nested(allowed.tolist()).tolist() == [allowed.tolist()]
    assert item.from_bytes(bytearray(allowed.tobytes())).tolist() == [allowed.tolist()]
    refused = np.array([[0, 99], [100, 2]], dtype)
    for read in (lambda: item.from_nested(refused.tolist()), lambda: item.from_bytes(bytearray(refused.tobytes()))):
        with pytest.raises(InputError, match=rf"expected {dtype} \[2, 2\] of 0 to 99, got 100 at position \[1, 0\]"):
            read()


def test_negative_numbers_are_outside_a_vocabulary() -> None:
    with pytest.raises(InputError, match=r"got -1 at position \[1\]"):
        spec(**IDS).from_nested([0, -1])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_bounds_of_floats_are_compared_as_the_dtype_holds_them(dtype: str) -> None:
    item = spec(dtype=dtype, shape=[2], values=[-0.3, 0.1])  # none of these holds 0.1
    assert torch.equal(item.from_nested([-0.3, 0.1]), torch.tensor([[-0.3, 0.1]], dtype=getattr(torch, dtype)))
    for value in (0.11, -0.31, math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match=r"of -0\.3 to 0\.1, got .* at position \[1\]"):
            item.from_nested([0, value])


def test_the_row_of_a_refused_value_is_named() -> None:
    with pytest.raises(InputError, match=r"got 10 at position \[2, 1\]"):
        spec(**IDS).check(torch.tensor([[1, 2], [3, 4], [5, 10]]))


@pytest.mark.parametrize("dtype", ["int64", "uint16", "float32", "bfloat16"])
def test_no_row_has_no_value_to_refuse(dtype: str) -> None:
    spec(dtype=dtype, shape=[2], values=[0, 1]).check(torch.zeros(0, 2, dtype=getattr(torch, dtype)))


def test_examples_are_allowed() -> None:
    for dtype in KINDS:
        entry: dict[str, Any] = {"dtype": dtype, "shape": ["2..3", "20..", "..4"]}
        for values in ([3, 7], [0, 1]) if dtype != "bool" else ():
            item = spec(**entry, values=values)
            example = item.example()
            item.check(example)
            assert example.shape == (1, 3, 20, 4)


def test_what_has_to_be_looked_at_does_not_go_to_the_network_as_it_comes() -> None:
    def size(**entry: Any) -> int:
        handler = TensorHandler()
        handler.prepare(context_for("/nowhere", input=entry))
        return handler.raw_item_size

    assert size(shape=[4]) == 16
    assert size(dtype="int64", shape=[4], vocabulary=10) == 0
    assert size(dtype="bool", shape=[4]) == 0
    assert size(shape=["1..4"]) == 0


def test_a_byte_that_is_no_bool_is_refused() -> None:
    item = spec(dtype="bool", shape=[3])
    assert item.from_bytes(b"\0\1\1").tolist() == [[False, True, True]]
    with pytest.raises(InputError, match="the byte 2 at 1, which is not 0 or 1"):
        item.from_bytes(b"\0\2\1")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "int64", "vocabulary": 0}, "vocabulary must be a whole number above 0"),
        ({"dtype": "float32", "vocabulary": 9}, "vocabulary needs whole numbers"),
        ({"dtype": "int8", "vocabulary": 1000}, "vocabulary must be the smallest and the largest number that int8"),
        ({"dtype": "int64", "vocabulary": 9, "values": [0, 1]}, "both vocabulary and values"),
        ({"values": [1, 0]}, "values must be"), ({"values": 3}, "values must be"), ({"values": [1]}, "values must be"),
        ({"values": [0, math.inf]}, "values must be"), ({"dtype": "uint8", "values": [0, 300]}, "values must be"),
        ({"dtype": "int64", "values": [0, 1.5]}, "values must be"), ({"dtype": "bool", "values": [0, 1]}, "values"),
        ({"same": 3}, "same must be a name"), ({"same": ["a", "b"]}, "same names 2 dimensions"),
        ({"pad_to": [4], "pad_value": 5, "values": [0, 1]}, "pad_value is .*takes 0 to 1"),
        ({"dtype": "int64", "pad_to": [4], "pad_value": 0.5}, "pad_value is .*int64 cannot hold"),
        ({"shape": ["2..9"], "pad_to": [4, 8]}, r"pad_to ends at 8, but its shape allows 2\.\.9"),
        ({"shape": ["9.."], "pad_to": [4, 8]}, "pad_to ends at 8"),
        ({"length": 3}, "unknown key"),
    ],
)  # fmt: skip
def test_a_description_that_contradicts_itself_is_refused(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelLoadError, match=says):
        spec(**{"shape": [-1]} | entry)


def test_the_base_handler_takes_what_is_declared() -> None:
    handler = BaseHandler()
    handler.prepare(context_for("/nowhere", input={"dtype": "float32", "shape": ["2..3"], "values": [0, 9]}))
    made = handler.preprocess([{"body": [1, 2]}, {"body": [3, 4.5]}])
    assert made.dtype is torch.float32 and made.tolist() == [[1, 2], [3, 4.5]]
    for value, says in (([1], "list of 1 instead of 2..3"), ([1, 10], "got 10.0 at position [1]"), (["1", 2], "text")):
        with pytest.raises(InputError) as caught:
            handler.preprocess([{"body": value}])
        assert says in caught.value.message
    with pytest.raises(InputError, match="not a regular array"):
        handler.preprocess([{"body": [1, 2]}, {"body": [1, 2, 3]}])


def test_saved_tensors_are_what_is_declared() -> None:
    def saved(tensor: torch.Tensor) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.save(tensor, file)
        return {"body": file.getvalue()}

    handler = DenseNetHandler()
    handler.prepare(context_for("/nowhere", input={"dtype": "int64", "shape": ["2..3"], "vocabulary": 5}))
    rows = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(handler.preprocess([saved(rows)])[0], rows)
    for tensor, says in (
        (rows.float(), "in a tensor [items, ...], got a tensor of float32 [2, 2]"), (rows[:, :1], "1 instead of 2..3"),
        (rows[0], "0 dimensions instead of 1"), (rows + 1, "got 5 at position [1, 1]"), (torch.tensor(1), "int64 []"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            handler.preprocess([saved(tensor)])
        assert says in caught.value.message


# --- inputs that share a dimension ------------------------------------------------------------------------------------


def pair(ids: dict[str, Any], mask: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"name": "ids", "dtype": "int64", "shape": [-1]} | ids, {"name": "mask", "dtype": "int64", "shape": [-1]} | mask
    )  # fmt: skip


PADDED = {"pad_to": [4, 8]}


@pytest.mark.parametrize("extra", [{}, PADDED], ids=["as they come", "padded"])
def test_inputs_that_share_a_dimension_come_with_one_size(extra: dict[str, Any]) -> None:
    handler = handler_of(*pair({"same": "length", **extra}, {"same": "length", **extra}))
    ids, mask = handler.preprocess([{"body": {"ids": [1, 2, 3], "mask": [1, 1, 0]}}])
    filling = [0] if extra else []
    assert ids.tolist() == [[1, 2, 3, *filling]] and mask.tolist() == [[1, 1, 0, *filling]]
    with pytest.raises(InputError) as caught:
        handler.preprocess([{"body": {"ids": [1, 2, 3], "mask": [1, 1]}}])
    assert caught.value.message == (
        "the inputs share the dimension 'length', but 'ids' has 3, 'mask' has 2; send the same number of entries for "
        "each"
    )


def test_padded_inputs_share_their_size_unless_they_say_otherwise() -> None:
    handler = handler_of(*pair(PADDED, PADDED))
    with pytest.raises(InputError, match=r"padded and share their size, but 'ids' has 3, 'mask' has 2.*'same'"):
        handler.preprocess([{"body": {"ids": [1, 2, 3], "mask": [1, 1]}}])
    handler = handler_of(*pair({"same": "a", **PADDED}, {"same": "b", "pad_to": [2]}))
    ids, mask = handler.preprocess([{"body": {"ids": [1, 2, 3], "mask": [1, 1]}}])
    assert ids.tolist() == [[1, 2, 3, 0]] and mask.tolist() == [[1, 1]]


def test_each_of_several_dimensions_may_be_shared() -> None:
    picture = {"name": "picture", "shape": [3, -1, -1], "same": ["height", "width"]}
    mask = {"name": "mask", "shape": [-1, -1], "same": ["height", "width"]}
    handler = handler_of(picture, mask)
    right = {"picture": torch.zeros(3, 2, 4).tolist(), "mask": torch.zeros(2, 4).tolist()}
    assert [tuple(each.shape) for each in handler.preprocess([{"body": right}])] == [(1, 3, 2, 4), (1, 2, 4)]
    with pytest.raises(InputError, match="the dimension 'width', but 'picture' has 4, 'mask' has 2"):
        handler.preprocess([{"body": right | {"mask": torch.zeros(2, 2).tolist()}}])


def test_dimensions_of_one_input_may_have_one_size() -> None:
    square = spec(shape=[-1, -1, -1], same=["n", "channels", "n"])
    assert square.from_nested(torch.zeros(2, 3, 2).tolist()).shape == (1, 2, 3, 2)
    oblong = torch.zeros(1, 2, 2, 3)
    for check in (lambda: square.from_nested(oblong[0].tolist()), lambda: square.check(oblong)):
        with pytest.raises(InputError, match=r"got \[2, 2, 3\]: its dimensions named 'n' must have one size"):
            check()
    assert square.example().shape == (1, 16, 16, 16)


def test_who_shares_a_dimension_has_the_sizes_that_all_allow() -> None:
    ids, mask = input_specs({"input": list(pair({"shape": ["2..64"], "same": "n"}, {"shape": ["..9"], "same": "n"}))})
    assert ids.sizes == mask.sizes == ((2, 9),)
    assert ids.example().shape == mask.example().shape == (1, 9)


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        (PADDED, {}, '"mask" has a free dimension, and "ids" is padded'),
        (PADDED, {"pad_to": [8]}, "share a dimension .*padding.*one pad_to"),
        ({"same": "n", **PADDED}, PADDED, "some have 'same'"),
        ({"same": "n", **PADDED}, {"same": "n"}, "one pad_to"),
        ({"same": "n", "shape": ["2..3"]}, {"same": "n", "shape": ["4..5"]}, "no size that all of them allow"),
    ],
)
def test_sharing_that_cannot_be_is_refused_when_the_model_is_loaded(ids: Any, mask: Any, says: str) -> None:
    with pytest.raises(ModelLoadError, match=says):
        handler_of(*pair(ids, mask))


# --- numbers in JSON --------------------------------------------------------------------------------------------------


def test_numbers_become_what_numpy_makes_of_them() -> None:
    values = [0.1, 65519.99, 1e-8, 2049, 2051, -0.0, 6.0e-8, True, 1000.49999999, 0.333251953125001]
    for dtype, kind in ((torch.float16, np.float16), (torch.float32, np.float32), (torch.float64, np.float64)):
        expected = np.array(values, np.float64).astype(kind)
        assert tensor_of_numbers(values, dtype).numpy().tobytes() == expected.tobytes()
    assert torch.equal(tensor_of_numbers(values, torch.bfloat16), torch.tensor(values, dtype=torch.bfloat16))
    assert tensor_of_numbers([2**63 - 1, -(2**63), False], torch.int64).tolist() == [2**63 - 1, -(2**63), 0]
    assert tensor_of_numbers([2**64 - 1], torch.uint64).tolist() == [2**64 - 1]


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (65520, torch.float16, "the number 65520, beyond -65504 to 65504"),
        (10**39, torch.float32, "a huge number, beyond -3.40282e+38 to 3.40282e+38"),
        (-1e39, torch.float32, "the number -1e+39, beyond -3.40282e+38 to 3.40282e+38"),
        (3.4e38, torch.bfloat16, "the number 3.4e+38, beyond -3.38953e+38 to 3.38953e+38"),
        (10**400, torch.float64, "a huge number"),
        (1.0, torch.int64, "the number 1.0"), (math.nan, torch.int32, "the number nan"),
        (2**31, torch.int32, "the number 2147483648"), (256, torch.uint8, "the number 256"),
        (2, torch.bool, "numbers other than 0 and 1: the number 2"), (1.0, torch.bool, "the number 1.0"),
        ("1", torch.float32, "text of 1 characters starting with '1'"), (None, torch.int64, "null"),
    ],
)  # fmt: skip
def test_a_number_that_its_kind_cannot_hold_is_named(value: Any, dtype: torch.dtype, text: str) -> None:
    with pytest.raises(UnfitNumberError) as caught:
        tensor_of_numbers([1, 0, value], dtype)
    assert (caught.value.position, caught.value.text) == (2, text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_infinity_stay_what_they_are(dtype: torch.dtype) -> None:
    tensor = tensor_of_numbers([math.nan, math.inf, -math.inf, 1], dtype)
    assert str(tensor.tolist()) == "[nan, inf, -inf, 1.0]"


# --- nothing is dropped -----------------------------------------------------------------------------------------------


def test_an_input_that_the_model_does_not_have_is_refused() -> None:
    value = {"ids": [1, 2], "mask": [1, 1], "target": 0}
    assert len(handler_of(*pair({}, {})).preprocess([{"body": value}])) == 2
    with pytest.raises(InputError, match="the model has no input 'more'; its inputs are 'ids', 'mask'"):
        handler_of(*pair({}, {})).preprocess([{"body": value | {"more": [1]}}])


def test_an_input_that_is_missing_is_named() -> None:
    handler = handler_of(*pair({}, {}))
    for row in ({"body": {"ids": [1]}}, {"ids": [1]}, {"body": {}}):
        with pytest.raises(InputError, match=r"input '(ids|mask)': expected int64 \[any\]; the request has .* without"):
            handler.preprocess([row])


def test_an_input_may_have_the_name_of_a_field() -> None:
    handler = handler_of({"name": "body", "shape": [1]}, {"name": "data", "shape": [1]})
    for row in ({"body": {"body": [1], "data": [2]}}, {"body": [1], "data": [2]}):
        assert [each.tolist() for each in handler.preprocess([row])] == [[[1.0]], [[2.0]]]
