"""Heads of requests and answers, there and back."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from pyserve.fronts import wire
from pyserve.fronts.channel import RubbishError
from pyserve.http1.answer import AnswerWriter
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ExtraHeaders, Request, Response, SharedHeaders

LATER = 2**62


def there_and_back(request: Request, listener: int = 0, is_http11: bool = True) -> tuple[Request, int, int, bool]:
    exchange = Exchange(request, lambda each: None, protocol_bytes=77)
    exchange.is_http11 = is_http11
    head = wire.RequestWriter().head(exchange, listener)
    return wire.RequestReader(3).read(head, request.body, LATER)


@pytest.mark.parametrize(
    "request_",
    [
        Request("GET", "/ping", id="a-1", client="unix"),
        Request("OPTIONS", "*", id="x", client="[::1]:80", headers=[("Host", "")]),
        Request("POST", "/predictions/straße ünï\ufffd", query="a=1&b=%0A", id="A.b:c_d-9", client="10.0.0.1:65535",
                headers=[("X-Own", "é\xff"), ("x-own", ""), ("Accept", "a, b")], body=bytearray(b"\0\1"),
                arrived_at=123456789),
        Request("PUT", "/models/m", id="t", client="unix", headers=[("X-Request-Timeout-Ms", "5")]),
    ],
)  # fmt: skip
def test_a_request_arrives_as_it_was(request_: Request) -> None:
    came, listener, wire_size, is_http11 = there_and_back(request_, 2, is_http11=False)
    names = "method path query headers header_text body client id arrived_at has_timing params segments"
    for name in names.split():
        assert getattr(came, name) == getattr(request_, name), name
    assert (listener, wire_size, is_http11) == (2, 77, False)
    assert came.header("x-OWN") == request_.header("x-own")


def test_what_the_protocol_adds_to_a_request_arrives_too() -> None:
    request = Request("POST", "/p", id="x", client="unix", headers=[("a", "b")])
    request.add_headers(ExtraHeaders(("content-length", "12")))
    assert there_and_back(request)[0].headers == [("a", "b"), ("content-length", "12")]


def test_nothing_arrived_in_the_future() -> None:
    request = Request("GET", "/", id="x", client="unix", arrived_at=LATER + 1)
    assert there_and_back(request)[0].arrived_at == LATER


@pytest.mark.parametrize(
    "head",
    [
        b"", bytes(17), bytes(18), bytes(18) + b"id\nclient", bytes(18) + b"id\nclient\nGET\n/",
        bytes(18) + b"id\nclient\nGET\n/\n\nname", bytes(18) + b"id\nclient\nGET\n/\n\n\xff\nvalue",
        bytes(18) + b"no id\nclient\nGET\n/\n\n", bytes(18) + b"\nclient\nGET\n/\n\n",
        bytes(18) + b"id\n" + b"c" * 129 + b"\nGET\n/\n\n", bytes(16) + b"\3\1id\nclient\nGET\n/\n\n",
    ],
)  # fmt: skip
def test_a_head_that_no_front_end_writes_is_told_apart(head: bytes) -> None:
    with pytest.raises(RubbishError):
        wire.RequestReader(3).read(head, bytearray(), LATER)


class Odd:
    """No text."""


@pytest.mark.parametrize(
    "response",
    [
        Response(200, b"x"),
        Response(200, b"x", content_type="application/json", reason=""),
        Response(404, b"", headers={"Retry-After": "1", "X-Own": "é"}),
        Response(200, b"", headers=SharedHeaders({"a": "b"})),
        Response(200, b"", headers={"bad\nname": "x"}),
        Response(200, b"", headers={"name": "bad\r\nvalue"}),
        Response(200, b"", headers={"name": Odd()}),  # type: ignore[dict-item]
        Response(200, b"", headers={Odd(): "x"}),  # type: ignore[dict-item]
        Response(200, b"", content_type=Odd()),  # type: ignore[arg-type]
        Response(200, b"", reason=[]),  # type: ignore[arg-type]
        Response(200, b"", content_type="\ud800"),
    ],
)  # fmt: skip
def test_an_answer_leaves_as_it_would_have_without_a_front_end(response: Response) -> None:
    request = Request("GET", "/", id="x")
    came = wire.read_answer(response.status, wire.answer_head(response), bytes(response.body))
    wanted: Any = AnswerWriter(lambda: 0.0).encode(response, request, True)
    assert AnswerWriter(lambda: 0.0).encode(came, request, True) == wanted
    assert wire.read_answer(200, wire.answer_head(response), b"").content_type == came.content_type


@pytest.mark.parametrize("head", [b"", b"{}", b"[1]", b"[null, null, true, [1]]", b"\xff", b"[null,null,false,3]"])
def test_an_answer_that_the_engine_cannot_have_sent_is_told_apart(head: bytes) -> None:
    with pytest.raises(RubbishError):
        wire.read_answer(200, head, b"")


def test_a_hello_has_the_size_that_it_is_read_with() -> None:
    assert struct.calcsize(wire.HELLO.format) == 38
