"""What the pinned httptools says to raw bytes, by itself.

The server is built on these verdicts. A version that accepts more, or reads something else, must be looked at before it
is taken: compare the table with what ``pyserve.http1.head`` and ``pyserve.http1.body`` check themselves.
"""

from __future__ import annotations

from importlib.metadata import version

import httptools
import pytest

GET = b"GET / HTTP/1.1\r\n"
HOST = b"Host: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


class Recorder:
    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.completed = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_message_complete(self) -> None:
        self.completed += 1


def verdict(data: bytes) -> str:
    recorder = Recorder()
    parser = httptools.HttpRequestParser(recorder)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        return "upgrade"
    except httptools.HttpParserInvalidMethodError:
        return "bad method"
    except httptools.HttpParserInvalidURLError:
        return "bad target"
    except httptools.HttpParserError:
        return "refused"
    return "accepted" if recorder.completed else "waits"


TABLE = {
    # refused by httptools: the server leans on these
    GET + b"X : a\r\n\r\n": "refused",
    GET + b"X: a\r\n b\r\n\r\n": "refused",
    GET + b" X: a\r\n\r\n": "refused",
    GET + b": a\r\n\r\n": "refused",
    GET + b"X\r\n\r\n": "refused",
    GET + b"X[1]: a\r\n\r\n": "refused",
    GET + b"X\xe9: a\r\n\r\n": "refused",
    GET + b"X\x00: a\r\n\r\n": "refused",
    GET + b"X: a\x00b\r\n\r\n": "refused",
    GET + b"X: a\x01b\r\n\r\n": "refused",
    GET + b"X: a\x7fb\r\n\r\n": "refused",
    GET + b"X: a\rb\r\n\r\n": "refused",
    GET + b"X: a\nY: b\r\n\r\n": "refused",
    b"GET / HTTP/1.1\nHost: a\n\n": "refused",
    b"GET / HTTP/1.2\r\n\r\n": "refused",
    b"GET / HTTP/01.1\r\n\r\n": "refused",
    b"GET / http/1.1\r\n\r\n": "refused",
    b"GET /\xc3\xa9 HTTP/1.1\r\n\r\n": "bad target",
    b"GET /\x00 HTTP/1.1\r\n\r\n": "bad target",
    b"FOO / HTTP/1.1\r\n\r\n": "bad method",
    b"get / HTTP/1.1\r\n\r\n": "bad method",
    b" GET / HTTP/1.1\r\n\r\n": "bad method",
    b"\x16\x03\x01\x02\x00": "bad method",
    POST + b"Content-Length: +3\r\n\r\nabc": "refused",
    POST + b"Content-Length: -3\r\n\r\nabc": "refused",
    POST + b"Content-Length: 0x3\r\n\r\nabc": "refused",
    POST + b"Content-Length: 1_0\r\n\r\nabc": "refused",
    POST + b"Content-Length: 1 0\r\n\r\nabc": "refused",
    POST + b"Content-Length:\r\n\r\nabc": "refused",
    POST + b"Content-Length: 3,3\r\n\r\nabc": "refused",
    POST + b"Content-Length: 36893488147419103233\r\n\r\n": "refused",
    POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc": "refused",
    POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n": "refused",
    POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n": "refused",
    CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n": "refused",
    CHUNKED + b" 3\r\nabc\r\n0\r\n\r\n": "refused",
    CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n": "refused",
    CHUNKED + b"3\nabc\r\n0\r\n\r\n": "refused",
    CHUNKED + b"3\r\nabcde\r\n0\r\n\r\n": "refused",
    CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n": "refused",
    # accepted by httptools: the server refuses or mends these itself
    GET + b"\r\n": "accepted",
    GET + HOST + HOST + b"\r\n": "accepted",
    GET + b"Host:\r\n\r\n": "accepted",
    GET + b"Host: a, b\r\n\r\n": "accepted",
    b"GET / HTTP/0.9\r\n\r\n": "accepted",
    b"GET / HTTP/2.0\r\n\r\n": "accepted",
    b"DESCRIBE / RTSP/1.0\r\n\r\n": "accepted",
    b"SOURCE / ICE/1.0\r\n\r\n": "accepted",
    b"GET * HTTP/1.1\r\n\r\n": "accepted",
    b"GET /a#b HTTP/1.1\r\n\r\n": "accepted",
    b"GET  / HTTP/1.1\r\n\r\n": "accepted",
    b"GET /%00 HTTP/1.1\r\n\r\n": "accepted",
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n": "accepted",
    POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n": "accepted",
    POST + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n": "accepted",
    POST + b"Content-Length: 18446744073709551615\r\n\r\n": "waits",
    CHUNKED + b"FFFFFFFFFFFFFFFF\r\n": "waits",
    CHUNKED + b"0" * 5000 + b"\r\n\r\n": "accepted",
    CHUNKED + b"0;" + b"e" * 65536 + b"\r\n\r\n": "accepted",
    GET + b"X: 1\r\n" * 20_000 + b"\r\n": "accepted",
    GET + b"X: " + b"v" * 5_000_000 + b"\r\n\r\n": "accepted",
    b"GET /" + b"a" * 5_000_000 + b" HTTP/1.1\r\n\r\n": "accepted",
    GET + b"X_Y: a\r\n\r\n": "accepted",
    GET + b"Connection: upgrade\r\nUpgrade: x\r\n\r\n": "upgrade",
    b"CONNECT x:80 HTTP/1.1\r\n\r\n": "upgrade",
    b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n" + GET: "refused",
    b"\r\n\r\n" + GET + b"\r\n": "accepted",
}


def test_pinned_version_is_installed() -> None:
    assert version("httptools") == "0.9.0"


@pytest.mark.parametrize(("data", "expected"), TABLE.items(), ids=[repr(data[:60]) for data in TABLE])
def test_parser_says_what_it_said_when_it_was_chosen(data: bytes, expected: str) -> None:
    assert verdict(data) == expected


def test_trailers_are_told_as_headers() -> None:
    recorder = Recorder()
    httptools.HttpRequestParser(recorder).feed_data(CHUNKED + b"0\r\nX: y\r\n\r\n")
    assert (b"X", b"y") in recorder.headers


def test_spaces_behind_a_value_are_left_to_the_server() -> None:
    recorder = Recorder()
    httptools.HttpRequestParser(recorder).feed_data(GET + b"X: a \t\r\n\r\n")
    assert recorder.headers == [(b"X", b"a \t")]


def test_header_without_a_value_does_not_run_into_the_next() -> None:
    recorder = Recorder()
    httptools.HttpRequestParser(recorder).feed_data(GET + b"X:\r\nY: b\r\n\r\n")
    assert recorder.headers == [(b"X", b""), (b"Y", b"b")]
