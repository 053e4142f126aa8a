"""Fields that a built-in handler would not read, and bytes that it would take for something else, are refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyserve.context import Context
from pyserve.handler import InputError
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.row_check import check_row, is_built_in
from pyserve.handlers.tensor import TensorHandler
from pyserve.handlers.text_classifier import TextClassifier

JSON = "application/json"
PAIR = [{"name": "ids", "dtype": "int64", "shape": [2]}, {"name": "mask", "dtype": "int64", "shape": [2]}]


def tensor_handler(config: Any) -> TensorHandler:
    handler = TensorHandler()
    handler.prepare(Context("m", "/", {}, model_yaml_config={"input": config}))
    return handler


ONE = {"dtype": "float32", "shape": [2]}
TENSOR, TEXT, PICTURE = tensor_handler(ONE), TextClassifier(), ImageClassifier()


class Own(ImageClassifier):
    """Of an archive."""


def test_only_pyserves_own_handlers_are_checked() -> None:
    assert is_built_in(TENSOR) and is_built_in(PICTURE) and is_built_in(TEXT)
    assert not is_built_in(Own()) and not is_built_in(None)


@pytest.mark.parametrize("handler", [TENSOR, TEXT, PICTURE])
@pytest.mark.parametrize("row", [{"data": "x"}, {"body": "x"}, {"body": "x", "target": b"1", "model_name": b"m"},
                                 {"data": None, "body": "x"}, {"body": "x", "begins": b"1"}])  # fmt: skip
def test_what_is_read_passes(handler: Any, row: dict[str, Any]) -> None:
    if row.get("data", "") is None:
        row = {"body": row["body"]}
    check_row(handler, row, {}, start_key="begins")


@pytest.mark.parametrize(("handler", "row", "field"), [
    (PICTURE, {"data": b"x", "mask": b"y"}, "mask"),
    (TEXT, {"data": "x", "body": "y"}, "body"),
    (TENSOR, {"body": [1, 2], "scale": b"3"}, "scale"),
    (tensor_handler(PAIR), {"ids": [1, 2], "mask": [1, 1], "data": b""}, "data"),
])  # fmt: skip
def test_a_field_that_nothing_reads_is_named(handler: Any, row: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"a field '{field}' that nothing reads"):
        check_row(handler, row, {})


def test_a_request_without_input_is_left_to_the_handler() -> None:
    check_row(TEXT, {"text": "x"}, {})
    check_row(PICTURE, {}, {})


@pytest.mark.parametrize(("handler", "value", "content_type", "text"), [
    (TENSOR, bytearray(b"[1.0,2.0"), JSON, "could not be read as that"),
    (TENSOR, bytearray(b"[1., 2.]"), "application/json; charset=utf-8", "could not be read as that"),
    (TENSOR, bytearray(b"\xff" * 8), "text/plain", "could not be read as that"),
    (TENSOR, bytearray(b"[1.0,20]"), "", "is JSON, but numbers as they lie in memory"),
    (TEXT, bytearray(b'{"text": '), JSON, "it is not JSON"),
    (TEXT, "\u00c3\u00bc", "text/plain; charset=ISO-8859-1", "text in 'iso-8859-1'"),
])  # fmt: skip
def test_a_value_that_is_not_what_it_was_sent_as_is_refused(
    handler: Any, value: Any, content_type: str, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        check_row(handler, {"data": value}, {"data": content_type} if content_type else {})


@pytest.mark.parametrize(("handler", "value", "content_type"), [
    (TENSOR, bytearray(b"[1.0,20]"), "application/octet-stream"),
    (TENSOR, bytearray(b"[" + struct.pack("<f", 1.5) + b"\0\0]"), ""),
    (tensor_handler({"dtype": "uint8", "shape": [3]}), bytearray(b"[1]"), ""),
    (TEXT, "plain", "text/plain; charset=ISO-8859-1"),
    (TEXT, "gr\u00fcn", 'text/plain; charset="UTF-8"'),
    (TEXT, bytearray(b"gr\xc3\xbcn"), ""),
    (PICTURE, bytearray(b"\xff\xd8"), JSON),
    (TENSOR, [1.0, 2.0], JSON),
])  # fmt: skip
def test_a_value_that_can_be_one_thing_only_passes(handler: Any, value: Any, content_type: str) -> None:
    check_row(handler, {"data": value}, {"data": content_type} if content_type else {})


def test_text_that_nobody_was_to_decode_passes() -> None:
    check_row(TEXT, {"body": bytearray(b"some text")}, {"body": JSON}, decodes=False)
    with pytest.raises(InputError):  # numbers it is not, whoever decodes
        check_row(TENSOR, {"body": bytearray(b"[1.0,20]")}, {"body": JSON}, decodes=False)
