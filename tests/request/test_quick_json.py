"""orjson in the place of the standard library: the same bytes, the same values, the same refusals."""

from __future__ import annotations

import json
import math
import random
import re
import struct
from collections import OrderedDict, defaultdict, namedtuple
from enum import Enum, IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyserve.errors import ServeError
from pyserve.request import quick_json
from pyserve.request.json_body import parse_json
from pyserve.request.json_encoding import dump
from pyserve.request.messages import dump_json

NAN, INFINITY = math.nan, math.inf
EDGES = [
    0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 1e-4,
    9.999999999999999e-5, 1e-5, 1.5e-5, -1e-5, 9.9e-6, 1e-6, 1e-9, 1.25e-9, 1e-10, 1e-99, 1e-100, 10.00001, -10.000012,
    100.00001, 1e15, 1e16, 1e17, 123456789012345680.0, 1e21, 1e22, 1e23, 1e99, 1e100, 2.0**53, 2.0**63, 2.0**64,
]  # fmt: skip


class Named(str, Enum):
    """Its text is another than its value."""

    RED = ("red", 1)

    def __new__(cls, text: str, number: int) -> Named:
        made = str.__new__(cls, text)
        made._value_ = number
        return made


class Level(IntEnum):
    HIGH = 3


class Text(str):
    pass


class Whole(int):
    pass


Point = namedtuple("Point", "x y")


def spelled(value: Any) -> str:
    return json.dumps(value, indent=2)


@pytest.fixture
def without_orjson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_json, "_orjson", None)


def test_orjson_is_here_and_spells_numbers_as_python_does() -> None:
    assert quick_json._orjson is not None, "the tests below would compare the standard library with itself"
    assert quick_json.write([0.5]) == b"[\n  0.5\n]"
    assert quick_json.read(b"[0.5]", 100) == [0.5]


# --- what is written --------------------------------------------------------------------------------------------------


def test_floats_at_the_edges_of_spellings_are_written_alike() -> None:
    assert quick_json.write(EDGES) is not None
    for value in (
        EDGES,
        [[each] for each in EDGES],
        {repr(each): each for each in EDGES},
        [{"a": each} for each in EDGES],
    ):
        assert dump(value) == spelled(value).encode()


@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16", "decimal"])
def test_random_floats_of_every_size_are_written_alike(kind: str) -> None:
    rng = random.Random(20)
    if kind == "float64":
        numbers = [struct.unpack("d", rng.randbytes(8))[0] for _ in range(40_000)]
    elif kind == "decimal":
        numbers = [
            float(f"{rng.randrange(10 ** rng.randrange(1, 18))}e{rng.randrange(-40, 25)}") for _ in range(40_000)
        ]
    else:
        bits = torch.randint(-(2**31), 2**31, (40_000,), generator=torch.Generator().manual_seed(20), dtype=torch.int32)
        numbers = bits.view(getattr(torch, kind)).float().tolist()
    numbers = [each for each in numbers if math.isfinite(each)]
    assert len(numbers) > 20_000
    assert quick_json.write(numbers) == dump(numbers) == spelled(numbers).encode()


def test_softmax_outputs_are_written_alike() -> None:
    rows = torch.softmax(torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)) * 4, dim=1)
    assert quick_json.write(rows.tolist()) == dump(rows) == spelled(rows.tolist()).encode()


