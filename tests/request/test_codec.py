"""Bodies to rows, results to bytes: TorchServe's rules, and the bounds it does not have."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote_plus, unquote_to_bytes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyserve.errors import BadRequestError, HandlerError, InputError, ServeError, TooLargeError
from pyserve.request import codec
from pyserve.request.json_body import json_depth
from pyserve.request.messages import Request

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


def decoded(
    body: bytes, content_type: str | None = None, *, decode: bool = True, lenient: bool = False,
    is_built_in: bool = False,
) -> dict[str, Any]:  # fmt: skip
    headers = [("Content-Type", content_type)] if content_type is not None else []
    request = Request("POST", "/predictions/m", headers=headers, body=bytearray(body))
    return codec.decode_request(request, decode=decode, lenient=lenient, is_built_in=is_built_in)


def multipart(*parts: tuple[str, str, bytes], boundary: str = "BB", end: bool = True) -> bytes:
    """Parts of (disposition parameters, further header lines, content)."""
    body = b""
    for disposition, lines, content in parts:
        head = f"--{boundary}\r\nContent-Disposition: form-data{disposition}\r\n{lines}\r\n"
        body += head.encode("latin-1") + content + b"\r\n"
    return body + (f"--{boundary}--\r\n".encode() if end else b"")


def form(body: bytes, boundary: str = "BB", **options: bool) -> dict[str, Any]:
    return decoded(body, f"multipart/form-data; boundary={boundary}", **options)


# --- plain bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "body", "value"),
    [
        (None, b"raw", bytearray(b"raw")),
        (None, b"", bytearray()),
        ("image/jpeg", b"\xff\xd8", bytearray(b"\xff\xd8")),
        (JSON, b'{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        (f"{JSON}; charset=utf-8", b"[1]", [1]),
        ("APPLICATION/JSON", b"7", 7),
        ("text/plain", "gr\u00fc\u00df".encode(), "gr\u00fc\u00df"),
        ("text/csv; charset=utf-8", b"1,2", "1,2"),
        ("text/plain", b"\xff\xfe", bytearray(b"\xff\xfe")),
        ("application/json+x", b"[1]", bytearray(b"[1]")),
    ],
)
def test_a_plain_body_is_decoded_by_its_content_type(content_type: str | None, body: bytes, value: object) -> None:
    row = decoded(body, content_type)
    assert row == {"body": value}
    assert type(row["body"]) is type(value)


@pytest.mark.parametrize("content_type", [JSON, "text/plain", None])
def test_nothing_is_decoded_when_that_is_switched_off(content_type: str | None) -> None:
    assert decoded(b"[1]", content_type, decode=False) == {"body": bytearray(b"[1]")}
    part = multipart(('; name="a"; filename="f"', "Content-Type: application/json\r\n", b"[1]"))
    assert form(part, decode=False) == {"a": bytearray(b"[1]")}


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": }', b"[1, 2", b'"\xff"', b"[1]x", b"\x00\x01", b"nul"])
def test_json_that_is_none_reaches_the_handler_as_bytes(body: bytes) -> None:
    assert decoded(body, JSON) == {"body": bytearray(body)}


def test_json_may_be_utf_16_or_have_a_mark() -> None:
    assert decoded('{"a": "\u00e9"}'.encode("utf-16"), JSON) == {"body": {"a": "\u00e9"}}
    assert decoded(b"\xef\xbb\xbf[1]", JSON) == {"body": [1]}


def test_a_lone_surrogate_is_kept() -> None:
    assert decoded(rb'"\ud800"', JSON) == {"body": "\ud800"}


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_of_a_hundred_levels_is_the_deepest(opening: str, closing: str) -> None:
    middle = "1" if opening != "[" else ""
    assert decoded((opening * 100 + middle + closing * 100).encode(), JSON)
    for depth in (101, 100_000, 250_000):
        for text in (opening * depth + middle + closing * depth, opening * depth):
            with pytest.raises(InputError, match="100 levels"):
                decoded(text.encode(), JSON)


@pytest.mark.parametrize(
    "value",
    [
        [[1]] * 5000,
        "[" * 300,
        ["[[" + '"' + "{{" + "\\"] * 80,
        {"[" * 60: "]" * 60, '\\"[' * 60: "\\\\"},
    ],
)  # fmt: skip
def test_brackets_side_by_side_or_in_strings_are_not_depth(value: object) -> None:
    assert decoded(json.dumps(value).encode(), JSON) == {"body": value}


def test_depth_is_counted_in_linear_time() -> None:
    # Quadratic, this would take hours.
    body = b"[" * 101 + b'"' + b'\\"' * 1_000_000
    with pytest.raises(InputError):
        decoded(body, JSON)
    body = b'["' + b"\\\\" * 500_000 + b'"' + b"," + b"[]," * 200 + b'"' + b'\\"' * 500_000
    assert decoded(body, JSON) == {"body": bytearray(body)}


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.recursive(st.text('[]{}"\\a') | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_depth_of_any_document_is_that_of_its_value(document: Any) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False)):
        assert json_depth(text.encode()) == depth(document)


@given(st.binary(max_size=200))
def test_any_bytes_sent_as_json_give_a_row_or_a_client_error(body: bytes) -> None:
    try:
        assert set(decoded(body, JSON)) == {"body"}
    except BadRequestError:
        pass


def test_numbers_have_one_meaning() -> None:
    assert decoded(b"1e400", JSON)["body"] == math.inf
    assert math.copysign(1, decoded(b"-0.0", JSON)["body"]) == -1
    assert math.isnan(decoded(b"NaN", JSON)["body"])
    assert decoded(b"1" * 4300, JSON)["body"] == int("1" * 4300)
    assert decoded(b"0." + b"1" * 10_000, JSON)["body"] == pytest.approx(0.111111111)


@pytest.mark.parametrize("body", [b'{"a": 1, "a": 2}', b'[{"b": {"c": 0, "a": 1, "a": 1}}]', rb'{"a": 1, "\u0061": 2}'])
def test_a_member_of_json_that_is_given_twice_is_refused(body: bytes) -> None:
    with pytest.raises(InputError, match="'a' more than once"):
        decoded(body, JSON)
    part = multipart(('; name="x"; filename="f"', "Content-Type: application/json\r\n", body))
    with pytest.raises(InputError, match="'a' more than once"):
        form(part)


def test_torchserve_takes_the_last_of_what_is_given_twice() -> None:
    assert decoded(b'{"a": 1, "a": 2}', JSON, lenient=True) == {"body": {"a": 2}}
    assert decoded(b"a=1&a=2&%ff=3", FORM, lenient=True) == {"a": bytearray(b"2"), "\ufffd": bytearray(b"3")}
    assert form(multipart(('; name="a"', "", b"1"), ('; name="a"', "", b"2")), lenient=True) == {"a": bytearray(b"2")}
    row = {"body": 1}
    codec.add_query(row, "body=2&a=1&a=2", lenient=True)
    assert row == {"body": 1, "a": bytearray(b"2")}


def measured_forms() -> Iterator[tuple[bytes, str, dict[str, Any]]]:
    """Requests and what the handler of a TorchServe 0.12 was given for them."""
    kind = "multipart/form-data; boundary=BB"
    of_json, text = "Content-Type: application/json\r\n", "Content-Type: text/plain\r\n"
    twice = b'{"a": 1, "a": 2}'
    for first, second in (
        ("", ""),
        ('; filename="f"', '; filename="g"'),
        ('; filename="f"', ""),
        ("", '; filename="f"'),
    ):
        body = multipart((f'; name="data"{first}', "", b"1"), (f'; name="data"{second}', "", b"2"))
        yield body, kind, {"data": b"2"}
    # Only of a part with a file name the content type counts, without its parameters and as it is spelled.
    yield multipart(('; name="x"', of_json, twice)), kind, {"x": twice}
    yield multipart(('; name="x"; filename="f"', of_json, twice)), kind, {"x": {"a": 2}}
    yield multipart(('; name="x"; filename=""', of_json, b"[1]")), kind, {"x": [1]}
    yield multipart(("; name=\"x\"; filename*=utf-8''f", of_json, b"[1]")), kind, {"x": [1]}
    charset = "Content-Type: application/json ; charset=utf-8\r\n"
    yield multipart(('; name="x"; filename="f"', charset, b"[1]")), kind, {"x": [1]}
    yield multipart(('; name="x"; filename="f"', of_json.replace("json", "JSON"), b"[1]")), kind, {"x": b"[1]"}
    yield multipart(('; name="x"', text, b"t")), kind, {"x": b"t"}
    yield multipart(('; name="x"; filename="f"', "Content-Type: application/json;\r\n", b"[1]")), kind, {"x": b"[1]"}
    yield multipart(('; name="x"; filename="f"', "Content-Type:\r\n", b"[1]")), kind, {"x": b"[1]"}
    yield multipart(('; name="x"; filename="f"', text + of_json, b"[1]")), kind, {"x": [1]}
    encoded = "Content-Transfer-Encoding: base64\r\n"
    yield multipart(('; name="x"', encoded, b"MQ==")), kind, {"x": b"MQ=="}
    one = multipart(('; name="x"', "", b"1"))
    yield one + multipart(('; name="y"', "", b"2")), kind, {"x": b"1"}
    yield one, "multipart/form-data", {"body": one}
    yield one, "Multipart/Form-Data; boundary=BB", {"body": one}
    yield one, "multipart/form-data; BOUNDARY=BB", {"x": b"1"}
    yield one.replace(b"BB", b"B" * 100), f"multipart/form-data; boundary={'B' * 100}", {"x": b"1"}
    # What stands before the first delimiter hides all parts, but for line ends.
    for before, row in ((b"\r\n", {"x": b"1"}), (b"\r\n\r\n", {"x": b"1"}), (b"junk", {}), (b"junk\r\n", {})):
        yield before + one, kind, row
    yield one + b"an epilogue\r\n", kind, {"x": b"1"}
    yield one.replace(b"--BB\r\n", b"--BB  \r\n", 1), kind, {}
    yield one.replace(b"\r\n", b"\n"), kind, {"x": b"1"}
    two = multipart(('; name="x"', "", b"1"), ('; name="y"', "", b"2"), end=False)
    yield two, kind, {"x": b"1"}
    yield two.removesuffix(b"\r\n"), kind, {"x": b"1"}
    yield one.replace(b"--BB--\r\n", b""), kind, {}
    for nothing in (b"", b"--BB--\r\n", b"--CC\r\n"):
        yield nothing, kind, {}
    for name, seen in (
        ("x;y;z", "x y z"), ("x:y", "x y"), ("x=y", "x y"), ("x,y", "x y"), ("x\ty", "x y"), (" x ", "x"),
        (r"x\"y", r"x\y"), (r"x\\y", r"x\\y"), ("x'y", "x'y"), ("x%22y", "x%22y"), ('x"; name="y', "y"),
    ):  # fmt: skip
        yield multipart((f'; name="{name}"', "", b"1")), kind, {seen: b"1"}
    for before in (b" ", b"\n\n", b"\t\r\n"):
        yield before + one, kind, {"x": b"1"}
    for size, row in ((1, {"x": b"1"}), (4, {"x": b"1"}), (5, {}), (9, {})):
        yield one[: len(one) - size], kind, row
    yield one.replace(b"1\r\n", b"1\n"), kind, {"x": b"1"}
    yield one.replace(b"1\r\n", b"\n").replace(b"\r\n", b"\n"), kind, {"x": b""}
    yield one.replace(b"1\r\n", b""), kind, {"x": b""}
    inner = "Content-Type: multipart/mixed; boundary=II\r\n"
    files = multipart(
        ('; filename="f"', text, b"t"), ('; filename="g"', of_json, b'{"b": 2}'), boundary="II"
    )  # fmt: skip
    yield multipart(('; name="files"', inner, files)), kind, {"files": {"b": 2}}
    yield b"x=2", "Application/X-WWW-Form-Urlencoded; charset=utf-8", {"x": b"2"}
    for body, row in (
        (b"x=1&x=2", {"x": b"2"}), (b"data=1&y=2&data=3", {"data": b"3", "y": b"2"}), (b"x=1&%78=2", {"x": b"2"}),
        (b"x=1&x", {"x": b"1"}), (b"x", {}), (b"x&", {"x": b""}), (b"x=1&x&y=2", {"x": b"", "y": b"2"}),
        (b"x=1&%zz", {"x": b"1"}), (b"x=1;x=2", {"x": b"1;x=2"}), (b"x=a=b", {"x": b"a=b"}), (b"x=1&", {"x": b"1"}),
        (b"x=1\r\n&y=2", {"x": b"1"}), (b"x=a\nb&y=2", {"x": b"a"}), (b"x=1&\r\ny=2", {"x": b"1", "y": b"2"}),
        (b" x = 1", {"x": b" 1"}), (b"x%0D=1%0A", {"x": b"1\n"}), (b"x=%ff+", {"x": b"\xff "}), (b"\n", {}),
    ):  # fmt: skip
        yield body, FORM, row
    for spelled in ("Application/JSON", "application/json ; charset=utf-8"):
        yield b"[1]", spelled, {"body": b"[1]"}
    yield b"[1]", f"{JSON}; charset=utf-8", {"body": [1]}
    yield rb'{"a": 1, "\u0061": 2}', JSON, {"body": {"a": 2}}
    for encoding in ("utf-16", "utf-8-sig"):
        yield "[1]".encode(encoding), JSON, {"body": "[1]".encode(encoding)}
    yield b'"\xed\xa0\x80"', JSON, {"body": b'"\xed\xa0\x80"'}
    yield b"t", "TEXT/plain", {"body": b"t"}


@pytest.mark.parametrize(("body", "content_type", "row"), [*measured_forms()])
def test_forms_are_read_as_torchserve_was_measured_to(body: bytes, content_type: str, row: dict[str, Any]) -> None:
    assert decoded(body, content_type, lenient=True) == row


@pytest.mark.parametrize(
    "body",
    [
        b"=1&y=2",
        b"&x=1",
        b"x=1&&y=2",
        b"=",
        b"&",
        b"x&=",
        b"x=%zz",
        b"%zz=1",
        b"x=%4",
        b"x=%+1",
        b"x=%%41",
        b"x=1\r&y=2",
    ],
)
def test_forms_that_torchserve_fails_on_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        decoded(body, FORM, lenient=True)


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("x=1&x=2", {"x": b"2"}), ("x=1;x=2", {"x": b"2"}), ("y=1&y=3", {"y": b"3"}), ("x", {"x": b""}),
        ("=1&==2", {"1": b"", "2": b""}), ("=", {}), ("&&x==2", {"x": b"=2"}), ("x=1&x", {"x": b""}),
        ("%ff=%ff", {"\ufffd": "\ufffd".encode()}), ("%3D=a+b", {"=": b"a b"}), ("body=1", {}),
    ],
)  # fmt: skip
def test_a_query_is_read_as_torchserve_was_measured_to(query: str, fields: dict[str, bytes]) -> None:
    row: dict[str, Any] = {"body": b"raw"}
    codec.add_query(row, query, lenient=True)
    assert row == {**fields, "body": b"raw"}
    assert [*row] == [*fields, "body"]


def test_a_query_with_an_odd_percent_sign_is_refused_as_by_torchserve() -> None:
    with pytest.raises(BadRequestError, match="two hexadecimal digits"):
        codec.add_query({}, "x=%zz", lenient=True)


def test_each_field_has_torchserves_content_type() -> None:
    parts = multipart(
        ('; name="plain"', "Content-Type: text/plain\r\n", b"1"), ('; name="file"; filename="f"', "", b"2"),
        ('; name="text"; filename="f"', "Content-Type: text/plain; charset=utf-8\r\n", b"3"),
        ('; name="empty"; filename="f"', "Content-Type:\r\n", b"4"),
    )  # fmt: skip
    headers = [("Content-Type", "multipart/form-data; boundary=BB")]
    types: dict[str, str] = {}
    codec.decode_request(Request("POST", "/", headers=headers, body=bytearray(parts)), types=types, lenient=True)
    assert types == {"plain": "", "file": "application/octet-stream", "text": "text/plain", "empty": ""}


def test_an_absurd_number_is_refused_at_once() -> None:
    for digits in (4301, 6_000_000):
        with pytest.raises(InputError, match="JSON body cannot be used"):
            decoded(b"1" * digits, JSON)


# --- forms ------------------------------------------------------------------------------------------------------------


def test_a_multipart_form_is_one_key_per_field() -> None:
    body = multipart(
        ('; name="data"; filename="../../x.jpg"', "Content-Type: image/jpeg\r\n", b"\r\n\x00--B\r\n--BBx"[:-5]),
        ('; name="json"', "Content-Type: application/json\r\n", b"[1]"),
        ('; name="charset"', "Content-Type: application/json; charset=utf-8\r\n", b"[1]"),
        ('; name="text"', "Content-Type: text/plain\r\n", "\u00fc".encode()),
        ('; name="plain"', "", b"x"),
        ('; name="empty"', "", b""),
    )
    row = {"data": bytearray(b"\r\n\x00--B\r\n"), "plain": bytearray(b"x"), "empty": bytearray()}
    typed = {"json": b"[1]", "charset": b"[1]", "text": "\u00fc".encode()}
    # Without a file name a part is bytes, whatever it is declared to be; pyserve's own handlers are given what it is.
    assert form(body) == row | typed
    assert form(body, is_built_in=True) == row | {"json": [1], "charset": [1], "text": "\u00fc"}
    files = body.replace(b'"\r\n', b'"; filename="f"\r\n')
    assert form(files) == row | {"json": [1], "charset": [1], "text": "\u00fc"}


def test_binary_content_with_line_breaks_and_dashes_survives() -> None:
    content = bytes(range(256)) * 50 + b"\r\n--B\r\n--\r\n\r\n-"
    assert form(multipart(('; name="f"', "", content))) == {"f": bytearray(content)}


def test_a_form_inside_a_form_is_several_files_of_one_name() -> None:
    head = "Content-Type: multipart/mixed; boundary=II\r\n"
    one, two = ('; filename="x"', "Content-Type: text/plain\r\n", b"1"), ('; filename="y"', "", b"2")
    assert form(multipart(('; name="f"', head, multipart(one, boundary="II")))) == {"f": "1"}
    with pytest.raises(BadRequestError, match="more than one field 'f'"):
        form(multipart(('; name="f"', head, multipart(one, two, boundary="II"))))
    empty = multipart(*[('; name="f"', head, b"--II--")] * 1001)
    with pytest.raises(TooLargeError):
        form(empty)


@pytest.mark.parametrize("before", [b"", b"\r\n", b"a preamble\r\n", b"a\r\n--B\r\n--BBx\r\n", b"\n\n"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_what_stands_around_the_parts_means_nothing(before: bytes, end: str) -> None:
    body = multipart(('; name="a"', "", b"1"), ('; name="b"', "", b"")).replace(b"\r\n", end.encode())
    for whole in (before + body, before + body.replace(b"--BB", b"--BB \t", 1), before + body + b"an epilogue"):
        assert form(whole) == {"a": bytearray(b"1"), "b": bytearray()}


def test_a_form_without_parts_has_no_fields() -> None:
    for body in (b"", b"\r\n", b"--BB--", b"--BB--\r\n"):
        assert form(body) == {}


def test_a_form_whose_boundary_is_not_told_is_a_body() -> None:
    types: dict[str, str] = {}
    request = Request("POST", "/", headers=[("Content-Type", "multipart/form-data")], body=bytearray(b"\xff\xd8"))
    assert codec.decode_request(request, types=types) == {"body": bytearray(b"\xff\xd8")}
    assert types == {"body": "multipart/form-data"}


def test_a_part_of_any_charset_or_disposition_is_served() -> None:
    text = "Content-Type: text/plain; charset=bogus\r\n"
    body = multipart(('; name="a"; filename="f"', text, b"1"), ('; name="b"', "", b"2"))
    for whole in (body, body.replace(b"form-data", b"attachment")):
        assert form(whole) == {"a": "1", "b": bytearray(b"2")}


def test_names_that_are_no_utf_8_are_shown_as_such() -> None:
    assert decoded(b"a%ff=1", FORM) == {"a\ufffd": bytearray(b"1")}
    assert form(multipart(('; name="a\xff"', "", b"1"))) == {"a\ufffd": bytearray(b"1")}
    with pytest.raises(BadRequestError, match="more than one field"):
        decoded(b"a%ff=1&a%fe=1", FORM)


def test_a_parts_headers_may_be_folded() -> None:
    body = multipart((';\r\n\tname="a";\r\n  filename="f"', "Content-Type:\r\n text/plain\r\n", b"1"))
    assert form(body) == {"a": "1"}


def test_of_a_parts_headers_the_last_of_a_name_counts() -> None:
    head = 'Content-Disposition: form-data; name="b"; filename="f"\r\nContent-Type: text/x\r\ncontent-type: text/y\r\n'
    assert form(multipart(('; name="a"', head, b"1"))) == {"b": "1"}


def broken_forms() -> Iterator[tuple[str, bytes, str, type[ServeError]]]:
    good = multipart(('; name="a"', "", b"1"))
    yield "empty boundary", good, "multipart/form-data; boundary=", BadRequestError
    yield "other boundary", good, "multipart/form-data; boundary=CC", BadRequestError
    yield "no end", multipart(('; name="a"', "", b"1"), end=False), "multipart/form-data; boundary=BB", BadRequestError
    yield "cut", good[:-6], "multipart/form-data; boundary=BB", BadRequestError
    yield "no name", multipart(("", "", b"1")), "multipart/form-data; boundary=BB", BadRequestError
    head = multipart(('; name="a"', f"X: {'x' * 9000}\r\n", b"1"))
    yield "big part head", head, "multipart/form-data; boundary=BB", BadRequestError
    many = multipart(*[('; name="a"', "", b"")] * 1001)
    yield "many parts", many, "multipart/form-data; boundary=BB", TooLargeError
    yield "many fields", b"a=1&" * 1000 + b"b=2", FORM, TooLargeError
    yield "very many fields", b"a=1&" * 100_000, FORM, TooLargeError


@pytest.mark.parametrize(
    ("body", "content_type", "error"), [row[1:] for row in broken_forms()], ids=[row[0] for row in broken_forms()]
)
def test_a_broken_form_is_the_clients_error(body: bytes, content_type: str, error: type[ServeError]) -> None:
    with pytest.raises(error) as caught:
        decoded(body, content_type)
    assert type(caught.value) is error and caught.value.message


def test_a_thousand_parts_and_fields_are_allowed() -> None:
    assert len(form(multipart(*[(f'; name="a{i}"', "", b"") for i in range(1000)]))) == 1000
    assert len(decoded("&".join(f"a{i}=1" for i in range(1000)).encode(), FORM)) == 1000


def test_an_urlencoded_form_is_one_key_per_field() -> None:
    body = b"a=1&b=x+y%20%26&empty=&flag&&k%C3%BC=%ff"
    assert decoded(body, FORM) == {
        "a": bytearray(b"1"),
        "b": bytearray(b"x y &"),
        "empty": bytearray(),
        "flag": bytearray(),
        "k\u00fc": bytearray(b"\xff"),
    }


def lossy_forms() -> Iterator[tuple[str, bytes, str, str]]:
    """What a handler could not be given as it was sent."""
    one, two = ('; name="data"', "", b"1"), ('; name="data"', "Content-Type: text/plain\r\n", b"2")
    kind = "multipart/form-data; boundary=BB"
    yield "parts of one name", multipart(one, two), kind, "more than one field 'data'"
    yield "equal parts", multipart(one, one), kind, "more than one field 'data'"
    yield "fields of one name", b"data=1&id=2&data=3", FORM, "more than one field 'data'"
    yield "spelled in two ways", b"data=1&d%61ta=3", FORM, "more than one field 'data'"
    yield "field without a name", b"a=1&=2", FORM, "no name"
    yield "parts after the end", multipart(one) + multipart(two), kind, "after its closing boundary"
    head = "Content-Transfer-Encoding: base64\r\n"
    yield (
        "encoded file",
        multipart(('; name="a"; filename="f"', head, b"MQ==")),
        kind,
        "Content-Transfer-Encoding 'base64'",
    )


@pytest.mark.parametrize(
    ("body", "content_type", "text"), [row[1:] for row in lossy_forms()], ids=[row[0] for row in lossy_forms()]
)
def test_a_form_that_would_lose_something_is_refused(body: bytes, content_type: str, text: str) -> None:
    with pytest.raises(BadRequestError, match=text):
        decoded(body, content_type)


def test_what_follows_the_end_of_a_form_and_says_nothing_is_left_out() -> None:
    head = "Content-Transfer-Encoding: binary\r\n"
    assert form(multipart(('; name="a"', head, b"1")) + b"\r\n-- \r\n") == {"a": bytearray(b"1")}


@pytest.mark.parametrize("query", ["data=2", "a=1&a=1", "a=1;a=2"])
def test_a_parameter_of_the_query_never_takes_anothers_place(query: str) -> None:
    with pytest.raises(BadRequestError, match="more than one field"):
        codec.add_query({"data": bytearray(b"1")}, query)


def test_odd_percent_signs_stay_as_they_are() -> None:
    assert decoded(b"a=%&b=%zz&c=%4", FORM) == {"a": bytearray(b"%"), "b": bytearray(b"%zz"), "c": bytearray(b"%4")}
    assert decoded(b"a=%", FORM) == {"a": bytearray(b"%")}
    assert decoded(b"a=%4%41%%42%4g%f", FORM) == {"a": bytearray(b"%4A%B%4g%f")}


def test_megabytes_of_percent_signs_are_bounded_work() -> None:
    assert decoded(b"a=" + b"%" * 6_000_000, FORM)["a"] == bytearray(b"%" * 6_000_000)
    assert decoded(b"a=" + b"%41" * 2_000_000, FORM)["a"] == bytearray(b"A" * 2_000_000)


@given(st.binary(max_size=60).filter(lambda text: b"&" not in text and b"=" not in text))
def test_percent_signs_mean_what_they_mean_to_urllib(text: bytes) -> None:
    for each in (text, text.replace(b"a", b"%4"), text.hex("%").encode()):
        assert decoded(b"a=" + each, FORM)["a"] == unquote_to_bytes(each.replace(b"+", b" "))


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1).filter(lambda text: text.isprintable()), st.text(), min_size=1))
def test_what_is_urlencoded_comes_back(fields: dict[str, str]) -> None:
    body = "&".join(f"{quote_plus(key)}={quote_plus(value)}" for key, value in fields.items())
    assert decoded(body.encode(), FORM) == {key: bytearray(value.encode()) for key, value in fields.items()}


@given(st.binary(max_size=300))
def test_any_bytes_sent_as_a_form_give_a_row_or_a_client_error(junk: bytes) -> None:
    whole = b"--BB\r\nContent-Disposition: form-data; name=a\r\n\r\n" + junk + b"\r\n--BB--"
    for body in (junk, b"--BB" + junk, whole):
        try:
            assert isinstance(form(body), dict)
        except (BadRequestError, TooLargeError):
            pass


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "body"),
    [
        (b"x", b"x"),
        (bytearray(b"x"), b"x"),
        ("gr\u00fc\u00df", "gr\u00fc\u00df".encode()),
        ("", b""),
        ({"a": [1, None]}, b'{\n  "a": [\n    1,\n    null\n  ]\n}'),
        (("\u00fc", True), b'[\n  "\\u00fc",\n  true\n]'),
        (None, b"null"),
        (1.5, b"1.5"),
        (float("nan"), b"NaN"),
    ],
)
def test_an_answer_is_encoded_as_torchserve_does(value: object, body: bytes) -> None:
    assert bytes(codec.encode_result(value)) == body


def test_a_tensor_answer_is_a_saved_tensor() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    loaded = torch.load(io.BytesIO(codec.encode_result(tensor)), weights_only=True)
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.float32), np.arange(6.0).reshape(2, 3)[:, ::2], np.zeros((0, 3)), np.array(1.5)]
)
def test_the_size_of_a_memoryview_is_counted_in_bytes(array: Any) -> None:
    body = codec.encode_result(memoryview(array))
    assert len(body) == array.nbytes
    assert bytes(body) == array.tobytes()


@pytest.mark.parametrize("value", [object(), {1, 2}, {"a": b"x"}, 1j, "\ud800", {(1, 2): 3}])
def test_what_cannot_be_encoded_is_the_handlers_error(value: object) -> None:
    with pytest.raises(HandlerError, match="Unsupported model output data type") as caught:
        codec.encode_result(value)
    assert caught.value.status == 503 and caught.value.detail["text"]


class Odd:
    """Asked what it is in JSON, it raises."""

    def __init__(self, error: BaseException):
        self.error = error

    def tolist(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("value", "exception", "text"),
    [
        ({"boxes": [{1, 2}]}, "TypeError", """a <class 'set'> at ["boxes"][0] cannot become JSON; convert it with"""),
        ([1, {"raw": b"x"}], "TypeError", """a <class 'bytes'> at [1]["raw"] cannot become JSON; convert"""),
        ({"by": {np.int64(1): 2}}, "TypeError", """a key of <class 'numpy.int64'> at ["by"] cannot become JSON; use"""),
        ([Odd(RuntimeError("no"))], "RuntimeError", "Odd'> at [0] cannot become JSON"),
        ("\ud800", "UnicodeEncodeError", "a str cannot become UTF-8"),
    ],
)  # fmt: skip
def test_the_error_names_the_place_in_the_result_and_the_mend(value: object, exception: str, text: str) -> None:
    with pytest.raises(HandlerError) as caught:
        codec.encode_result(value, lambda: None)
    assert caught.value.detail["exception"] == exception
    assert text in caught.value.detail["text"]


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(1)])
def test_what_says_nothing_about_the_result_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        codec.encode_result([Odd(error)])


def test_plain_json_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **options: calls.append(value) or dumps(value, **options))
    value = {"label": "cat", "boxes": [[1.0, 2.0]], "array": np.zeros(2)}
    codec.encode_result(value, lambda: None)
    assert calls == [value]


def test_an_answer_that_holds_itself_is_the_handlers_error() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(HandlerError):
        codec.encode_result(loop)
