"""Answers in a coding: only for clients that ask for it, only where it is worth it, and without blocking the loop."""

from __future__ import annotations

import asyncio
import gzip
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyserve.http1 import compression
from pyserve.http1.compression import QUICK_SIZE_MAX, Compression
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request import zstandard
from pyserve.request.accept import accepted
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from tests.support.http1_wire import Wire

TEXT = b'{"words": ["one", "two", "three"]}\n' * 150
LONG = TEXT * 40
assert 4096 < len(TEXT) < QUICK_SIZE_MAX < len(LONG)


def answered(
    response: Response, accept: str | None = "gzip", *, method: str = "POST", size_min: int = 4096
) -> tuple[Response, bool]:
    """What leaves, and whether it left later."""
    headers = [] if accept is None else [("Accept-Encoding", accept)]
    later: list[Response] = []

    async def ask() -> tuple[Response, bool]:
        done = asyncio.Event()

        def deliver(exchange: Exchange) -> None:
            assert exchange.response is not None
            later.append(exchange.response)
            done.set()

        exchange = Exchange(Request(method, "/", headers=headers), deliver)
        exchange.answered, exchange.response = True, response
        with ThreadPoolExecutor(1) as pool:
            if Compression(pool, size_min).take(exchange, deliver):
                assert exchange.response is None
                await done.wait()
                return later[0], True
        assert exchange.response is not None and not later
        return exchange.response, False

    return asyncio.run(ask())


def unpacked(response: Response) -> bytes:
    coding = response.headers.get("content-encoding", "")
    body = b"".join((response.body, *response.tail))
    if coding == "gzip":
        return gzip.decompress(body)
    if coding == "deflate":
        return zlib.decompress(body)
    return zstandard.zstd.decompress(body) if coding == "zstd" else body


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("gzip", "gzip"), ("deflate", "deflate"), ("GZip", "gzip"), ("x-gzip", "gzip"), ("gzip, deflate", "gzip"),
        ("gzip;q=0.2, deflate;q=0.5", "deflate"), ("deflate, gzip;q=0", "deflate"), ("gzip ; q=1.0", "gzip"),
        ("gzip;q=0", ""), ("gzip;q=0.000, deflate;q=0", ""), ("identity", ""), ("identity, gzip;q=0.5", ""),
        ("br", ""), ("", ""), (",;,", ""), ("gzip;q=2", ""), ("gzip;q=x", ""), ("gzip;q=-1", ""), ("*;q=0", ""),
        ("identity;q=0, gzip", "gzip"), ("identity;q=0", ""), (None, ""), ("x" * 5000 + ", gzip", ""),
    ],
)  # fmt: skip
def test_the_client_decides_by_its_weights(header: str | None, coding: str) -> None:
    response, _ = answered(Response(200, TEXT), header)
    assert response.headers.get("content-encoding", "") == coding and unpacked(response) == TEXT
    assert response.headers["vary"] == "Accept-Encoding"


def test_a_star_is_every_coding_there_is() -> None:
    response, _ = answered(Response(200, TEXT), "gzip;q=0.5, *")
    assert response.headers["content-encoding"] in ("zstd", "deflate") and unpacked(response) == TEXT


def test_headers_of_one_name_are_read_together() -> None:
    request = Request("GET", "/", headers=[("Accept-Encoding", "br"), ("x", "y"), ("accept-encoding", "gzip;q=0.5")])
    assert accepted(request, "accept-encoding") == {"br": 1.0, "gzip": 0.5}


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_small_answers_leave_as_they_are(size: int) -> None:
    response = Response(200, b"a" * size)
    assert answered(response) == (response, False) and response.headers == {}


@pytest.mark.parametrize("body", [TEXT, LONG, bytearray(LONG), memoryview(LONG)])
def test_long_answers_are_compressed_beside_the_loop(body: Any) -> None:
    response, is_later = answered(Response(201, body, content_type="application/json", reason="Made"))
    assert is_later == (len(body) > QUICK_SIZE_MAX)
    assert (response.status, response.content_type, response.reason) == (201, "application/json", "Made")
    assert unpacked(response) == bytes(body) and len(response.body) < len(body) // 5


