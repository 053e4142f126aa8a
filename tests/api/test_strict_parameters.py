"""How `compat=strict` reads management parameters: all values are what TorchServe 0.12 was measured to make of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyserve.api import parameters
from pyserve.api.strict_parameters import JavaError, json_pairs, read_values
from pyserve.errors import BadRequestError, ModelNotFoundError

UNSET = None


def read(query: list[tuple[str, str]], known: tuple[parameters.Parameter, ...] = parameters.REGISTER) -> dict[str, Any]:
    return read_values(query, known, zeros=("startup_timeout",))


@pytest.mark.parametrize("name", ["batch_size", "response_timeout", "startup_timeout", "initial_workers"])
@pytest.mark.parametrize(
    "text, value",
    [
        ("", UNSET), ("-1", UNSET), ("-2147483649", UNSET), ("2147483648", UNSET), ("9223372036854775808", UNSET),
        ("1e3", UNSET), ("1.0", UNSET), ("1.5", UNSET), (" 2", UNSET), ("2 ", UNSET), ("0x3", UNSET), ("abc", UNSET),
        ("true", UNSET), ("NaN", UNSET), ("1_000", UNSET), ("\0", UNSET), (" 3 ", UNSET),
        ("+3", 3), ("03", 3), ("\u0663", 3), ("7", 7),
    ],
)  # fmt: skip
def test_a_number_is_what_java_makes_of_it(name: str, text: str, value: int | None) -> None:
    assert read([(name, text)]) == ({} if value is UNSET else {name: value})


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("max_batch_delay", "-1", 0), ("max_batch_delay", "-2147483648", 0), ("max_batch_delay", "2147483647", 3600000),
        ("batch_size", "0", 1), ("batch_size", "-2147483648", 1), ("batch_size", "2147483647", 65536),
        ("response_timeout", "0", 1), ("response_timeout", "2147483647", 86400), ("startup_timeout", "0", 0),
        ("startup_timeout", "-5", 0),
    ],
)  # fmt: skip
def test_a_number_that_torchserve_takes_becomes_the_nearest_there_is(
    name: str, text: str, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert read([(name, text)]) == {name: value}
    assert (f"{name}={int(text)}" in caplog.text) == (int(text) != value)


@pytest.mark.parametrize("name, known", [("initial_workers", parameters.REGISTER), ("min_worker", parameters.SCALE)])
def test_more_workers_than_can_be_are_refused_and_not_cut_down(name: str, known: Any) -> None:
    with pytest.raises(BadRequestError, match=f"Parameter {name} cannot be 2147483647"):
        read([(name, "2147483647")], known)


def test_a_least_or_largest_number_of_workers_below_0_is_not_dropped() -> None:
    pairs = [("min_worker", "-1"), ("max_worker", "-2147483648")]
    assert read(pairs, parameters.SCALE) == {"min_worker": -1, "max_worker": -2147483648}


@pytest.mark.parametrize(
    "text, value",
    [("true", True), ("True", True), ("TRUE", True), ("false", False), ("", False), ("1", False), ("yes", False),
     ("t", False), (" true", False), ("nan", False)],
)  # fmt: skip
def test_a_boolean_that_is_given_is_true_or_else_false(text: str, value: bool) -> None:
    assert read([("synchronous", text)]) == {"synchronous": value}


@pytest.mark.parametrize(
    "texts, value", [(("2", "3"), 2), (("", "3"), UNSET), (("x", "3"), UNSET), (("2", "x"), 2)]
)  # fmt: skip
def test_the_first_of_several_decides_also_when_it_is_malformed(texts: tuple[str, ...], value: int | None) -> None:
    assert read([("batch_size", text) for text in texts]) == ({} if value is UNSET else {"batch_size": value})


def test_what_is_unknown_or_empty_counts_as_not_given() -> None:
    pairs = [("colour", "red"), ("Batch_size", "3"), ("", "3"), ("model_name", ""), ("handler", "")]
    assert read([("url", "a.mar"), *pairs]) == {"url": "a.mar"}


@pytest.mark.parametrize("text", ["", "Python", "PYTHON", "java", " python", "lsp"])
def test_a_runtime_there_is_not_is_an_error_here_too(text: str) -> None:
    with pytest.raises(BadRequestError, match=f"^Invalid RuntimeType value: {text}$"):
        read([("runtime", text)])


def test_a_url_that_no_file_can_have() -> None:
    with pytest.raises(JavaError, match="Null character present") as caught:
        read([("url", "a.mar\0")])
    assert (caught.value.status, caught.value.type) == (403, "IllegalArgumentException")
    with pytest.raises(ModelNotFoundError, match="Model not found at: a"):
        read([("url", "a.mar\n")])


@pytest.mark.parametrize("text", ["nonsense", "a b.py", "../x.py", "noop.py:handle"])
def test_a_handler_is_looked_at_when_it_is_to_be_called(text: str) -> None:
    assert read([("handler", text)]) == {"handler": text}


def members(name: str, value: str) -> dict[str, Any]:
    body = f'{{"url": "a.mar", "{name}": {value}}}'.encode()
    read_pairs = read(json_pairs(body, parameters.REGISTER))
    assert read_pairs.pop("url") == "a.mar"
    return read_pairs


@pytest.mark.parametrize(
    "value, number",
    [("2", 2), ('"2"', 2), ("2.0", 2), ("1e0", 1), ("null", UNSET), ("-1", UNSET), ('" 2"', 2), ('"2.0"', 2),
     ('"+2"', 2)],
)  # fmt: skip
def test_numbers_of_a_json_body(value: str, number: int | None) -> None:
    assert members("batch_size", value) == ({} if number is UNSET else {"batch_size": number})


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("batch_size", "2.5", "java.lang.NumberFormatException: Expected an int but was 2.5"),
        ("batch_size", "2147483648", "java.lang.NumberFormatException: Expected an int but was 2147483648"),
        ("batch_size", "NaN", "java.lang.NumberFormatException: Expected an int but was NaN"),
        ("batch_size", "true", "java.lang.IllegalStateException: Expected an int but was BOOLEAN"),
        ("batch_size", "[2]", "java.lang.IllegalStateException: Expected an int but was BEGIN_ARRAY"),
        ("batch_size", "{}", "java.lang.IllegalStateException: Expected an int but was BEGIN_OBJECT"),
        ("batch_size", '"x"', 'java.lang.NumberFormatException: For input string: "x"'),
        ("batch_size", '""', "java.lang.NumberFormatException: empty String"),
        ("synchronous", "1", "java.lang.IllegalStateException: Expected a boolean but was NUMBER"),
        ("synchronous", "[]", "java.lang.IllegalStateException: Expected a boolean but was BEGIN_ARRAY"),
        ("handler", "[1]", "java.lang.IllegalStateException: Expected a string but was BEGIN_ARRAY"),
        ("handler", '{"a": 1}', "java.lang.IllegalStateException: Expected a string but was BEGIN_OBJECT"),
    ],
)
def test_a_json_member_of_another_type_is_an_error_of_javas(name: str, value: str, reason: str) -> None:
    with pytest.raises(JavaError) as caught:
        members(name, value)
    error = caught.value
    assert (error.status, error.type, error.message) == (500, "JsonSyntaxException", reason)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("synchronous", "true", True), ("synchronous", '"false"', False), ("synchronous", '"x"', False),
        ("synchronous", '"1"', False), ("synchronous", "null", UNSET), ("handler", "1.5", "1.5"),
        ("handler", "true", "true"), ("handler", "null", UNSET), ("model_name", "1", "1"), ("model_name", '""', UNSET),
    ],
)  # fmt: skip
def test_booleans_and_texts_of_a_json_body(name: str, value: str, expected: Any) -> None:
    assert members(name, value) == ({} if expected is UNSET else {name: expected})


@pytest.mark.parametrize("body", [b"", b"  ", b"null"])
def test_no_json_at_all_is_a_null_pointer(body: bytes) -> None:
    with pytest.raises(JavaError, match='because "registerModelRequest" is null') as caught:
        json_pairs(body, parameters.REGISTER)
    assert (caught.value.status, caught.value.type) == (500, "NullPointerException")


@pytest.mark.parametrize(
    "body, token", [(b"[]", "BEGIN_ARRAY"), (b'"noop.mar"', "STRING"), (b"1", "NUMBER"), (b"true", "BOOLEAN")]
)
def test_json_that_is_no_object(body: bytes, token: str) -> None:
    with pytest.raises(JavaError, match=f"^java.lang.IllegalStateException: Expected BEGIN_OBJECT but was {token}$"):
        json_pairs(body, parameters.REGISTER)


@pytest.mark.parametrize("body", [b"{", b'{"url": "a.mar"', b'{"url": "a.mar",}', b'{"url": "a.mar"} x', b"\xff\xfe",
                                  b"[" * 200_000])  # fmt: skip
def test_a_body_that_is_not_json_is_an_error_of_javas(body: bytes) -> None:
    with pytest.raises(JavaError) as caught:
        json_pairs(body, parameters.REGISTER)
    assert (caught.value.status, caught.value.type) == (500, "JsonSyntaxException")


def test_of_a_json_member_given_twice_the_last_counts_and_unknown_ones_are_left_out() -> None:
    body = json.dumps({"url": "a.mar", "colour": ["red"]})[:-1] + ', "url": "b.mar"}'
    assert json_pairs(body.encode(), parameters.REGISTER) == [("url", "b.mar")]
