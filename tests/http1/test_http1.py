"""Connections: order of answers, keep-alive, timeouts, flow control, draining, and the bytes of an answer."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import uuid
from typing import Any

import pytest

from pyserve.errors import ModelNotFoundError
from pyserve.http1 import body
from pyserve.http1.body import FIRST_SIZE_MIN
from pyserve.http1.connections import Connections
from pyserve.http1.direct import DIRECT_SIZE_MIN
from pyserve.http1.incoming import FEW_COUNT, FIRST_SIZE_OF_FEW
from pyserve.http1.limits import Http1Limits
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ExtraHeaders, Response
from tests.support.fakes import FakeLoop
from tests.support.http1_wire import Wire, echo, parse_answers, send_every_way

HOST = b"Host: a\r\n"
GET = b"GET /ping HTTP/1.1\r\n" + HOST + b"\r\n"
POST = b"POST /x HTTP/1.1\r\n" + HOST
HEAD_START = b"GET /ping HTTP/1.1\r\nHost:"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()


def post(body: bytes) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answering(response: Response) -> Wire:
    return Wire(lambda exchange: exchange.respond(response))


# order


def test_two_requests_in_one_segment_are_answered_in_order() -> None:
    wire = send_every_way(get("/1") + get("/2"))
    assert [answer.body for answer in wire.answers] == [b"GET /1", b"GET /2"]


def test_answers_given_out_of_order_go_out_in_order() -> None:
    wire = Wire(None).send(get("/1") + get("/2") + get("/3"))
    first, second, third = wire.exchanges
    third.respond(Response(200, b"3"))
    second.respond(Response(200, b"2"))
    assert wire.answers == []
    first.respond(Response(200, b"1"))
    assert [answer.body for answer in wire.answers] == [b"1", b"2", b"3"]


@pytest.mark.parametrize("name", ["Content-Type", "inference-header-content-length", "ts_request_sequence_id"])
def test_two_headers_that_ask_two_different_things_are_refused(name: str) -> None:
    lines = f"{name}: 1\r\n{name.lower()}: 2\r\n"
    wire = send_every_way(f"GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode())
    assert wire.answer.status == 400 and f"two different {name.lower()} headers" in wire.answer.body.decode().lower()
    same = Wire().send(f"GET / HTTP/1.1\r\nHost: a\r\n{name}: 1\r\n{name.lower()}: 1\r\n\r\n".encode())
    assert same.answer.status == 200


def test_request_is_given_to_the_app_only_when_complete() -> None:
    wire = Wire().send(post(b"abc")[:-1])
    assert wire.exchanges == []
    assert wire.send(b"c").answer.body == b"abc"


def test_second_answer_to_a_request_is_ignored() -> None:
    wire = Wire(None).send(GET)
    wire.exchanges[0].respond(Response(200, b"1"))
    wire.exchanges[0].respond(Response(200, b"2"))
    assert wire.answer.body == b"1"
    assert wire.exchanges[0].answered


def test_garbage_behind_an_unanswered_request_waits_for_its_answer() -> None:
    wire = Wire(None).send(GET + b"\x00garbage\r\n\r\n")
    assert wire.answers == []
    wire.exchanges[0].respond(Response(200, b"ok"))
    assert wire.statuses == [200, 400]
    assert [answer.headers["connection"] for answer in wire.answers] == ["keep-alive", "close"]
    assert wire.ended


def test_thousand_requests_on_one_connection_leave_one_timer() -> None:
    wire = Wire()
    for _ in range(1000):
        wire.send(GET)
    assert wire.statuses == [200] * 1000
    assert wire.loop.timer_count == 1


def test_thousand_pipelined_requests_stop_reading_at_the_limit_and_are_all_answered() -> None:
    wire = Wire(None)
    wire.send(b"".join(get(f"/{i}") for i in range(1000)))
    assert len(wire.exchanges) == wire.limits.pipeline_max == 32
    assert not wire.transport.reading
    for i in range(1000):
        assert len(wire.exchanges) - i <= 32
        wire.exchanges[i].respond(Response(200, b"%d" % i))
    assert [answer.body for answer in wire.answers] == [b"%d" % i for i in range(1000)]
    assert wire.transport.reading


def test_reading_stops_with_the_last_request_allowed_even_if_nothing_follows() -> None:
    wire = Wire(None, Http1Limits(pipeline_max=2)).send(GET + GET)
    assert not wire.transport.reading
    wire.exchanges[0].respond(Response())
    assert wire.transport.reading


# what a request carries


def test_request_has_target_headers_body_client_and_time() -> None:
    wire = Wire(None).send(
        b"POST /predictions/m%20x/?a=1&b HTTP/1.1\r\nHoSt: a\r\nX-B: 2 \t\r\nx-b:\r\nContent-Length: 2\r\n\r\nhi"
    )
    request = wire.exchanges[0].request
    assert (request.method, request.path, request.query) == ("POST", "/predictions/m x/", "a=1&b")
    assert request.segments == ("predictions", "m x")
    assert request.headers == [("HoSt", "a"), ("X-B", "2"), ("x-b", ""), ("Content-Length", "2")]
    assert (bytes(request.body), type(request.body)) == (b"hi", bytearray)
    assert request.client == "127.0.0.1:43090"
    assert request.arrived_at == wire.loop.monotonic_ns()


def test_equal_heads_do_not_share_headers() -> None:
    wire = Wire(None).send(GET + GET)
    first, second = (exchange.request for exchange in wire.exchanges)
    first.add_headers(ExtraHeaders(("x", "y")))
    assert first.headers == [("Host", "a"), ("x", "y")] and first.header("X") == "y"
    assert (first.header_text, second.header_text) == ("Host\na\nx\ny", "Host\na")
    assert second.headers == [("Host", "a")]


@pytest.mark.parametrize(("peername", "client"), [("", "unix"), (None, "unix"), (("::1", 80, 0, 0), "[::1]:80")])
def test_client_names_the_kind_of_socket(peername: Any, client: str) -> None:
    assert Wire(None, peername=peername).send(GET).exchanges[0].request.client == client


def test_size_on_the_wire_counts_head_body_and_framing() -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: y\r\n\r\n"
    wire = send_every_way(GET + chunked + post(b"abc"))
    assert [exchange.protocol_bytes for exchange in wire.exchanges] == [len(GET), len(chunked), len(post(b"abc"))]


@pytest.mark.parametrize("name", ["Transfer_Encoding", "Content_Length", "Authorization_", "X_Request_Id"])
def test_header_with_an_underscore_never_reaches_the_request(name: str) -> None:
    wire = send_every_way(b"GET / HTTP/1.1\r\nHost: a\r\n%s: 5\r\n\r\n" % name.encode())
    assert wire.exchanges[0].request.headers == [("Host", "a")]
    assert wire.answer.headers["x-request-id"] != "5"


def test_sequence_headers_keep_their_underscores() -> None:
    wire = Wire().send(b"GET / HTTP/1.1\r\nHost: a\r\nts_request_sequence_id: 5\r\n\r\n")
    assert wire.exchanges[0].request.header("ts_request_sequence_id") == "5"


def test_trailers_reach_neither_their_request_nor_the_next() -> None:
    wire = Wire().send(POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nAuthorization: x\r\n\r\n" + GET)
    assert [name for exchange in wire.exchanges for name, _ in exchange.request.headers] == [
        "Host", "content-length", "Host",
    ]  # fmt: skip
    assert wire.exchanges[0].request.header("Content-Length") == "0"


def test_a_chunked_bodys_size_is_told_and_what_only_the_wire_was_asked_is_not() -> None:
    """As TorchServe's handlers have it."""
    head = POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    (exchange,) = Wire().send(head + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n").exchanges
    assert exchange.request.headers == [("Host", "a"), ("content-length", "3")]
    assert exchange.request.header_text == "Host\na\ncontent-length\n3"


def test_host_of_an_absolute_target_replaces_the_header() -> None:
    wire = Wire().send(b"GET http://real:80/ HTTP/1.1\r\nHost: other\r\n\r\n")
    assert wire.exchanges[0].request.header("host") == "real:80"


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x", "identity, gzip", "Identity", "utf-8", ""])
def test_a_body_in_a_coding_arrives_as_it_was_sent(coding: str) -> None:
    request = POST + b"Content-Encoding: %s\r\nContent-Length: 3\r\n\r\nabc" % coding.encode()
    wire = send_every_way(request + GET)
    assert wire.statuses == [200, 200]
    first = wire.exchanges[0].request
    assert (first.header("content-encoding"), bytes(first.body)) == (coding, b"abc")


# keep-alive


@pytest.mark.parametrize(
    ("version", "lines", "kept"),
    [
        ("1.1", "", True),
        ("1.1", "Connection: close\r\n", False),
        ("1.1", "Connection: Close\r\n", False),
        ("1.1", "Connection: close, keep-alive\r\n", False),
        ("1.1", "Connection: keep-alive, close\r\n", False),
        ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", False),
        ("1.1", "Connection: close\r\nConnection: keep-alive\r\n", False),
        ("1.1", "Connection: x-closed\r\n", True),
        ("1.0", "", False),
        ("1.0", "Connection: keep-alive\r\n", True),
        ("1.0", "Connection: Keep-Alive\r\n", True),
        ("1.0", "Connection: close\r\n", False),
    ],
)
@pytest.mark.parametrize("body", [b"", b"abc"])
def test_connection_is_kept_as_the_client_asks(version: str, lines: str, kept: bool, body: bytes) -> None:
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    wire = send_every_way(f"POST / HTTP/{version}\r\nHost: a\r\n{lines}{length}\r\n".encode() + body)
    assert wire.answer.headers["connection"] == ("keep-alive" if kept else "close")
    assert wire.transport.closed is not kept


def test_http_1_0_needs_no_host() -> None:
    assert Wire().send(b"GET / HTTP/1.0\r\n\r\n").statuses == [200]


def test_requests_behind_the_last_one_are_not_served() -> None:
    wire = send_every_way(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET)
    assert wire.statuses == [200]
    assert len(wire.exchanges) == 1


def test_input_behind_the_last_request_does_not_cost_the_client_its_answer() -> None:
    wire = Wire(None).send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + GET)
    wire.exchanges[0].respond(Response())
    assert wire.transport.eof_written
    assert not wire.transport.closed
    assert wire.advance(2).transport.closed