def test_every_character_is_written_alike() -> None:
    characters = [chr(code) for code in range(0x3000)] + ["\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"]
    for value in (characters, "".join(characters).split("\n"), dict.fromkeys(characters, 1)):
        assert quick_json.write(value) is not None
        assert dump(value) == spelled(value).encode()
        assert dump_json(value) == (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@pytest.mark.parametrize(
    "text",
    ["0.00001", "x 0.00001", "-0.00002,", "1e-5", "e-7,", "null", "NaN", "a\\", "\\\x7f", 'say "e-5"', "e-5\n", "\x7f"],
)
def test_texts_that_look_like_numbers_stay_what_they_are(text: str) -> None:
    for value in ([text], [text, 1.5e-7], {text: text}, {text: 1e-05}, [[text, None, 1e-5]], {"a": {text: [text]}}):
        assert quick_json.write(value) is not None
        assert dump(value) == dump(value, pytest.fail) == spelled(value).encode()


@pytest.mark.parametrize(
    "value",
    [
        2**63 - 1, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**30, "\ud800", "a\udfffb", {"\ud800": 1}, True, 1.5,
        "x", None, [NAN], [INFINITY, -INFINITY], {"a": [None, NAN]}, [None, "null", 1.0], Named.RED, Level.HIGH,
        Text("\xfc"), Whole(7), Point(1, 2), OrderedDict(b=1, a=2), defaultdict(list, a=[1]), {1: 2},
        {None: 1, True: 2, 1.5: 3}, {Text("k"): 1}, {"1": 1, 1: 2}, (1, (2, [3])), [], {}, (), [[]], [{}, []],
        {"a": {}, "b": [[]]}, np.float32(0.1), np.float64(0.1), np.float16(1e-5), np.int64(-3), np.bool_(True),
        np.zeros((0, 2)), np.arange(3.0) / 3, torch.tensor(1e-5), torch.ones(2, 0),
        torch.tensor([1e-5, 1e3, 0.1], dtype=torch.float16),
    ],
)  # fmt: skip
def test_types_and_values_that_orjson_takes_otherwise_are_written_alike(value: Any) -> None:
    plain = value.tolist() if hasattr(value, "tolist") else value
    for wrapped, expected in ((value, plain), ([value], [plain]), ({"a": value}, {"a": plain})):
        assert dump(wrapped) == spelled(expected).encode("ascii")
        if not hasattr(value, "tolist"):
            text = json.dumps(wrapped, indent=2, ensure_ascii=False) + "\n"
            assert dump_json(wrapped) == text.encode("utf-8", "backslashreplace")


def test_an_infinity_in_a_big_document_is_told() -> None:
    told: list[int] = []
    value = {"rows": [[0.5, None, "null"]] * 1000 + [[-INFINITY]]}
    assert json.loads(dump(value, lambda: told.append(1)))["rows"][-1] == [None]
    assert told == [1]


@pytest.mark.parametrize("value", [{(1, 2): 3}, [object()], {"a": b"x"}, [{1}], b"x", [1j]])
def test_what_is_no_json_is_refused_in_the_same_words(value: Any) -> None:
    with pytest.raises(TypeError) as expected:
        json.dumps(value, indent=2)
    with pytest.raises(TypeError, match=re.escape(str(expected.value))):
        dump(value)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(EDGES)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    | st.dictionaries(st.integers() | st.booleans() | st.none(), inner, max_size=2) | st.tuples(inner, inner),
    max_leaves=30,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(VALUES)
def test_whatever_is_quick_is_what_the_standard_library_writes(value: Any) -> None:
    assert dump(value) == spelled(value).encode()
    raw = json.dumps(value, indent=2, ensure_ascii=False)
    quick = quick_json.write(value)
    assert quick is None or quick == raw.encode()
    assert dump_json(value) == (raw + "\n").encode("utf-8", "backslashreplace")


@pytest.mark.usefixtures("without_orjson")
def test_without_orjson_all_is_written_and_read_alike() -> None:
    assert quick_json.write([1]) is None and quick_json.read(b"[1]", 100) is quick_json.UNREAD
    value = {"b": [1, 2.5e-7, None, True, "gr\u00fc\u00df\x7f"], "a": {}}
    assert dump(value) == spelled(value).encode()
    assert parse_json(b'{"a": [1e-7, 18446744073709551616]}') == {"a": [1e-7, 2**64]}


# --- what is read -----------------------------------------------------------------------------------------------------


def outcome(body: bytes, *, lenient: bool) -> tuple[str, str]:
    """The value, with the type of each number, or the refusal in full."""
    try:
        return "value", repr(parse_json(bytearray(body), lenient=lenient))
    except ServeError as error:
        return type(error).__name__, error.message


def assert_read_alike(body: bytes) -> None:
    for lenient in (False, True):
        got = outcome(body, lenient=lenient)
        module, quick_json._orjson = quick_json._orjson, None
        try:
            assert got == outcome(body, lenient=lenient), (body[:200], lenient)
        finally:
            quick_json._orjson = module


NASTY = [
    "-0", "-0.0", "0", "00", "01", "1.", ".5", "+1", "1e5", "1E+5", "1e-400", "1e400", "-1e999", "NaN", "Infinity",
    "-Infinity", "nul", "tru", "true", "null", '""', '"', "[", "]", "[1,]", "[1 2]", "{}", '{"a"}', '{"a":}',
    '{"a":1,}', "{1:2}", "'a'", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
    "-9223372036854775809", "18446744073709551615", "18446744073709551616", "[18446744073709551616]",
    '{"a":123456789012345678901234567890}', "[1,-99999999999999999999]", "1234567890123456789",
    "0.1234567890123456789", "1234567890123456789.5", "1234567890123456789e2", "12345678901234567890E-2",
    "9007199254740993", "9007199254740993.0", "2.2250738585072011e-308", "4.9406564584124654e-324",
    "2.4703282292062327e-324", "1e23", "8.5e22", "0.1e1", "1" * 400, "-" + "9" * 5000, "0." + "3" * 800,
    "1" + "0" * 308, "1" + "0" * 309 + ".0", '{"a":1,"a":2}', '{"a":1,"b":2,"a":3}', '{"a":1,"\\u0061":2}',
    '[{"a":1},{"a":2}]', '{"a":{"a":1}}', '{"a":{"b":1,"b":1}}', '[{"a":[{"b":1,"c":2,"b":3}]}]', '{"a:b":":"}',
    '{"a":"{","a":"}"}', '{"":1,"":2}', '{"a":"b:c"}', '["{",":"]', '{"":""}', '{"b":1,"a":1,"c":{}}',
    '{"__proto__":1}', '{"\\u0000":1}', '{"a":1} {"a":2}', "1 2", "[1]\x00", "[1]\n\t\r ", "\x0b[1]", "\ufeff[1]",
    "[\u00a01]", '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\u12"', '"\\x41"', '"\x00"',
    '"\x1f"', '"\x7f"', '"\n"', '"\u2028\u00fc\U0001f600"', '"\\/\\b\\f\\n\\r\\t\\\\\\""', '"\ud800"', '"a\udfff"', "",
    " ", "//x", "/**/1", "[1,/*x*/2]", '{"a":01}', "[-]", "[1e]", "[1e+]", "[0x1]", "[1_0]", "\uff11",
    "[" * 100 + "]" * 100, "[" * 101 + "]" * 101, '{"a":' * 100 + "1" + "}" * 100, '{"a":' * 101 + "1" + "}" * 101,
    "[" * 100 + '"' + "[" * 99 + '"' + "]" * 100, "[" * 2000, '[{"a":' * 60,
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_nasty_bodies_are_read_or_refused_alike(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    for body in (
        raw,
        b"[" + raw + b"]",
        b'{"data": ' + raw + b"}",
        b"  " + raw,
        raw[:-1],
        b'{"x":1,"y":[' + raw + b"]}",
    ):
        assert_read_alike(body)
    if "\ud800" not in text and "\udfff" not in text:
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig", "latin-1"):
            assert_read_alike(text.encode(encoding, "replace"))


@pytest.mark.parametrize(
    "body", [b"[18446744073709551616]", b'{"a":1,"a":2}', b"[NaN]", b'"\\ud800"', b"\xef\xbb\xbf[1]"]
)
def test_what_orjson_would_read_otherwise_is_not_read_by_it(body: bytes) -> None:
    assert quick_json.read(body, 100) is quick_json.UNREAD


@pytest.mark.parametrize(
    "value",
    [
        [0.1, -5],
        {"data": [[1.5, 2], [3, 4]]},
        [{"a": 1, "b": {"c": []}}] * 20,
        "text",
        7,
        {"a": "\xfc"},
        {"instances": [{"x": 1}]},
    ],
)
def test_usual_bodies_are_read_by_it(value: Any) -> None:
    body = json.dumps(value, ensure_ascii=False).encode()
    assert repr(quick_json.read(body, 100)) == repr(value)


@pytest.mark.parametrize("depth", [1, 2, 99, 100, 101, 102, 500, 1023, 1024, 1025])
@pytest.mark.parametrize(
    ("begin", "end"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("[1,", ",[]]"), ('{"b":[],"a":', "}")]
)
def test_depth_is_bounded_alike(depth: int, begin: str, end: str) -> None:
    for inner in ("1", "[]", "{}", '"[[{{"', '"}:"', ""):
        assert_read_alike((begin * depth + inner + end * depth).encode())
        assert_read_alike((begin * depth + inner + end * (depth - 1)).encode())
    flat = f"[{', '.join(['[[1]]', begin + '1' + end] * depth)}]".encode()
    assert_read_alike(flat)
    assert quick_json.read(flat, 100) is not quick_json.UNREAD


def test_a_member_given_twice_anywhere_is_found() -> None:
    rng = random.Random(5)
    for _ in range(300):
        members = [f'"{rng.choice("abc")}": {rng.choice(["1", "[]", "{}", chr(34) + ":" + chr(34)])}' for _ in range(3)]
        inner = "{" + ", ".join(members) + "}"
        assert_read_alike(
            rng.choice(["%s", "[1, %s]", '{"a": %s, "z": [{}]}', '[{"a": 1}, {"b": [%s]}]'])
            .replace("%s", inner)
            .encode()
        )


@settings(max_examples=400, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_bodies_are_read_alike(value: Any, is_ascii: bool, indent: int | None) -> None:
    assert_read_alike(json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass"))


@settings(max_examples=600, deadline=None)
@given(
    st.text(st.sampled_from('[]{}:,"\\/ue-+.01289aE \n\x00\x7f\u00fc\ud800ntrfls'), max_size=14) | st.text(max_size=6)
)
@example("{}:")
def test_damaged_bodies_are_refused_alike(text: str) -> None:
    assert_read_alike(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=12))
def test_bytes_of_any_kind_are_refused_alike(body: bytes) -> None:
    assert_read_alike(body)


def test_random_numbers_are_read_alike() -> None:
    rng = random.Random(7)
    for _ in range(20):
        texts = [f"{rng.choice(['', '-'])}{rng.randrange(10 ** rng.randrange(1, 26))}" for _ in range(200)]
        texts += [f"{rng.randrange(10**17)}.{rng.randrange(10**20)}e{rng.randrange(-340, 300)}" for _ in range(200)]
        texts += [repr(struct.unpack("d", rng.randbytes(8))[0]) for _ in range(200)]
        for text in texts:
            assert_read_alike(text.encode())
        assert_read_alike(f"[{', '.join(texts)}]".encode())
