"""Errors that the protocol itself answers: in the form of the API that the path belongs to."""

from __future__ import annotations

import pytest

from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request.messages import ErrorFormat
from tests.support.http1_wire import Wire

HOST_AND_SIZE = b"Host: a\r\nContent-Length: 3\r\n\r\n"


@pytest.mark.parametrize(
    ("vector", "status"),
    [
        (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n", 413),
        (b"POST %s HTTP/1.1\r\nHost: a\r\nExpect: x\r\nContent-Length: 1\r\n\r\n", 417),
        (b"POST %s HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"POST %s HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (b"POST %s HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (b"POST %s?" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"POST %s HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"TRACE %s HTTP/1.1\r\nHost: a\r\n\r\n", 405),
        (b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", 400),
        (b"POST %s HTTP/1.1\nHost: a\n\n", 400),
    ],
)
@pytest.mark.parametrize("piece_size", [1_000_000, 1000])
def test_the_protocols_own_errors_speak_the_protocol_of_the_path(vector: bytes, status: int, piece_size: int) -> None:
    for path, speaks in ((b"/v2/models/m/infer", True), (b"/v1/models/m:predict", True), (b"/predictions/m", False)):
        data = vector % path
        pieces = [data[at : at + piece_size] for at in range(0, len(data), piece_size)]
        answer = Wire().send(*pieces).answer
        assert answer.status == status
        assert answer.json.get("error") == (answer.json["message"] if speaks else None)


@pytest.mark.parametrize(
    "asked", [b"GET /v2/models HTTP/1.1\r\nHost: a\r\n", b"POST /v2/x HTTP/1.1\r\n" + HOST_AND_SIZE]
)
def test_a_client_that_is_too_slow_is_told_in_the_form_of_the_path(asked: bytes) -> None:
    wire = Wire().send(asked)
    wire.advance(60)
    assert wire.answer.status == 408
    assert wire.answer.json["error"] == wire.answer.json["message"]


def test_too_many_bodies_are_told_in_the_form_of_the_path() -> None:
    wire = Wire(limits=Http1Limits(body_budget_size=2))
    assert wire.send(b"POST /v2/x HTTP/1.1\r\n" + HOST_AND_SIZE + b"abc").answer.status == 503
    assert wire.answer.json["error"] == wire.answer.json["message"]


def test_strict_errors_have_torchserves_keys_only() -> None:
    plain = ErrorFormat(with_detail=False, kserve_versions=("v2",))
    connections = Connections(Http1Limits(), error_format=plain)
    for path, keys in (("/predictions/m", []), ("/v1/models/m:predict", []), ("/v2/models/m/infer", ["error"])):
        wire = Wire(connections=connections).send(f"POST {path} HTTP/1.1\r\nHost: a, b\r\n\r\n".encode())
        assert [*wire.answer.json] == ["code", "type", "message", *keys]
