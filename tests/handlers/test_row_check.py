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
    (TENSOR, bytearray(b"[1.0,2.0"), JSON, "but is not: Expecting ',' delimiter, line 1 column 9"),
    (TENSOR, bytearray(b"[1., 2.]"), "application/json; charset=utf-8", "but is not: Expecting ',' delimiter, line 1"),
    (TENSOR, bytearray(b"[1,\n\xff]"), JSON, "but is not: it is not UTF-8, at byte 4"),
    (PICTURE, bytearray(b'{"data": '), JSON, "but is not: Expecting value, line 1 column 10"),
    (TENSOR, bytearray(b"\xff" * 8), "text/plain", "could not be read as that"),
    (TENSOR, bytearray(b"1.0,2.0\n"), "", "is text, 8 bytes starting with '1.0,2.0\\\\n', but numbers as they lie"),
    (TEXT, bytearray(b'{"text": '), JSON, "but is not: Expecting value, line 1 column 10"),
    (TEXT, "\u00c3\u00bc", "text/plain; charset=ISO-8859-1", "text in 'iso-8859-1'"),
])  # fmt: skip
def test_a_value_that_is_not_what_it_was_sent_as_is_refused(
    handler: Any, value: Any, content_type: str, text: str
) -> None:
    with pytest.raises(InputError, match=text):
        check_row(handler, {"data": value}, {"data": content_type} if content_type else {})


def test_a_body_says_so_when_it_is_not_the_json_it_was_sent_as() -> None:
    with pytest.raises(InputError, match="the body says application/json but is not: Expecting value, line 1 column 6"):
        check_row(TENSOR, {"body": bytearray(b"[1,2,")}, {"body": JSON})
    with pytest.raises(InputError, match="body came without a content type and is JSON, but numbers as they lie"):
        check_row(TENSOR, {"body": bytearray(b"[1.0,20]")}, {})


@pytest.mark.parametrize(("value", "text"), [
    ("\ufeff[1,2]".encode(), "is JSON, but"), ("[12]".encode("utf-16-le"), "is JSON, but"),
    ("[1]".encode("utf-16"), "is JSON, but"), ('{"\u00e4":1}'.encode(), "is JSON, but"),
    ("1,2".encode("utf-16"), "is text, 8 bytes, text in UTF-16, but"),
    (b"\x89PNG\r\n\x1a\n", "8 bytes, a PNG picture, but"),
])  # fmt: skip
def test_a_body_that_shows_what_it_is_is_not_taken_for_numbers(value: bytes, text: str) -> None:
    for value_of_it in (bytearray(value), memoryview(value)):
        with pytest.raises(InputError, match=f"body came without a content type and (is )?{text}"):
            check_row(TENSOR, {"body": value_of_it}, {})
    check_row(TENSOR, {"body": bytearray(value)}, {"body": "application/octet-stream"})
    check_row(TENSOR, {"body": bytearray(value)}, {"body": "application/octet-stream; v=1"})
    check_row(tensor_handler({"dtype": "uint8", "shape": [-1]}), {"body": bytearray(value)}, {})


def test_a_file_is_not_taken_for_numbers_whatever_it_was_sent_as() -> None:
    for media, value in (("image/png", b"\x89PNG\r\n\x1a\n"), ("audio/wav", b"RIFF\0\0\0\0WAVEfmt ")):
        with pytest.raises(InputError, match=f"body was sent as {media} and is {len(value)} bytes, a "):
            check_row(TENSOR, {"body": bytearray(value)}, {"body": media})
    check_row(TENSOR, {"body": bytearray(struct.pack("<2f", 1, 2))}, {"body": "audio/pcm"})


@pytest.mark.parametrize(("config", "value", "expected"), [
    (ONE, b"[1.0,20]", [1.0, 20]),  # as long as an item's bytes
    (ONE, b" [1, 2]\r\n", [1, 2]),
    ({"dtype": "float32", "shape": []}, b"3.25", 3.25),
    ({"dtype": "uint8", "shape": [4]}, b"[1,2,3,4]", [1, 2, 3, 4]),
    ({"dtype": "uint8", "shape": [9]}, b"[1,2,3,4]", b"[1,2,3,4]"),  # an item's bytes may be anything
    ({"dtype": "uint8", "shape": [-1]}, b"[1,2,3,4]", b"[1,2,3,4]"),
    (ONE, b"[" + struct.pack("<f", 1.5) + b"\0\0]", b"[" + struct.pack("<f", 1.5) + b"\0\0]"),
    (ONE, b"[" * 100_000, b"[" * 100_000),
    (ONE, b"true", b"true"),
])  # fmt: skip
def test_a_forms_field_that_is_json_becomes_numbers(config: Any, value: bytes, expected: Any) -> None:
    handler = tensor_handler(config)
    for types in ({}, {"data": ""}):
        row: dict[str, Any] = {"data": bytearray(value)}
        if expected in (b"true", b"[" * 100_000):
            with pytest.raises(InputError, match="is text"):
                check_row(handler, row, types)
        else:
            check_row(handler, row, types)
        assert row == {"data": expected}


def test_fields_with_a_type_of_their_own_and_those_of_other_handlers_stay_as_they_are() -> None:
    for handler, types in ((TENSOR, {"data": "application/octet-stream"}), (PICTURE, {}), (TEXT, {})):
        row: dict[str, Any] = {"data": bytearray(b"[1.0,20]")}
        check_row(handler, row, types)
        assert row == {"data": b"[1.0,20]"}
    two = {"ids": bytearray(b"[7, 8]"), "mask": bytearray(b"[1, 0]")}
    check_row(tensor_handler(PAIR), two, {})
    assert two == {"ids": [7, 8], "mask": [1, 0]}


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
