"""Management parameters: every malformed form is refused by name, and nothing is guessed."""

from __future__ import annotations

import json

import pytest

from pyserve.api import parameters
from pyserve.api.parameters import json_pairs, read_values
from pyserve.errors import BadRequestError

TABLES = {
    "list": parameters.LIST,
    "describe": parameters.DESCRIBE,
    "register": parameters.REGISTER,
    "scale": parameters.SCALE,
    "unregister": parameters.UNREGISTER,
}
EVERY = [pytest.param(each, id=f"{table}-{each.name}") for table, rows in TABLES.items() for each in rows]
NOT_INTEGERS = ("", " 1", "1 ", "1.0", "1e3", "0x1", "1_0", "nan", "dd", "true", "--1", "\u0661", "9" * 19, "1\n")
NOT_BOOLEANS = ("", "1", "0", "yes", "nan", " true", "true ", "truefalse")


def kind_of(parameter: parameters.Parameter) -> str:
    return str(parameter.schema["type"])


def read_one(parameter: parameters.Parameter, value: str) -> object:
    return read_values([(parameter.name, value)], [parameter])[parameter.name]


@pytest.mark.parametrize("parameter", EVERY)
def test_malformed_value_is_refused_with_the_name_and_what_is_allowed(parameter: parameters.Parameter) -> None:
    malformed = {
        "integer": NOT_INTEGERS, "boolean": NOT_BOOLEANS, "string": ("a\0b", "a\nb", "a" * 4097),
    }[kind_of(parameter)]  # fmt: skip
    for value in malformed:
        with pytest.raises(BadRequestError) as caught:
            read_one(parameter, value)
        assert caught.value.detail["parameter"] == parameter.name
        assert parameter.name in caught.value.message or kind_of(parameter) == "string"


@pytest.mark.parametrize("parameter", [each for each in EVERY if kind_of(each.values[0]) == "integer"])
def test_integer_is_accepted_at_its_bounds_and_refused_beyond(parameter: parameters.Parameter) -> None:
    least, most = parameter.schema["minimum"], parameter.schema["maximum"]
    assert read_one(parameter, str(least)) == least
    assert read_one(parameter, str(most)) == most
    for value in (least - 1, most + 1):
        with pytest.raises(BadRequestError, match=f"Parameter {parameter.name} cannot be"):
            read_one(parameter, str(value))


@pytest.mark.parametrize("value, expected", [("true", True), ("TRUE", True), ("false", False), ("False", False)])
def test_boolean_is_true_or_false_in_any_case(value: str, expected: bool) -> None:
    assert read_values([("synchronous", value)], parameters.SCALE) == {"synchronous": expected}


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("min_workers", "min_worker"), ("minWorker", "min_worker"), ("batchSize", "batch_size"),
        ("batch-size", "batch_size"), ("max_batch_dealy", "max_batch_delay"), ("SYNCHRONOUS", "synchronous"),
        ("initial_workers", ""), ("zzz", ""),
    ],
)  # fmt: skip
def test_unknown_name_is_refused_with_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read_values([(name, "1")], parameters.SCALE)
    assert name in caught.value.message
    if nearest:
        assert f"did you mean {nearest}?" in caught.value.message
    assert "min_worker" in caught.value.detail["known"]


def test_call_without_parameters_says_so() -> None:
    with pytest.raises(BadRequestError, match="this call has none"):
        read_values([("x", "1")], parameters.NONE)


def test_long_unknown_name_is_not_echoed_whole() -> None:
    with pytest.raises(BadRequestError) as caught:
        read_values([("a" * 100_000, "1")], parameters.SCALE)
    assert len(json.dumps(caught.value.body())) < 2000


def test_first_value_of_a_repeated_parameter_counts() -> None:
    assert read_values([("min_worker", "2"), ("min_worker", "3")], parameters.SCALE) == {"min_worker": 2}


@pytest.mark.parametrize(
    "name, value",
    [("model_name", each) for each in ("", "../x", "a/b", "..", "m" * 300, "a\u202eb")]
    + [("handler", each) for each in ("", ":f", "h.py/", "a\u202eb", "h" * 2000)]
    + [("runtime", each) for each in ("", "java", "Python")],
)
def test_text_that_cannot_name_the_thing_is_refused(name: str, value: str) -> None:
    with pytest.raises(BadRequestError):
        read_values([(name, value)], parameters.REGISTER)


@pytest.mark.parametrize(
    "value", ["image_classifier", "handler.py", "my_handler.py:entry", "my h\u00e9.py", "../h:f", "/a/h.py"]
)
def test_handler_of_the_known_forms_is_accepted(value: str) -> None:
    assert read_values([("handler", value)], parameters.REGISTER) == {"handler": value}


def test_bad_runtime_has_torchserves_text() -> None:
    with pytest.raises(BadRequestError, match=r"^Invalid RuntimeType value: java$"):
        read_values([("runtime", "java")], parameters.REGISTER)


def test_json_members_mean_what_the_same_query_means() -> None:
    body = b'{"url": "m.mar", "batch_size": 4, "synchronous": false, "initial_workers": "2", "handler": null}'
    assert read_values(json_pairs(body), parameters.REGISTER) == {
        "url": "m.mar", "batch_size": 4, "synchronous": False, "initial_workers": 2,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["true", "4.0", "1e2", "NaN", '"4 "', "[4]", "{}", str(10**20)])
def test_json_member_of_another_type_is_refused(value: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        read_values(json_pairs(f'{{"batch_size": {value}}}'.encode()), parameters.REGISTER)
    assert caught.value.detail["parameter"] == "batch_size"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"1", b"null", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 200_000],
    ids=["empty", "open", "list", "text", "number", "null", "not-utf8", "long-number", "deep"],
)
def test_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        json_pairs(body)
