"""Request framing. Each vector is sent whole, byte by byte and cut in two everywhere, always with the same verdict."""

from __future__ import annotations

import os
import random

import pytest

from pyserve.http1.limits import Http1Limits
from tests.support.http1_wire import Wire, send_every_way

HOST = b"Host: a\r\n"
GET = b"GET /ping HTTP/1.1\r\n" + HOST
POST = b"POST /x HTTP/1.1\r\n" + HOST
LAST = b"0\r\n\r\n"
UPGRADE = POST + b"Connection: upgrade\r\nUpgrade: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = Http1Limits(line_size_max=64, head_size_max=200, header_count_max=4, body_size_max=20, chunk_count_max=5)


def line(request_line: bytes) -> bytes:
    return request_line + b"\r\n" + HOST + b"\r\n"


REFUSED = {
    # Host
    "two Hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "two equal Hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "Host with a list": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "Host with a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "Host with a user": (b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    "two Hosts in HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    # version
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/0.9 named": (line(b"GET / HTTP/0.9"), 505),
    "HTTP/1.2": (line(b"GET / HTTP/1.2"), 505),
    "HTTP/2.0": (line(b"GET / HTTP/2.0"), 505),
    "h2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "RTSP": (line(b"DESCRIBE / RTSP/1.0"), 400),
    "ICE": (line(b"SOURCE / ICE/1.0"), 400),
    "version with a zero": (line(b"GET / HTTP/01.1"), 400),
    "version in lower case": (line(b"GET / http/1.1"), 400),
    # method
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", 405),
    "TRACE": (line(b"TRACE / HTTP/1.1"), 405),
    "trace": (line(b"trace / HTTP/1.1"), 405),
    "no token": (line(b"F@O / HTTP/1.1"), 400),
    "method of 40 letters": (line(b"G" * 40 + b" / HTTP/1.1"), 400),
    "TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    # target
    "GET *": (line(b"GET * HTTP/1.1"), 400),
    "authority form": (line(b"GET a:80 HTTP/1.1"), 400),
    "two spaces": (line(b"GET  / HTTP/1.1"), 400),
    "space in target": (line(b"GET /a b HTTP/1.1"), 400),
    "tab for space": (line(b"GET\t/ HTTP/1.1"), 400),
    "encoded NUL": (line(b"GET /a%00 HTTP/1.1"), 400),
    "encoded CRLF": (line(b"GET /a%0d%0ab HTTP/1.1"), 400),
    "broken percent": (line(b"GET /a%zz HTTP/1.1"), 400),
    "bare LF after the request line": (b"GET / HTTP/1.1\nHost: a\n\n", 400),
    "NUL in target": (line(b"GET /\x00 HTTP/1.1"), 400),
    "DEL in target": (line(b"GET /\x7f HTTP/1.1"), 400),
    "URL without host": (line(b"GET http:///a HTTP/1.1"), 400),
    "URL with user": (line(b"GET http://u@h/a HTTP/1.1"), 400),
    "https-like scheme": (line(b"GET ftp://h/a HTTP/1.1"), 400),
    # header lines
    "space before the request": (b" " + GET + b"\r\n", 400),
    "bare CR before the request": (b"\r" + GET + b"\r\n", 400),
    "NUL in a value": (GET + b"X: a\x00b\r\n\r\n", 400),
    "control in a value": (GET + b"X: a\x01b\r\n\r\n", 400),
    "CR in a value": (GET + b"X: a\rb\r\n\r\n", 400),
    "bare LF in the head": (GET + b"X: a\nY: b\r\n\r\n", 400),
    "bare LF at the end of the head": (GET + b"X: a\r\n\n", 400),
    "bare LFs in a head that does not end": (GET + b"X: a\n\n", 400),
    "bare LF after empty lines": (b"\r\n\r\n" + GET + b"\n", 400),
    # Host
    **{
        f"Host {host!r}": (b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 400)
        for host in (b"a:99999", b"a:65536", b"a:0065536", b"a:-1", b"a:b", b"[::1]:65536", b"[:::]", b"[1]", b"a b")
    },
    "URL with a port that is none": (line(b"GET http://h:65536/ HTTP/1.1"), 400),
    "NUL in a name": (GET + b"X\x00: a\r\n\r\n", 400),
    "DEL in a name": (GET + b"X\x7f: a\r\n\r\n", 400),
    "space before the colon": (GET + b"X : a\r\n\r\n", 400),
    "folded line of white space": (GET + b"X: a\r\n\t\r\n\r\n", 400),
    "line of white space": (GET + b"\t\r\n\r\n", 400),
    "folded line": (GET + b"X: a\r\n b\r\n\r\n", 400),
    "space before the first header": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "empty name": (GET + b": a\r\n\r\n", 400),
    "no colon": (GET + b"X\r\n\r\n", 400),
    "brackets in a name": (GET + b"X[1]: a\r\n\r\n", 400),
    "non-ASCII name": (GET + b"X\xe9: a\r\n\r\n", 400),
    # framing
    "length and chunked": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST + GET, 400),
    "chunked and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + LAST + GET, 400),
    **{
        f"Content-Length {value!r}": (POST + b"Content-Length: " + value + b"\r\n\r\nabc", 400)
        for value in (b"+3", b"-3", b"-0", b"0x3", b"1_0", b"1 0", b"", b"36893488147419103233", b"3,3", b"3,4", b"3;")
    },
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "two equal lengths": (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
    "length 2^64-1": (POST + b"Content-Length: 18446744073709551615\r\n\r\nabc", 413),
    **{
        f"Transfer-Encoding {value!r}": (POST + b"Transfer-Encoding: " + value + b"\r\n\r\n0\r\n\r\n", status)
        for value, status in (
            (b"chunked, gzip", 400), (b"chunked, chunked", 400), (b"identity", 400), (b"xchunked", 400),
            (b"chunkedx", 400), (b"", 400), (b"\x0bchunked", 400), (b"\x00chunked", 400), (b'"chunked"', 400),
            (b"chunked;a=b", 400), (b"gzip, chunked", 501), (b",chunked", 400),
            (b"chunked\t,", 400), (b"chunked\x0b", 400), (b"chunked\x0c ", 400), (b"chun ked", 400),
        )
    },
    "two Transfer-Encodings": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST, 400),
    "chunked in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked and length in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400,
    ),
    "upgrade with length and chunked": (
        POST + b"Connection: upgrade\r\nUpgrade: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
    ),
    # chunks
    **{
        f"chunk size {value!r}": (CHUNKED + value + b"\r\nabc\r\n0\r\n\r\n", 400)
        for value in (b"0x3", b"0_3", b"+3", b"-1", b" 3", b"3 ", b"", b"00000000000000003", b"3;", b"3;a=\x00",
                      b"3;a=\rb", b"3;=b", b"3;a b")
    },
    "endless chunk": (CHUNKED + b"FFFFFFFFFFFFFFFF\r\nabc", 413),
    "chunk of 2^63-1": (CHUNKED + b"7FFFFFFFFFFFFFFF\r\nabc", 413),
    "chunk without CRLF": (CHUNKED + b"3\r\nabc0\r\n\r\n", 400),
    "chunk that spills": (CHUNKED + b"3\r\nabcde\r\n0\r\n\r\n", 400),
    "bare LF after a size": (CHUNKED + b"3\nabc\r\n0\r\n\r\n", 400),
    "bare LF after a chunk": (CHUNKED + b"3\r\nabc\n0\r\n\r\n", 400),
    "length in a trailer": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
    "Host in a trailer": (CHUNKED + b"0\r\nHost: b\r\n\r\n", 400),
    "no colon in a trailer": (CHUNKED + b"0\r\nX\r\n\r\n", 400),
    # what the client asks for
    "Expect x": (POST + b"Expect: x\r\nContent-Length: 3\r\n\r\n", 417),
}  # fmt: skip