@pytest.mark.parametrize("status", [400, 404, 500, 503, 507])
def test_connection_stays_open_after_an_application_error(status: int) -> None:
    wire = answering(Response(status, b"{}")).send(GET, GET)
    assert wire.statuses == [status, status]
    assert wire.answers[0].headers["connection"] == "keep-alive"


# Expect


def test_continue_is_sent_before_the_body_and_once() -> None:
    wire = Wire().send(POST + b"Expect: 100-Continue\r\nContent-Length: 3\r\n\r\n")
    assert wire.transport.output == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.send(b"a", b"bc", GET)
    assert wire.statuses == [100, 200, 200]


def test_continue_waits_for_the_answers_before_it() -> None:
    wire = Wire(None).send(GET + POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert wire.transport.output == b""
    wire.exchanges[0].respond(Response())
    assert wire.statuses == [200, 100]


def test_continue_is_sent_whatever_the_cut() -> None:
    assert send_every_way(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc").statuses == [100, 200]
    chunked = POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert send_every_way(chunked).statuses == [100, 200]


def test_no_continue_for_a_body_over_the_limit() -> None:
    wire = send_every_way(POST + b"Expect: 100-continue\r\nContent-Length: 6553501\r\n\r\n")
    assert wire.statuses == [413]
    assert wire.ended


def test_no_continue_for_http_1_0_or_an_empty_body() -> None:
    assert Wire().send(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\na").statuses == [200]
    assert Wire().send(POST + b"Expect: 100-continue\r\n\r\n").statuses == [200]


def test_no_continue_for_a_body_that_is_refused() -> None:
    limits = Http1Limits(body_budget_size=2)
    wire = Wire(limits=limits).send(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert wire.statuses == [503]
    assert wire.ended


def test_too_large_body_is_told_limit_and_size() -> None:
    answer = Wire().send(POST + b"Content-Length: 9000000\r\n\r\n").answer
    assert answer.json == {
        "code": 413,
        "type": "BadRequestException",
        "message": "Request body of 9000000 bytes is over the limit: max_request_size is 6553500 bytes. "
        "Send less, or raise max_request_size in config.properties.",
        "detail": {"max_request_size": 6553500, "request_size": 9000000, "request_id": answer.headers["x-request-id"]},
    }


# the bytes of an answer


def test_answer_has_its_headers_in_order() -> None:
    wire = answering(Response(200, b"{}", content_type="application/json", headers={"X-A": "1"}))
    wire.send(b"GET / HTTP/1.1\r\nHost: a\r\nx-request-id: my.id:1_-\r\n\r\n")
    assert wire.transport.output == (
        b"HTTP/1.1 200 OK\r\n"
        b"x-request-id: my.id:1_-\r\n"
        b"Pragma: no-cache\r\n"
        b"Cache-Control: no-cache; no-store, must-revalidate, private\r\n"
        b"Expires: Thu, 01 Jan 1970 00:00:00 UTC\r\n"
        b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        b"content-type: application/json\r\n"
        b"X-A: 1\r\n"
        b"content-length: 2\r\n"
        b"connection: keep-alive\r\n"
        b"\r\n{}"
    )
    assert len(wire.transport.writes) == 1


def test_answer_without_type_and_with_empty_reason() -> None:
    wire = answering(Response(200, b"x", reason="")).send(GET)
    assert wire.transport.output.startswith(b"HTTP/1.1 200 \r\n")
    assert "content-type" not in wire.answer.headers


@pytest.mark.parametrize(
    ("status", "reason", "line"),
    [(404, None, "404 Not Found"), (299, None, "299 "), (200, "Fine", "200 Fine"), (599, "", "599 ")],
)
def test_status_line(status: int, reason: str | None, line: str) -> None:
    wire = answering(Response(status, b"x", reason=reason)).send(GET)
    assert wire.transport.output.startswith(f"HTTP/1.1 {line}\r\n".encode())


def test_date_moves_with_the_clock() -> None:
    now = [0.0]
    connections = Connections(Http1Limits(), wall_clock=lambda: now[0])
    wire = Wire(connections=connections).send(GET)
    now[0] = 1.5
    wire.send(GET)
    dates = [answer.headers["date"] for answer in wire.answers]
    assert dates == ["Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:01 GMT"]


@pytest.mark.parametrize("id", ["", "a b", "a/b", "é", "x" * 129, "a\tb"])
def test_invalid_request_id_is_replaced_by_a_uuid(id: str) -> None:
    wire = Wire().send(b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + id.encode() + b"\r\n\r\n")
    fresh = wire.answer.headers["x-request-id"]
    assert uuid.UUID(fresh).version == 4
    assert wire.exchanges[0].request.id == fresh


def test_request_ids_do_not_repeat() -> None:
    wire = Wire().send(*[GET] * 600)
    ids = {answer.headers["x-request-id"] for answer in wire.answers}
    assert len(ids) == 600
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", id) for id in ids)


def test_head_is_answered_with_the_length_and_no_content() -> None:
    wire = answering(Response(200, b"hello"))
    wire.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    (answer,) = parse_answers(wire.transport.output, bodyless=True)
    assert answer.headers["content-length"] == "5"
    assert wire.transport.output.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("status", [204, 304])
def test_status_without_content_has_neither_body_nor_length(status: int) -> None:
    wire = answering(Response(status, b"dropped")).send(GET, GET)
    assert [answer.status for answer in wire.answers] == [status, status]
    assert "content-length" not in wire.answers[0].headers
    assert "date" in wire.answers[0].headers


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_big_body_is_written_without_a_copy(kind: Any) -> None:
    body = kind(b"x" * 100_000)
    wire = answering(Response(200, body)).send(GET)
    _, written = wire.transport.writes
    assert isinstance(written, memoryview)
    assert len(written) == 100_000
    assert wire.answer.headers["content-length"] == "100000"


@pytest.mark.parametrize("body", [b"", bytearray(b"abc"), memoryview(b"abcdef")[::2], memoryview(b"abcd").cast("I")])
def test_body_may_be_any_buffer(body: Any) -> None:
    wire = answering(Response(200, body)).send(GET)
    if isinstance(body, memoryview) and not body.contiguous:
        assert wire.statuses == [500]
    else:
        assert wire.answer.body == bytes(body)


@pytest.mark.parametrize(
    "response",
    [
        Response(headers={"X": "a\r\nSet-Cookie: b"}),
        Response(headers={"X": "a\nb"}),
        Response(headers={"X": "a\x00"}),
        Response(headers={"X": "\u20ac"}),
        Response(headers={"X\r\n": "a"}),
        Response(headers={"X Y": "a"}),
        Response(headers={"": "a"}),
        Response(headers={"X": 1}),
        Response(content_type="a/b\r\nX: y"),
        Response(content_type="\u20ac"),
        Response(reason="OK\r\nX: y"),
        Response(status=99),
        Response(status=100),
        Response(status=600),
        Response(status="200"),
        Response(body="text"),
    ],
)
def test_answer_that_is_not_http_is_replaced_by_a_500(response: Response, caplog: pytest.LogCaptureFixture) -> None:
    wire = answering(response).send(GET, GET)
    assert wire.statuses == [500, 500]
    assert wire.answers[0].json == {
        "code": 500,
        "type": "InternalServerException",
        "message": "Internal server error; the server's log has the reason.",
        "detail": {"request_id": wire.answers[0].headers["x-request-id"]},
    }
    assert "set-cookie" not in wire.answers[0].headers
    assert "cannot be sent" in caplog.text


def test_framing_headers_of_a_handler_are_dropped() -> None:
    names = ("Content-Length", "transfer-encoding", "Connection", "DATE", "Keep-Alive", "Upgrade", "x-request-id")
    wire = answering(Response(200, b"abc", headers=dict.fromkeys(names, "7") | {"X": "y"})).send(GET, GET)
    assert [line for line in wire.answers[0].lines if line.endswith(": 7")] == []
    assert wire.answers[0].headers["x"] == "y"
    assert wire.answers[1].body == b"abc"


def test_handler_headers_take_the_place_of_the_common_ones() -> None:
    headers = {"cache-control": "max-age=9", "Content-Type": "a/b"}
    answer = answering(Response(200, b"", headers=headers)).send(GET).answer
    assert [line for line in answer.lines if "ache" in line] == ["Pragma: no-cache", "cache-control: max-age=9"]
    assert answer.headers["content-type"] == "a/b"
    answer = answering(Response(200, b"", content_type="c/d", headers=headers)).send(GET).answer
    assert [line for line in answer.lines if "ontent-type" in line] == ["content-type: c/d"]


def test_app_that_raises_is_answered_with_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def app(exchange: Exchange) -> None:
        raise RuntimeError("secret")

    with caplog.at_level(logging.ERROR, "pyserve.http1"):
        wire = Wire(app).send(GET, GET)
    assert wire.statuses == [500, 500]
    assert wire.answers[0].json["type"] == "InternalServerException"
    assert b"secret" not in wire.transport.output
    assert "secret" in caplog.text


def test_app_may_raise_an_error_that_has_an_answer() -> None:
    def app(exchange: Exchange) -> None:
        raise ModelNotFoundError("Model not found: m")

    answer = Wire(app).send(GET).answer
    assert (answer.status, answer.json["message"]) == (404, "Model not found: m")


def test_refusals_name_methods_and_are_counted() -> None:
    wire = Wire().send(b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert wire.answer.headers["allow"] == "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH"
    assert wire.protocol._connections.refused == {405: 1}


# the client goes away


def test_disconnect_is_told_once_to_each_unanswered_request() -> None:
    told: list[str] = []

    def app(exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: told.append(exchange.request.path)

    wire = Wire(app).send(get("/1") + get("/2") + get("/3"))
    wire.exchanges[1].respond(Response())
    wire.transport.lose(ConnectionResetError())
    assert told == ["/1", "/3"]
    wire.exchanges[0].respond(Response())
    wire.transport.lose()
    assert told == ["/1", "/3"]
    assert wire.exchanges[0].disconnected
    assert wire.transport.output == b""
    assert wire.loop.timer_count == 0


def test_failing_disconnect_callback_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def app(exchange: Exchange) -> None:
        def disconnected() -> None:
            told.append(exchange.request.path)
            raise ZeroDivisionError

        exchange.on_disconnect = disconnected

    Wire(app).send(get("/1") + get("/2")).transport.lose()
    assert told == ["/1", "/2"]
    assert "ZeroDivisionError" in caplog.text


def test_half_closed_client_still_gets_its_answers() -> None:
    wire = Wire(None).send(GET + GET).send_eof()
    assert not wire.transport.closed
    for exchange in wire.exchanges:
        exchange.respond(Response())
    assert [answer.headers["connection"] for answer in wire.answers] == ["keep-alive", "close"]
    assert wire.transport.closed


def test_client_that_sends_nothing_and_leaves_gets_nothing() -> None:
    wire = Wire().send_eof()
    assert wire.transport.output == b""
    assert wire.transport.closed


@pytest.mark.parametrize("part", [HEAD_START, post(b"abc")[:-1], POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nab"])
def test_half_a_request_is_answered_and_never_served(part: bytes) -> None:
    wire = Wire().send(part).send_eof()
    assert wire.statuses == [400]
    assert wire.answer.cause == "the connection ended within a request"
    assert wire.exchanges == []
    assert wire.transport.closed


# the client is slow


def test_slow_head_is_cut_off_counted_from_its_first_byte() -> None:
    wire = Wire()
    wire.advance(60)
    for _ in range(9):
        wire.send(b"G" if not wire.protocol._partial else b"E")
        wire.advance(1.1)
    assert not wire.ended
    wire.advance(0.2)
    assert wire.statuses == [408]
    assert wire.transport.closed


def test_idle_connection_is_closed_with_no_bytes() -> None:
    wire = Wire(limits=Http1Limits(idle_timeout_s=2)).advance(1).send(GET).advance(1.9)
    assert not wire.ended
    written = len(wire.transport.output)
    wire.advance(0.2)
    assert wire.transport.closed
    assert len(wire.transport.output) == written


def test_empty_lines_do_not_keep_a_connection_alive() -> None:
    wire = Wire(limits=Http1Limits(idle_timeout_s=2))
    for _ in range(5):
        wire.send(b"\r\n").advance(0.5)
    assert wire.transport.closed
    assert wire.transport.output == b""


def test_long_request_is_never_cut_off() -> None:
    wire = Wire(None).send(GET).advance(10_000)
    wire.exchanges[0].respond(Response())
    assert wire.statuses == [200]
    assert not wire.ended
    assert wire.advance(76).transport.closed


def test_body_that_never_comes_is_cut_off() -> None:
    wire = Wire().send(post(b"abc")[:-3]).advance(10.1)
    assert wire.statuses == [408]
    assert wire.transport.closed


def test_body_below_the_rate_is_cut_off_after_the_grace() -> None:
    wire = Wire().send(POST + b"Content-Length: 100000\r\n\r\n")
    for _ in range(20):
        wire.send(b"x" * 400).advance(1)
    assert not wire.ended  # 10 s of grace and 8000 bytes at 500 bytes/s: until 26 s
    for _ in range(40):
        wire.send(b"x" * 400).advance(1)
    assert wire.statuses == [408]


def test_body_above_the_rate_goes_on_as_long_as_it_takes() -> None:
    wire = Wire().send(POST + b"Content-Length: 60000\r\n\r\n")
    for _ in range(100):
        wire.advance(1).send(b"x" * 600)
    assert wire.statuses == [200]


def test_body_that_pauses_is_cut_off_however_much_came_before() -> None:
    wire = Wire().send(POST + b"Content-Length: 2000000\r\n\r\n" + b"x" * 1_000_000).advance(29)
    assert not wire.ended
    assert wire.advance(1.1).statuses == [408]


def test_reading_stops_while_the_client_does_not_read() -> None:
    body = bytes(40_000)
    wire = answering(Response(200, body))
    wire.transport.stalled = True
    wire.send(b"".join([GET] * 10))
    assert len(wire.exchanges) == 2  # the second answer passed 64 KiB
    assert not wire.transport.reading
    wire.transport.take(1_000_000)
    while len(wire.exchanges) < 10:
        wire.transport.take(1_000_000)
    wire.transport.take(1_000_000)
    assert [answer.body for answer in wire.answers] == [body] * 10
    assert wire.transport.reading
    assert not wire.ended


def test_answers_wait_while_the_client_does_not_read() -> None:
    wire = Wire(None)
    wire.transport.stalled = True
    wire.send(GET + GET + GET)
    for exchange in wire.exchanges:
        exchange.respond(Response(200, bytes(70_000)))
    assert len(parse_answers(wire.transport.output)) == 1
    wire.transport.take(200_000)
    assert len(parse_answers(wire.transport.output)) == 2


def test_client_that_does_not_read_is_cut_off() -> None:
    wire = answering(Response(200, bytes(100_000)))
    wire.transport.stalled = True
    wire.send(GET).advance(29)
    assert not wire.transport.closed
    wire.advance(1.1)
    assert wire.transport.aborted
    assert wire.loop.timer_count == 0


def test_client_that_reads_slowly_is_kept_and_one_that_reads_a_trickle_is_not() -> None:
    wire = answering(Response(200, bytes(100_000)))
    wire.transport.stalled = True
    wire.send(GET).advance(29)
    wire.transport.take(20_000)
    wire.advance(29)
    assert not wire.transport.closed
    wire.transport.take(10)
    assert wire.advance(2).transport.aborted


def test_client_that_does_not_read_its_last_answer_is_cut_off() -> None:
    wire = answering(Response(200, b"x"))
    wire.transport.stalled = True
    wire.send(b"GET / HTTP/1.0\r\n\r\n")
    assert wire.transport.closed
    assert wire.advance(31).transport.aborted


# lingering close


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 100000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n5f5e100\r\n"]
)
def test_refused_upload_is_read_on_so_that_the_client_can_read_why(framing: bytes) -> None:
    wire = Wire().send(POST + framing)
    for _ in range(300):
        wire.send(bytes(256 * 1024))
    assert wire.statuses == [413]
    assert wire.transport.eof_written
    assert not wire.transport.closed
    assert wire.send_eof().transport.closed


def test_lingering_ends_after_its_time() -> None:
    wire = Wire().send(b"nonsense\r\n\r\n")
    assert wire.transport.eof_written
    wire.advance(1.9)
    assert not wire.transport.closed
    assert wire.advance(0.2).transport.closed


def test_lingering_ends_after_its_bytes() -> None:
    wire = Wire().send(b"nonsense\r\n\r\n", bytes(256 * 1024))
    assert not wire.transport.closed
    assert wire.send(b"x").transport.closed


def test_flood_behind_the_last_request_is_not_read_for_ever() -> None:
    wire = Wire(None).send(b"GET / HTTP/1.0\r\n\r\n")
    while wire.transport.reading:
        wire.send(bytes(64 * 1024))
    wire.exchanges[0].respond(Response())
    assert wire.statuses == [200]
    assert wire.transport.closed


# what connections share


def test_a_parting_listener_answers_everything_and_says_that_each_connection_ends() -> None:
    connections = Connections(Http1Limits())
    idle, busy, streaming = (Wire(None, connections=connections) for _ in range(3))
    idle.send(GET)
    idle.exchanges[0].respond(Response())
    busy.send(GET + GET)
    streaming.send(GET)
    connections.part()
    fresh = Wire(None, connections=connections)
    for wire in (idle, fresh):
        wire.advance(60)
        assert not wire.ended
    for exchange in busy.exchanges:
        exchange.respond(Response())
    assert [answer.headers["connection"] for answer in busy.answers] == ["keep-alive", "close"]
    streaming.exchanges[0].start_stream(Response(200, b"part"))
    streaming.exchanges[0].end_stream()
    assert b"connection: close" in streaming.transport.output
    for wire in (idle, fresh):
        wire.send(GET)
        wire.exchanges[-1].respond(Response())
        assert wire.answers[-1].headers["connection"] == "close"
    for wire in (idle, fresh, busy, streaming):
        assert wire.transport.eof_written and not wire.transport.closed
        wire.send_eof()
        assert wire.transport.closed
    assert len(connections) == 0


def test_a_streamed_answer_that_began_before_the_listener_parts_is_its_connection_s_last() -> None:
    connections = Connections(Http1Limits())
    wire = Wire(None, connections=connections).send(GET)
    wire.exchanges[0].start_stream(Response(200, b"part"))
    connections.part()
    assert not wire.ended
    wire.exchanges[0].end_stream()
    assert wire.ended


def test_a_full_pipeline_that_is_answered_at_once_loses_nothing_when_the_listener_parts() -> None:
    connections = Connections(Http1Limits(pipeline_max=2))
    wire = Wire(None, limits=Http1Limits(pipeline_max=2), connections=connections).send(GET * 3)
    assert len(wire.exchanges) == 2 and not wire.transport.reading
    connections.part()
    wire.exchanges[1].respond(Response())
    wire.exchanges[0].respond(Response())
    wire.exchanges[2].respond(Response())
    assert [answer.headers["connection"] for answer in wire.answers] == ["keep-alive", "keep-alive", "close"]


def test_drain_closes_idle_connections_once_they_are_quiet_and_busy_ones_after_their_answer() -> None:
    async def scene() -> None:
        connections = Connections(Http1Limits())
        idle, busy, receiving, fresh = (Wire(None, connections=connections) for _ in range(4))
        idle.send(GET)
        idle.exchanges[0].respond(Response())
        busy.send(GET + GET)
        receiving.send(post(b"abc")[:-1])
        draining = asyncio.ensure_future(connections.drain())
        await asyncio.sleep(0)
        for wire in (idle, fresh):
            wire.advance(wire.limits.quiet_s - 0.01)
            assert not wire.ended
            wire.advance(0.02)
            assert wire.transport.eof_written and not wire.transport.closed
            wire.send(GET)  # it crossed ours: not answered, and no reset either, so that the client sees an end
            assert not wire.transport.closed and len(wire.answers) == (wire is idle)
            wire.advance(wire.limits.parting_linger_s)
            assert wire.transport.closed and not wire.transport.aborted
        assert not busy.ended
        busy.exchanges[0].respond(Response())
        busy.exchanges[1].respond(Response())
        assert [answer.headers["connection"] for answer in busy.answers] == ["keep-alive", "close"]
        busy.send_eof()
        await asyncio.sleep(0)
        assert not draining.done()
        receiving.send(b"c")
        receiving.exchanges[0].respond(Response())
        assert receiving.answer.headers["connection"] == "close"
        receiving.send_eof()
        await draining
        assert len(connections) == 0

    asyncio.run(scene())


def test_drain_closes_a_connection_at_once_that_was_quiet_before() -> None:
    connections = Connections(Http1Limits())
    wire = Wire(connections=connections).send(GET)
    wire.advance(10)
    connections.start_drain()
    wire.advance(0)
    assert wire.ended


def test_a_request_on_a_connection_that_is_about_to_be_closed_is_answered() -> None:
    connections = Connections(Http1Limits())
    wires = [Wire(connections=connections).send(GET), Wire(connections=connections)]
    connections.start_drain()
    for wire in wires:
        wire.advance(wire.limits.quiet_s / 2)
        wire.send(GET)
        assert wire.answers[-1].headers["connection"] == "close" and wire.ended


@pytest.mark.parametrize("drains", [False, True])
def test_an_idle_connection_whose_request_is_still_with_the_kernel_is_not_closed(drains: bool) -> None:
    connections = Connections(Http1Limits())
    wire = Wire(None, connections=connections)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.transport._extra["socket"] = ours
        theirs.sendall(GET)
        if drains:
            connections.start_drain()
        wire.advance(wire.limits.idle_timeout_s)
        assert not wire.ended
        wire.send(ours.recv(1000))
        wire.exchanges[0].respond(Response())
        assert wire.answer.headers["connection"] == ("close" if drains else "keep-alive")
        assert wire.ended == drains


def test_drain_of_no_connection_returns() -> None:
    asyncio.run(Connections(Http1Limits()).drain())


def test_a_connection_that_was_accepted_before_the_port_closed_is_served() -> None:
    connections = Connections(Http1Limits())
    connections.start_drain()
    wire = Wire(connections=connections).send(GET)
    assert wire.statuses == [200] and wire.answer.headers["connection"] == "close"
    late = Wire(connections=connections)
    late.advance(late.limits.quiet_s)
    assert late.ended


def test_abort_cuts_off_busy_connections() -> None:
    connections = Connections(Http1Limits())
    wire = Wire(None, connections=connections).send(GET)
    connections.abort()
    assert wire.transport.aborted


def test_one_connection_too_many_is_refused_and_room_is_made_at_once() -> None:
    limits = Http1Limits(connection_count_max=2)
    connections = Connections(limits)
    loop = FakeLoop()
    first, _, third = (Wire(limits=limits, connections=connections, loop=loop) for _ in range(3))
    assert third.statuses == [503]
    assert third.answer.headers["retry-after"] == "1"
    assert third.send(GET).ended
    assert third.exchanges == []
    first.transport.lose()
    fourth = Wire(limits=limits, connections=connections, loop=loop).send(GET)
    assert fourth.statuses == [200]


def test_refused_connections_do_not_pile_up() -> None:
    limits = Http1Limits(connection_count_max=1)
    connections = Connections(limits)
    wires = [Wire(limits=limits, connections=connections) for _ in range(200)]
    assert sum(wire.transport.aborted for wire in wires) == 200 - 1 - 128


def test_body_over_the_budget_is_refused_on_its_head_and_the_connection_kept() -> None:
    budget = BodyBudget(100)
    connections = Connections(Http1Limits(), budget)
    holder = Wire(None, connections=connections).send(post(bytes(60)))
    wire = Wire(echo, connections=connections).send(post(bytes(50)) + GET)
    assert wire.statuses == [503, 200]
    assert wire.answers[0].headers["retry-after"] == "1"
    assert wire.answers[0].json["type"] == "ServiceUnavailableException"
    assert len(wire.exchanges) == 1
    holder.exchanges[0].respond(Response())
    assert budget.size == 0
    assert wire.send(post(bytes(50))).statuses == [503, 200, 200]


def test_bodies_that_are_announced_and_not_sent_cost_nothing() -> None:
    budget = BodyBudget(1 << 20)
    connections = Connections(Http1Limits(), budget)
    idle = [Wire(None, connections=connections).send(post(bytes(1 << 20))[:-1048576]) for _ in range(50)]
    assert budget.size == 0 and not any(wire.protocol._incoming.body.content for wire in idle)
    assert Wire(connections=connections).send(post(bytes(1 << 20))).statuses == [200]
    idle[0].send(b"x")
    assert budget.size == 1 and len(idle[0].protocol._incoming.body.content) <= FIRST_SIZE_OF_FEW
    idle[0].send(bytes((1 << 20) - 1))
    assert budget.size == 1 << 20 and bytes(idle[0].exchanges[0].request.body[:2]) == b"x\0"
    assert len(idle[0].exchanges[0].request.body) == 1 << 20


@pytest.mark.parametrize("is_large", [False, True])
def test_a_body_that_is_over_the_budget_when_it_comes_is_refused_and_the_connection_kept(is_large: bool) -> None:
    size = 2 * DIRECT_SIZE_MIN if is_large else 100
    budget = BodyBudget(size)
    connections = Connections(Http1Limits(), budget)
    first, second = (Wire(connections=connections).send(post(bytes(size))[:-size]) for _ in range(2))
    first.send(bytes(size - 1))
    second.send(bytes(size // 2))
    assert budget.size == size - 1 and second.statuses == []
    second.send(bytes(size - size // 2) + GET)
    assert second.statuses == [503, 200] and len(second.exchanges) == 1
    assert first.send(b"x").statuses == [200]
    assert budget.size == 0


def test_a_body_that_gives_way_to_another_address_is_refused_and_its_connection_kept() -> None:
    size = 2 * DIRECT_SIZE_MIN
    budget = BodyBudget(size)
    connections = Connections(Http1Limits(), budget)
    fat = Wire(connections=connections, peername=("10.0.0.1", 1)).send(post(bytes(size))[:-size], bytes(size - 1))
    assert budget.size == size - 1
    thin = Wire(connections=connections, peername=("10.0.0.2", 1)).send(post(bytes(500)))
    assert thin.statuses == [200] and budget.size == 0
    assert fat.send(b"x" + GET).statuses == [503, 200]
    assert len(fat.exchanges) == 1


def test_many_bodies_on_their_way_get_little_memory_each() -> None:
    connections = Connections(Http1Limits())
    wires = [Wire(None, connections=connections).send(post(bytes(3 << 20))[: -3 << 20]) for _ in range(FEW_COUNT + 1)]
    assert connections.budget.coming_count == FEW_COUNT + 1
    for wire in wires:
        wire.send(b"x")
    sizes = [len(wire.protocol._incoming.body.content) for wire in wires]
    assert sizes == [FIRST_SIZE_OF_FEW] * FEW_COUNT + [FIRST_SIZE_MIN]
    wires[-1].send(bytes(FIRST_SIZE_MIN), bytes(3 * (1 << 20) - FIRST_SIZE_MIN - 1))
    assert len(wires[-1].exchanges[0].request.body) == 3 << 20
    for wire in wires:
        wire.transport.lose()
    assert (connections.budget.coming_count, connections.budget.size) == (0, 0)


def test_a_body_for_which_there_is_no_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError

    for name in ("_uncleared", "_resize"):
        with monkeypatch.context() as patch:
            wire = Wire()
            sent = post(bytes(3 * FIRST_SIZE_OF_FEW)) + GET
            patch.setattr(body, name, fail)
            wire.send(sent[:100], sent[100:])
            assert wire.statuses == [503, 200] and wire.answers[0].json["detail"]["reason"] == "memory"
            assert wire.connections is not None and wire.connections.budget.size == 0


def test_a_request_without_a_body_is_answered_however_full_the_budget_is() -> None:
    budget = BodyBudget(100)
    budget.size = 200  # messages of gRPC are in memory before they are counted
    wire = Wire(connections=Connections(Http1Limits(), budget)).send(GET + post(b""))
    assert wire.statuses == [200, 200]


def test_chunked_body_over_the_budget_is_refused_and_not_kept() -> None:
    budget = BodyBudget(100)
    connections = Connections(Http1Limits(), budget)
    chunks = POST + b"Transfer-Encoding: chunked\r\n\r\n" + (b"20\r\n" + bytes(32) + b"\r\n") * 5 + b"0\r\n\r\n"
    wire = send_every_way(chunks + GET, connections=connections)
    assert wire.statuses == [503, 200]
    assert budget.size == 0


def test_budget_is_given_back_however_a_request_ends() -> None:
    budget = BodyBudget(1000)
    connections = Connections(Http1Limits(), budget)
    Wire(None, connections=connections).send(post(bytes(9))).transport.lose()
    Wire(None, connections=connections).send(post(bytes(9))[:-1]).transport.lose()
    Wire(None, connections=connections).send(post(bytes(9))[:-1]).advance(31)
    Wire(None, connections=connections).send(post(bytes(9))[:-1]).send_eof()
    Wire(None, connections=connections).send(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\naz")
    lost = Wire(None, connections=connections).send(post(bytes(9)))
    lost.transport.lose()
    lost.exchanges[0].respond(Response())
    assert budget.size == 0
