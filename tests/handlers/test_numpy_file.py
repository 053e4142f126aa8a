"""Files of numpy.save: the numbers that numpy reads from them, or a refusal that says what is wrong."""

from __future__ import annotations

import base64
import io
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyserve.handler import InputError
from pyserve.handlers.numpy_file import HEADER_SIZE_MAX, is_numpy_file, read_numpy_file
from pyserve.handlers.rows import bytes_of_base64, unwrapped
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.input_config import DTYPES
from pyserve.lanes.raw_rows import RawRows
from pyserve.request.messages import Request
from tests.handlers.test_row_check import tensor_handler

NUMPY_DTYPES = [name for name in DTYPES if name != "bfloat16"]


def saved(array: Any, version: tuple[int, int] | None = None) -> bytearray:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version=version)
    return bytearray(file.getvalue())


def spec(dtype: str, *shape: int | str, **rest: Any) -> TensorSpec:
    return TensorSpec.from_config({"input": {"dtype": dtype, "shape": list(shape), **rest}})


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    values = np.arange(int(np.prod(shape))).reshape(shape)
    return (values % 2).astype(dtype) if dtype == "bool" else (values + 1).astype(dtype)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_each_dtype_version_order_and_byte_order_has_numpys_numbers(dtype: str, version: tuple[int, int]) -> None:
    array = numbers(dtype, (2, 3, 4))
    for order in ("C", "F"):
        for byte_order in ("<", ">"):
            file = saved(np.array(array, np.dtype(dtype).newbyteorder(byte_order), order=order), version)
            tensor = read_numpy_file(file, spec(dtype, 2, 3, 4))
            assert tensor.dtype is getattr(torch, dtype) and tensor.shape == (1, 2, 3, 4) and tensor.is_contiguous()
            assert np.array_equal(tensor[0].numpy(), np.load(io.BytesIO(bytes(file))))


@pytest.mark.parametrize("body", [bytes, bytearray, memoryview])
def test_any_buffer_will_do_and_is_left_as_it_is(body: Any) -> None:
    file = bytes(saved(np.float32([1, 2, 3])))
    tensor = read_numpy_file(body(file), spec("float32", 3))
    assert tensor.tolist() == [[1, 2, 3]]
    if body is not bytearray:
        tensor.zero_()
        assert file == bytes(saved(np.float32([1, 2, 3])))


def test_a_bytearray_that_lies_right_is_not_copied() -> None:
    file = saved(np.float32([1, 2, 3]))
    tensor = read_numpy_file(file, spec("float32", 3))
    file[-4:] = struct.pack("<f", 9)
    assert tensor.tolist() == [[1, 2, 9]]


def test_free_dimensions_and_single_numbers() -> None:
    assert read_numpy_file(saved(np.int64([[1, 2], [3, 4]])), spec("int64", -1, -1)).tolist() == [[[1, 2], [3, 4]]]
    assert read_numpy_file(saved(np.float64(2.5)), spec("float64")).tolist() == [2.5]


def with_header(text: bytes, data: bytes = b"", version: int = 1) -> bytearray:
    return bytearray(
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data
    )


NO_NUMBERS = "header is damaged, or describes no plain numbers"
HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
# More than numpy takes.
ONES = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 100 + b"), }\n"


