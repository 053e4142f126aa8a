"""CORS headers, on every answer as it is written: the app's, the protocol's own, whole ones and those in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyserve.config.config import Config
from pyserve.errors import ServerError
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response, SharedHeaders
from pyserve.security.cors import Cors
from tests.support.http1_wire import Answer, Wire, echo

UI = Config(cors_allowed_origin="https://ui.example", cors_allowed_methods="GET, PUT", cors_allowed_headers="X-A")
LINES = [
    "access-control-allow-origin: https://ui.example",
    "access-control-allow-methods: GET, PUT",
    "access-control-allow-headers: X-A",
]


def wire(app: Callable[[Exchange], None] = echo, config: Config = UI) -> Wire:
    limits = Http1Limits(body_size_max=10)
    connections = Connections(limits, decorate=Cors(config).add, wall_clock=lambda: 0.0)
    return Wire(app, limits, connections)


def get(app: Callable[[Exchange], None] = echo, config: Config = UI, head: str = "", method: str = "GET") -> Answer:
    connection = wire(app, config).send(f"{method} /x HTTP/1.1\r\nHost: h\r\n{head}\r\n".encode())
    (answer,) = connection.answers
    return answer


def test_their_lines_follow_those_of_the_answer() -> None:
    answer = get(lambda exchange: exchange.respond(Response(200, b"x", content_type="a/b", headers={"X-Own": "1"})))
    at = answer.lines.index("X-Own: 1")
    assert answer.lines[at + 1 : at + 4] == LINES and answer.lines[at + 4] == "content-length: 1"


def answer_with(headers: dict[str, str]) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.respond(Response(200, headers=headers))


def fail(exchange: Exchange) -> None:
    raise ServerError("no")


def break_down(exchange: Exchange) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("app", "request_bytes", "status"),
    [
        (echo, b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n", 200),
        (fail, b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n", 500),
        (break_down, b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n", 500),
        (echo, b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 11\r\n\r\n", 413),
        (echo, b"GET /x NONSENSE\r\n\r\n", 400),
    ],
)
def test_they_are_on_every_answer(app: Callable[[Exchange], None], request_bytes: bytes, status: int) -> None:
    (answer,) = wire(app).send(request_bytes).answers
    assert answer.status == status
    assert [line for line in answer.lines if line.startswith("access-control-")] == LINES


def test_they_are_on_answers_whose_heads_are_alike() -> None:
    """Heads that repeat within a second are kept; with CORS each may differ by its request's origin."""
    several = Config(cors_allowed_origin="http://a.example, http://b.example")
    shared = SharedHeaders({"X-Own": "1"})
    alike: list[dict[str, str]] = [{}, shared]
    for headers in alike:
        connection = wire(answer_with(headers), several)
        for origin in ("http://a.example", "http://b.example", "http://c.example"):
            connection.send(f"GET /x HTTP/1.1\r\nHost: h\r\nOrigin: {origin}\r\n\r\n".encode())
        told = [answer.headers.get("access-control-allow-origin") for answer in connection.answers]
        assert told == ["http://a.example", "http://b.example", None]
        assert [answer.headers["vary"] for answer in connection.answers] == ["Origin"] * 3
    assert dict(shared) == {"X-Own": "1"}


def test_they_are_on_the_head_of_an_answer_in_parts() -> None:
    def stream(exchange: Exchange) -> None:
        exchange.start_stream(Response(200, b"a"))
        exchange.end_stream(b"b")

    connection = wire(stream).send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
    head, _, parts = connection.transport.output.partition(b"\r\n\r\n")
    assert [line for line in head.decode().split("\r\n") if line.startswith("access-control-")] == LINES
    assert parts == b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n"


def test_what_the_answer_says_itself_stays() -> None:
    own = {"Access-Control-Allow-Origin": "https://other.example"}
    answer = get(answer_with(own))
    assert [line for line in answer.lines if "rigin" in line] == ["Access-Control-Allow-Origin: https://other.example"]


def test_an_answer_that_cannot_be_written_is_replaced() -> None:
    """Also when it is the name of a header that cannot: the connection gets an answer, whatever a handler sets."""
    wrong: dict[Any, str] = {1: "x"}
    assert get(answer_with(wrong)).status == 500


def test_an_endpoint_hears_of_a_client_that_goes_away() -> None:
    gone: list[str] = []

    def wait(exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: gone.append(exchange.request.path)

    connection = wire(wait).send(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
    connection.protocol.connection_lost(None)
    assert gone == ["/x"] and connection.exchanges[0].disconnected


@pytest.mark.parametrize(
    ("allowed", "origin", "shown", "varies"),
    [
        ("*", "http://a.example", "*", False),
        ("http://a.example", "http://b.example", "http://a.example", False),  # as it stands, as in TorchServe
        ("http://a.example, http://b.example/", "HTTP://B.example", "http://b.example/", True),
        ("http://a.example,http://b.example", "http://c.example", "", True),
        ("http://a.example,http://b.example", "", "", True),
        ("http://a.example, *", "http://c.example", "http://c.example", True),
        (" , ", "http://a.example", "", False),
    ],
)
def test_one_of_several_origins_gets_its_own_back(allowed: str, origin: str, shown: str, varies: bool) -> None:
    config = Config(cors_allowed_origin=allowed)
    head = f"Origin: {origin}\r\n" if origin else ""
    answer = get(config=config, head=head)
    assert answer.headers.get("access-control-allow-origin", "") == shown
    assert answer.headers.get("vary", "") == ("Origin" if varies else "")
    kept = get(answer_with({"Vary": "Accept"}), config, head)
    assert kept.headers["vary"] == ("Accept, Origin" if varies else "Accept")


def test_configuration_without_cors_adds_no_headers() -> None:
    assert not Cors(Config())