def test_all_parts_of_a_body_are_compressed_as_one() -> None:
    numbers = memoryview(bytearray(40_000)).cast("f")
    whole = Response(200, b'{"a": 1}', headers={"Inference-Header-Content-Length": "8"})
    whole.tail = [numbers, b"", b"end"]
    response, _ = answered(whole, "deflate")
    assert unpacked(response) == b'{"a": 1}' + bytes(40_000) + b"end"
    assert response.headers["Inference-Header-Content-Length"] == "8" and not response.tail


def test_what_hardly_becomes_smaller_leaves_as_it_is() -> None:
    for size in (5000, 200_000):
        body = os.urandom(size)
        response, _ = answered(Response(200, body))
        assert "content-encoding" not in response.headers and response.body == body


@pytest.mark.parametrize(
    ("status", "content_type", "headers"),
    [
        (206, None, {}), (200, "image/png", {}), (200, "video/mp4; codecs=x", {}), (200, "application/zip", {}),
        (200, None, {"Content-Type": "image/jpeg"}), (200, None, {"Content-Encoding": "br"}),
        (200, None, {"ETag": '"1"'}), (200, None, {"Cache-Control": "max-age=1, no-transform"}),
    ],
)  # fmt: skip
def test_what_must_not_be_changed_is_not(status: int, content_type: str | None, headers: dict[str, str]) -> None:
    response = Response(status, TEXT, content_type=content_type, headers=headers)
    assert answered(response)[0] is response and response.headers == headers and response.body == TEXT


def test_vector_graphics_are_text() -> None:
    assert answered(Response(200, TEXT, content_type="image/svg+xml"))[0].headers["content-encoding"] == "gzip"


def test_an_answer_to_head_has_no_body_to_compress() -> None:
    response = Response(200, TEXT)
    assert answered(response, method="HEAD")[0] is response


@pytest.mark.parametrize(
    ("given", "sent"),
    [("Origin", "Origin, Accept-Encoding"), ("*", "*"), ("accept-encoding", "accept-encoding")],
)
def test_what_the_answer_depends_on_is_added(given: str, sent: str) -> None:
    response, _ = answered(Response(200, TEXT, headers={"Vary": given}))
    assert [value for name, value in response.headers.items() if name.lower() == "vary"] == [sent]


def test_a_pool_that_is_shut_or_fails_costs_the_compression_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parts: Any, coding: str) -> bytes:
        raise MemoryError

    monkeypatch.setattr(compression, "_compress", fail)
    response, is_later = answered(Response(200, LONG))
    assert is_later and response.body == LONG and "content-encoding" not in response.headers

    async def shut() -> None:
        pool = ThreadPoolExecutor(1)
        pool.shutdown()
        exchange = Exchange(Request("GET", "/", headers=[("Accept-Encoding", "gzip")]), lambda exchange: None)
        exchange.response = Response(200, LONG)
        assert not Compression(pool, 1).take(exchange, lambda exchange: None)
        assert exchange.response is not None and exchange.response.body == LONG

    asyncio.run(shut())


def test_nothing_is_delivered_to_a_client_that_has_gone() -> None:
    async def go() -> None:
        delivered: list[Exchange] = []
        exchange = Exchange(Request("GET", "/", headers=[("Accept-Encoding", "gzip")]), delivered.append)
        exchange.answered, exchange.response = True, Response(200, LONG)
        with ThreadPoolExecutor(1) as pool:
            assert Compression(pool, 1).take(exchange, delivered.append)
            exchange.disconnect()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not delivered and exchange.response is None

    asyncio.run(go())


def test_on_the_wire_answers_keep_their_order_and_their_length() -> None:
    """The first of two pipelined answers is compressed in a thread, the second is there at once."""

    async def ask() -> list[bytes]:
        bodies = iter([LONG, b"short"])
        with ThreadPoolExecutor(1) as pool:
            connections = Connections(Http1Limits(), compression=Compression(pool, 4096))
            wire = Wire(lambda exchange: exchange.respond(Response(200, next(bodies))), connections=connections)
            wire.send(b"GET / HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n" * 2)
            assert wire.answers == []
        await asyncio.sleep(0)  # the thread has ended, and what it called the loop for comes next
        first, second = wire.answers
        assert first.headers["content-encoding"] == "gzip" and int(first.headers["content-length"]) == len(first.body)
        assert "content-encoding" not in second.headers
        return [gzip.decompress(first.body), second.body]

    assert asyncio.run(ask()) == [LONG, b"short"]