@pytest.mark.parametrize(
    ("file", "wanted", "text"),
    [
        (saved(np.float64([1, 2])), spec("float32", 2), r"of float64 \[2\]; save it with array.astype\('float32'\)"),
        (saved(np.float32([[1, 2, 3, 4]])), spec("float32", 4), r"of float32 \[1, 4\]; send one item a request"),
        (saved(np.float32([1, 2, 3])), spec("float32", 4), "got .3.: 3 instead of 4"),
        (saved(np.float32([[[1]]])), spec("float32", 4), ": 3 dimensions instead of 1"),
        (with_header(ONES, b"1234"), spec("float32", 1), ": 100 dimensions instead of 1"),
        (saved(np.float32([])), spec("float32", -1), "which holds nothing"),
        (saved(np.float32([1, 5])), spec("float32", 2, values=[0, 2]), r"got 5.0 at position \[1\]"),
        (saved(np.float32([1, 2])), spec("bfloat16", 2), "which numpy does not have"),
        (saved(np.array([1], dtype=[("a", "<f4")])), spec("float32", 1), NO_NUMBERS),
        (with_header(HUGE.replace(b"<f4", b"<q9")), spec("float32", 1), "no kind of number"),
        (with_header(HUGE.replace(b"'<f4'", b"False")), spec("float32", 1), "no kind of number"),
        (saved(np.str_("ab")), spec("float32", 1), "save it with array.astype"),
        (saved(np.float32([1, 2]))[:-1], spec("float32", 2), "with 7 bytes behind its header instead of 8"),
        (saved(np.float32([1, 2])) + b"x", spec("float32", 2), "with 9 bytes behind its header instead of 8"),
        (saved(np.array([True, False]))[:-1] + b"\x02", spec("bool", 2), "neither 0 nor 1"),
        (with_header(HUGE), spec("float32", -1), "with 0 bytes behind its header instead of 4000000000000"),
        (with_header(HUGE.replace(b"1000", b"-100")), spec("float32", -1), NO_NUMBERS),
        (with_header(b"{'descr': '<f4'}\n"), spec("float32", 1), NO_NUMBERS),
        (with_header(b"__import__('os').system('true')"), spec("float32", 1), NO_NUMBERS),
        (with_header(b"[" * 4000), spec("float32", 1), NO_NUMBERS),
        (with_header(b"\xff\xfe\x00"), spec("float32", 1), NO_NUMBERS),
        (with_header(b" " * (HEADER_SIZE_MAX + 1)), spec("float32", 1), f"at most {HEADER_SIZE_MAX} are read"),
        (bytearray(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), spec("float32", 1), f"at most {HEADER_SIZE_MAX} are read"),
        (with_header(b"", version=4), spec("float32", 1), "of version 4; numpy writes 1, 2 and 3"),
        (bytearray(b"\x93NUMPY\x01"), spec("float32", 1), "ends within its header"),
        (bytearray(b"\x93NUMPY\x01\x00\x76\x00{"), spec("float32", 1), "ends within its header"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(file: bytearray, wanted: TensorSpec, text: str) -> None:
    with pytest.raises(InputError, match=text):
        read_numpy_file(file, wanted)


def test_objects_are_never_read() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="Python objects, which is not read"):
        read_numpy_file(file.getvalue(), spec("float32", 1))


@settings(deadline=None, suppress_health_check=list(HealthCheck))  # another's load is no failure of this
@given(st.binary(max_size=300), st.integers(0, 150), st.binary(max_size=8))
def test_whatever_comes_is_read_or_refused(tail: bytes, at: int, change: bytes) -> None:
    good = saved(np.float32([1, 2]))
    for file in (b"\x93NUMPY" + tail, bytes(good[:at]) + change + bytes(good[at + len(change) :])):
        if not is_numpy_file(file):
            continue
        try:
            assert read_numpy_file(file, spec("float32", 2)).shape == (1, 2)
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 400


TWO = [{"name": "x", "dtype": "float32", "shape": [2]}, {"name": "y", "dtype": "int64", "shape": []}]


def in_base64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode()


@pytest.mark.parametrize(
    "body",
    [
        saved(np.float32([1, 2])), struct.pack("<2f", 1, 2), {"data": [1, 2]}, [1, 2],
        {"b64": in_base64(struct.pack("<2f", 1, 2))},
        {"data": in_base64(struct.pack("<2f", 1, 2))}, {"data": in_base64(saved(np.float32([1, 2])))},
        {"data": "data:application/octet-stream;base64," + in_base64(struct.pack("<2f", 1, 2))},
    ],
)  # fmt: skip
def test_a_tensor_model_takes_its_numbers_in_each_form(body: Any) -> None:
    handler = tensor_handler({"dtype": "float32", "shape": [2]})
    for row in ({"body": body}, {"data": body}):
        assert handler.preprocess([row]).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"data": "no base64!"}, "'no base64!', which is not base64"),
        ({"data": in_base64(b"123")}, "expected 8 bytes of little-endian float32 .2., got 3 bytes"),
        ({"data": [1, 2], "more": 1}, "a JSON object with 2 members"),
        ({"data": None}, "a JSON object with 1 member"),
        ("AACAPwAAAEA=", "got text of 12 characters"),
    ],
)
def test_what_is_no_input_is_refused(body: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        tensor_handler({"dtype": "float32", "shape": [2]}).preprocess([{"body": body}])


def test_each_of_several_inputs_may_be_a_file_or_base64() -> None:
    handler = tensor_handler(TWO)
    for x in (
        [1, 2],
        saved(np.float32([1, 2])),
        in_base64(saved(np.float32([1, 2]))),
        in_base64(struct.pack("<2f", 1, 2)),
    ):
        for row in ({"x": x, "y": 3}, {"body": {"x": x, "y": 3}}):
            assert [each.tolist() for each in handler.preprocess([row])] == [[[1, 2]], [3]]


def test_a_file_as_long_as_an_item_is_not_taken_for_its_bytes() -> None:
    file = saved(np.float32([1, 2]))
    handler = tensor_handler({"dtype": "float32", "shape": [len(file) // 4]})
    rows = RawRows.of(handler, [torch.zeros(1, len(file) // 4)])
    assert rows is not None

    def takes(body: bytes, *headers: tuple[str, str]) -> bool:
        return rows.takes(Request("POST", "/", headers=list(headers), body=bytearray(body)))

    octets = ("content-type", "application/octet-stream")
    assert not takes(file, octets) and takes(b"\x93" + bytes(len(file) - 1), octets) and takes(bytes(len(file)), octets)
    assert takes(b"x" * len(file), octets) and not takes(b"x" * len(file)), "text is looked at, unless it says bytes"
    with pytest.raises(InputError, match=r"got \[2\]: 2 instead of 34"):
        handler.preprocess([{"body": file}])


def test_only_one_member_is_unwrapped() -> None:
    assert unwrapped({"data": 1}) == 1 and unwrapped({"x": 1}, "x") == 1
    for value in ({"x": 1}, {"data": 1, "x": 2}, {}, [1], "data", None):
        assert unwrapped(value) is value
    assert bytes_of_base64("aGk=") == b"hi" and bytes_of_base64("aGk=\n") == b"hi" and bytes_of_base64("?") is None
    assert bytes_of_base64("data:x;base64,") == b""