# name: (bytes, what the app must see as (method, path, body))
SERVED = {
    "plain": (GET + b"\r\n", ("GET", "/ping", b"")),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", ("GET", "/", b"")),
    "empty Host": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", ("GET", "/", b"")),
    "FOO": (line(b"FOO / HTTP/1.1"), ("FOO", "/", b"")),
    "M-SEARCH": (line(b"M-SEARCH / HTTP/1.1"), ("M-SEARCH", "/", b"")),
    "method in lower case": (line(b"post / HTTP/1.1"), ("post", "/", b"")),
    "fragment": (line(b"GET /a#b?c HTTP/1.1"), ("GET", "/a", b"")),
    "non-ASCII path": (line(b"GET /\xc3\xa9 HTTP/1.1"), ("GET", "/é", b"")),
    "not UTF-8": (line(b"GET /%ff HTTP/1.1"), ("GET", "/\ufffd", b"")),
    "OPTIONS *": (line(b"OPTIONS * HTTP/1.1"), ("OPTIONS", "*", b"")),
    "URL": (line(b"GET http://h:80/ping?a=1 HTTP/1.1"), ("GET", "/ping", b"")),
    "URL without path": (line(b"GET http://h HTTP/1.1"), ("GET", "/", b"")),
    "two slashes": (line(b"GET //ping HTTP/1.1"), ("GET", "//ping", b"")),
    "encoded dots": (line(b"GET /%2e%2e/x HTTP/1.1"), ("GET", "/../x", b"")),
    "decoded once": (line(b"GET /%2541 HTTP/1.1"), ("GET", "/%41", b"")),
    "UTF-8 path": (line(b"GET /%c3%a9 HTTP/1.1"), ("GET", "/é", b"")),
    "empty lines first": (b"\r\n\r\n" + GET + b"\r\n", ("GET", "/ping", b"")),
    "Host with port": (b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n\r\n", ("GET", "/", b"")),
    "body": (POST + b"Content-Length: 3\r\n\r\nabc", ("POST", "/x", b"abc")),
    "GET with body": (GET + b"Content-Length: 3\r\n\r\nabc", ("GET", "/ping", b"abc")),
    "OPTIONS with body": (b"OPTIONS / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", ("OPTIONS", "/", b"abc")),
    "no length": (POST + b"\r\n", ("POST", "/x", b"")),
    "length with zeros": (POST + b"Content-Length: 003\r\n\r\nabc", ("POST", "/x", b"abc")),
    "body that looks like a request": (POST + b"Content-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n",
                                       ("POST", "/x", b"GET / HTTP/1.1\r\n\r\n")),
    "chunked": (CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", ("POST", "/x", b"abcde")),
    "chunked with extensions": (CHUNKED + b'3;a;b=c;d="e\\"f"\r\nabc\r\n0;x\r\n\r\n', ("POST", "/x", b"abc")),
    "chunked with trailers": (CHUNKED + b"3\r\nabc\r\n0\r\nX: y\r\nAuthorization: z\r\n\r\n", ("POST", "/x", b"abc")),
    **{
        f"Transfer-Encoding in white space {value!r}": (
            POST + b"Transfer-Encoding:" + value + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n", ("POST", "/x", b"abc")
        )
        for value in (b"chunked", b"chunked ", b" chunked\t", b"\tchunked \t ", b"  chunked \t \t")
    },
    "Host with the last port": (b"GET / HTTP/1.1\r\nHost: a:65535\r\n\r\n", ("GET", "/", b"")),
    "Host with zeros in its port": (b"GET / HTTP/1.1\r\nHost: a:000080\r\n\r\n", ("GET", "/", b"")),
    "Host with no port": (b"GET / HTTP/1.1\r\nHost: a:\r\n\r\n", ("GET", "/", b"")),
    "Chunked": (POST + b"Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", ("POST", "/x", b"")),
    "chunk of CRLFs": (CHUNKED + b"8\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", ("POST", "/x", b"\r\n\r\n\r\n\r\n")),
    "upgrade": (GET + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n", ("GET", "/ping", b"")),
    "upgrade with body": (UPGRADE + b"Content-Length: 3\r\n\r\nabc", ("POST", "/x", b"abc")),
    "upgrade with chunks": (UPGRADE + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n" + LAST,
                            ("POST", "/x", b"a")),
}  # fmt: skip


@pytest.mark.parametrize(("vector", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_faulty_request_is_refused_once_and_the_connection_ends(vector: bytes, status: int) -> None:
    wire = send_every_way(vector)
    assert wire.statuses == [status]
    assert wire.exchanges == []
    assert wire.ended
    assert wire.answer.headers["connection"] == "close"
    assert wire.answer.json["code"] == status
    if status == 400:
        assert wire.answer.json["type"] == "BadRequestException"
        assert wire.answer.json["message"] == "Invalid HTTP message."
        assert wire.answer.cause


@pytest.mark.parametrize("vector", [vector for vector, _ in REFUSED.values()], ids=REFUSED.keys())
def test_faulty_request_after_a_good_one_does_not_spoil_its_answer(vector: bytes) -> None:
    wire = Wire().send(GET + b"\r\n" + vector + GET + b"\r\n")
    first, second = wire.answers
    assert (first.status, second.status >= 400) == (200, True)
    assert len(wire.exchanges) == 1


@pytest.mark.parametrize(("vector", "seen"), SERVED.values(), ids=SERVED.keys())
def test_sound_request_reaches_the_app_and_the_next_one_is_served_too(
    vector: bytes, seen: tuple[str, str, bytes]
) -> None:
    wire = send_every_way(vector + b"DELETE /next HTTP/1.1\r\nHost: a\r\n\r\n")
    first, second = (exchange.request for exchange in wire.exchanges)
    assert (first.method, first.path, bytes(first.body)) == seen
    assert (second.method, second.path, second.headers) == ("DELETE", "/next", [("Host", "a")])
    assert not wire.ended


def test_random_cuts_do_not_change_what_is_understood() -> None:
    seed = int(os.environ.get("PYSERVE_TEST_SEED", random.randrange(2**32)))
    print(f"PYSERVE_TEST_SEED={seed}")
    chance = random.Random(seed)
    vectors = [vector for vector, _ in (*SERVED.values(), *SERVED.values())]
    for _ in range(50):
        data = b"".join(chance.sample(vectors, 4)) + chance.choice([vector for vector, _ in REFUSED.values()])
        whole = Wire().send(data)
        ends = sorted(chance.sample(range(1, len(data)), 8))
        pieces = [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)], strict=True)]
        assert Wire().send(*pieces).verdict == whole.verdict


def test_random_bytes_are_refused_or_awaited_but_never_served() -> None:
    seed = int(os.environ.get("PYSERVE_TEST_SEED", random.randrange(2**32)))
    print(f"PYSERVE_TEST_SEED={seed}")
    chance = random.Random(seed)
    for _ in range(200):
        wire = Wire().send(chance.randbytes(4096))
        assert wire.exchanges == []
        assert wire.statuses in ([400], [])


def at_limit(excess: int) -> dict[str, tuple[bytes, int]]:
    """Requests exactly at a limit of ``SMALL``, plus ``excess``."""
    body = b"x" * (20 + excess)
    target = b"/" + b"a" * (64 - len("GET / HTTP/1.1") + excess)
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX: "
    return {
        "line": (b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        "head": (head + b"v" * (200 - len(head) - 4 + excess) + b"\r\n\r\n", 431),
        "headers": (GET + b"X: 1\r\n" * (3 + excess) + b"\r\n", 431),
        "body": (POST + b"Content-Length: %d\r\n\r\n" % len(body) + body, 413),
        "chunk": (CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n", 413),
        "two chunks": (CHUNKED + b"8\r\n12345678\r\n%x\r\n" % (12 + excess) + body[8:] + b"\r\n0\r\n\r\n", 413),
        "chunks": (CHUNKED + b"1\r\na\r\n" * (5 + excess) + b"0\r\n\r\n", 400),
        "chunk line": (CHUNKED + b"1;" + b"e" * (62 + excess) + b"\r\na\r\n0\r\n\r\n", 400),
        "trailers": (CHUNKED + b"0\r\n" + b"X: 1\r\n" * (4 + excess) + b"\r\n", 431),
        "empty lines": (b"\r\n" * (32 + excess) + GET + b"\r\n", 400),
    }


@pytest.mark.parametrize("name", at_limit(0))
def test_request_at_the_limit_is_served(name: str) -> None:
    wire = send_every_way(at_limit(0)[name][0], limits=SMALL)
    assert wire.statuses == [200]
    assert not wire.ended


@pytest.mark.parametrize("name", at_limit(1))
def test_request_one_over_the_limit_is_refused(name: str) -> None:
    vector, status = at_limit(1)[name]
    wire = send_every_way(vector, limits=SMALL)
    assert wire.statuses == [status]
    assert wire.exchanges == []
    assert wire.ended


def test_head_that_never_ends_is_refused_at_the_limit() -> None:
    wire = Wire(limits=SMALL).send(GET)
    sent = 0
    while not wire.ended:
        wire.send(b"X")
        sent += 1
    assert wire.statuses == [431]
    assert len(GET) + sent == SMALL.head_size_max


def test_chunk_framing_may_not_outweigh_the_body() -> None:
    limits = Http1Limits(chunk_overhead_size_max=100, chunk_overhead_ratio_max=8)
    chunk = b"1;eeeeeeeeeeeeeee\r\na\r\n"  # 21 bytes of framing for 1 of content
    assert send_every_way(CHUNKED + chunk * 4 + b"0\r\n\r\n", limits=limits).statuses == [200]
    assert send_every_way(CHUNKED + chunk * 9 + b"0\r\n\r\n", limits=limits).statuses == [400]


def test_limits_of_the_standard_size_hold() -> None:
    limits = Http1Limits()
    path = b"/" + b"a" * (limits.line_size_max - len("GET / HTTP/1.1"))
    assert Wire().send(line(b"GET " + path + b" HTTP/1.1")).statuses == [200]
    assert Wire().send(line(b"GET " + path + b"a HTTP/1.1")).statuses == [414]
    body = b"x" * limits.body_size_max
    assert Wire().send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body).statuses == [200]
    assert Wire().send(POST + b"Content-Length: %d\r\n\r\n" % (len(body) + 1)).statuses == [413]
    assert Wire().send(GET + b"X: " + b"v" * 5_000_000 + b"\r\n\r\n").statuses == [431]
    assert Wire().send(GET + b"X: 1\r\n" * 20_000 + b"\r\n").statuses == [431]
    assert Wire().send(CHUNKED + b"1\r\na\r\n" * 65_537).statuses == [400]


def test_limit_must_be_above_zero() -> None:
    with pytest.raises(Exception, match="head_size_max is 0"):
        Http1Limits(head_size_max=0)
