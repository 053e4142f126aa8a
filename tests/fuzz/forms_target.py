"""Forms: the content type, a line feed, and the body. Fields are pieces of the body, or the form is refused."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from pyserve.errors import BadRequestError, TooLargeError
from pyserve.request.codec import add_query, decode_request
from pyserve.request.forms import PARTS_MAX, boundary_of, read_multipart, read_urlencoded
from pyserve.request.messages import Request


def check(data: bytes) -> None:
    told, _, body = data.partition(b"\n")
    content_type = told.decode("latin-1")
    request = Request("POST", "/predictions/m", headers=[("Content-Type", content_type)], body=bytearray(body))
    for lenient in (False, True):
        try:
            decode_request(request, lenient=lenient, types={}, is_built_in=not lenient)
            row = decode_request(request, decode=False, lenient=lenient)
            add_query(row, body.decode("latin-1"), types={}, lenient=lenient)
        except (BadRequestError, TooLargeError) as error:
            assert len(error.message) < 1000
    _check_multipart(bytearray(body), content_type)
    _check_urlencoded(body)


def _check_multipart(body: bytearray, content_type: str) -> None:
    if not boundary_of(content_type):
        return
    for lenient in (False, True):
        try:
            fields = read_multipart(body, content_type, lenient=lenient)
        except (BadRequestError, TooLargeError):
            continue
        assert len(fields) <= PARTS_MAX
        at = 0
        for field in fields:
            assert field.name
            at = body.find(field.value, at)
            assert at >= 0, f"the value of {field.name!r} is not in the body, or before that of another field"
            at += len(field.value)


def _check_urlencoded(body: bytes) -> None:
    try:
        fields = read_urlencoded(body)
    except (BadRequestError, TooLargeError):
        return
    pairs = [pair.partition(b"=") for pair in body.split(b"&") if pair]
    expected = [_unquoted(value) for _, _, value in pairs]
    assert [bytes(field.value) for field in fields] == expected, "other values than urllib finds"
    assert [field.name for field in fields] == [_unquoted(name).decode("utf-8", "replace") for name, _, _ in pairs]


def _unquoted(text: bytes) -> bytes:
    return unquote_to_bytes(text.replace(b"+", b" "))
