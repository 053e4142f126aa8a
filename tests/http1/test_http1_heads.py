"""Plain heads, read by csrc/http/head.h, beside the reader in Python that knows every rule.

Both must agree on whatever the former takes, and it must take what ordinary clients send: each is worth nothing without
the other.
"""

from __future__ import annotations

import gc
import random
import sys

import pytest

from pyserve import _http
from pyserve.errors import ServeError
from pyserve.http1 import head as head_module
from pyserve.http1.head import HeadReader
from pyserve.http1.limits import Http1Limits
from pyserve.request.messages import Request
from tests.fuzz.heads_target import compare
from tests.http1.test_http1_vectors import REFUSED, SERVED
from tests.support.http1_wire import Wire

TRACE = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
ORDINARY = {
    "curl": b"POST /predictions/m HTTP/1.1\r\nHost: localhost:8080\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n"
    b"Content-Length: 110969\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n",
    "requests": b"POST /predictions/m/1.0 HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nUser-Agent: python-requests/2.32.3\r\n"
    b"Accept-Encoding: gzip, deflate, br\r\nAccept: */*\r\nConnection: keep-alive\r\nContent-Length: 64\r\n\r\n",
    "httpx": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: models.default.svc.cluster.local\r\nAccept: */*\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nUser-Agent: python-httpx/0.28\r\n"
    b"Content-Length: 20\r\nContent-Type: application/json\r\n\r\n",
    "tritonclient": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost:8000\r\n"
    b"Inference-Header-Content-Length: 192\r\nContent-Type: application/octet-stream\r\n"
    b"Content-Length: 256\r\n\r\n",
    "Go": b"POST /predictions/m HTTP/1.1\r\nHost: a:80\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 2\r\n"
    b"X-Request-Id: 4fd1-2:7.b_c\r\nAccept-Encoding: gzip\r\n\r\n",
    "browser": b"GET /models?limit=5&next_page_token=%20a HTTP/1.1\r\nHost: a.example\r\nConnection: keep-alive\r\n"
    b'sec-ch-ua: "Chromium";v="126", "Not/A)Brand";v="8"\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n'
    b"Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\nCookie: a=b; c=d\r\nCookie: e=f\r\n\r\n",
    "proxy": b"POST /predictions/m HTTP/1.0\r\nHost: a\r\nX-Forwarded-For: 10.0.0.1, 10.0.0.2\r\n" + TRACE
    + b"X-Server-Timing: 1\r\nX-Request-Timeout-Ms: 500\r\nConnection: close\r\nContent-Length: 5\r\n\r\n",
    "ab": b"POST /predictions/m HTTP/1.0\r\nConnection: Keep-Alive\r\nContent-length: 3\r\nHost: a:80\r\n\r\n",
    "health check": b"GET /ping HTTP/1.1\r\nHost: 10.1.2.3:8080\r\nUser-Agent: kube-probe/1.31\r\nAccept: */*\r\n"
    b"Connection: close\r\n\r\n",
}  # fmt: skip
# What heads are made of; some of it is wrong, or not plain.
NAMES = (
    b"Host", b"host", b"Content-Length", b"Connection", b"X-Request-Id", b"Content-Type", b"Accept", b"Cookie",
    b"Inference-Header-Content-Length", b"X-Server-Timing", b"x-request-timeout-ms", b"Transfer-Encoding", b"Expect",
    b"Upgrade", b"Proxy-Connection", b"ts_request_sequence_id", b"X_Y", b"X.Y", b"", b"X ", b"traceparent",
)  # fmt: skip
VALUES = (
    b"a", b"a:80", b"a:65536", b"[::1]:80", b"a b", b"5", b"05", b"5 ", b" 5", b"999999999999999", b"9999999999999999",
    b"keep-alive", b"Close", b"close, te", b"upgrade", b"chunked", b"100-continue", b"", b" ", b"\t", b"a\t", b"\xe9",
    b"a\x00", b"a\nb", b"a\rb", b"x" * 128, b"x" * 129, b"application/json; charset=utf-8", b"*/*",
)  # fmt: skip
TARGETS = (
    b"/", b"/predictions/m", b"/a?b=c", b"/a?%zz?", b"/%41", b"/a%", b"//a", b"*", b"/a#b", b"/\xe9", b"http://h/a",
    b"/a{b}\"<", b"", b"/?", b"?", b"/a b",
)  # fmt: skip
METHODS = (b"GET", b"POST", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"get", b"FOO", b"TRACE", b"POSTS", b"")
VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"http/1.1", b"HTTP/1.1 ", b"")


@pytest.mark.parametrize("data", ORDINARY.values(), ids=ORDINARY)
def test_what_ordinary_clients_send_is_plain_and_read_alike(data: bytes) -> None:
    assert compare(data)
    assert isinstance(HeadReader(Http1Limits()).read(data), _http.Head)


@pytest.mark.parametrize("vector", [vector for vector, _ in REFUSED.values()], ids=REFUSED)
def test_no_head_that_is_refused_is_plain(vector: bytes) -> None:
    head = vector.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    if compare(head):  # then its body is what is wrong with it
        HeadReader(Http1Limits(), read_plain=None).read(head)


@pytest.mark.parametrize("vector", [vector for vector, _ in (*REFUSED.values(), *SERVED.values())])
def test_a_connection_understands_the_same_without_it(vector: bytes) -> None:
    with_it, without = Wire().send(vector), Wire()
    without.connections.heads = HeadReader(Http1Limits(), read_plain=None)  # type: ignore[union-attr]
    assert with_it.verdict == without.send(vector).verdict


def test_generated_heads_are_read_alike(seed: int) -> None:
    chance = random.Random(seed)
    plain = 0
    for _ in range(20_000):
        # Half of them with one odd part at most, or hardly any would be plain.
        odd = chance.random() < 0.5
        method, target, version = (
            chance.choice(each if odd and chance.random() < 0.3 else each[:2]) for each in (METHODS, TARGETS, VERSIONS)
        )
        lines = [b"Host: a:80"] if chance.random() < 0.9 else []
        for _ in range(chance.randrange(5)):
            name, value = chance.choice(NAMES[2:11] if not odd else NAMES), chance.choice(VALUES)
            if not odd:
                value = chance.choice((b"5", b"a", b"close", b"keep-alive", b"x-y.z"))
            lines.append(name + chance.choice((b": ", b":", b":  ")) + value)
        chance.shuffle(lines)
        head = b"\r\n".join([b" ".join((method, target, version)), *lines]) + b"\r\n\r\n"
        head = head.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        plain += compare(head, chance.choice((2, 2000)), takes_ids=chance.random() < 0.8)
    assert 2_000 < plain < 18_000, "too few of one kind to say anything"


def test_mutated_heads_are_read_alike(seed: int) -> None:
    chance = random.Random(seed)
    plain = 0
    for _ in range(20_000):
        head = bytearray(chance.choice(list(ORDINARY.values())))
        for _ in range(chance.randrange(1, 3)):
            at = chance.randrange(len(head))
            way = chance.randrange(4)
            if way == 0:
                head[at] = chance.randrange(256)
            elif way == 1:
                del head[at : at + chance.randrange(1, 4)]
            elif way == 2:
                head[at:at] = chance.choice((b"\r\n", b" ", b":", b"\t", b"_", b"%", b"\x00", b"\n", b"\r", b"9"))
            else:
                begin = chance.randrange(len(head))
                head[at:at] = head[begin : begin + chance.randrange(40)]
        plain += compare(bytes(head).partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    assert plain > 2_000, "too few to say anything"


def test_every_header_that_means_something_is_known_to_both() -> None:
    for name, kind in head_module._KINDS.items():
        twice = b"POST / HTTP/1.1\r\nHost: a\r\n%b: 1\r\n%b: 2\r\n\r\n" % (name, name)
        plain = _http.read_plain(twice, 2000, True)
        if kind == head_module._TIMING:
            assert plain is not None and plain.has_timing
        else:
            assert plain is None, f"two headers {name!r} may ask two different things"


def test_a_head_over_the_limit_is_refused_in_the_same_words() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"\r\n"
    for limit, is_plain in ((3, False), (200, False), (2000, False), (100, False)):
        assert (_http.read_plain(head, limit, True) is not None) == is_plain
    assert _http.read_plain(head, 5000, True) is None  # more than it has room for
    with pytest.raises(ServeError, match="more than 200 headers"):
        HeadReader(Http1Limits(header_count_max=200)).read(head)
    assert len(HeadReader(Http1Limits()).read(head).headers) == 201


def test_an_id_is_taken_only_where_clients_may_choose_one() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: abc\r\n\r\n"
    assert HeadReader(Http1Limits()).read(head).id == "abc"
    without = HeadReader(Http1Limits(), takes_ids=False).read(head)
    assert (without.id, without.find("x-request-id")) == ("", "abc")


def test_headers_of_a_request_are_made_when_they_are_read() -> None:
    head = _http.read_plain(ORDINARY["browser"], 2000, True)
    assert head is not None
    request = Request(head.method, head.path, query=head.query, fields=head, has_timing=head.has_timing)
    assert request.header("COOKIE") == "e=f"  # of two the last
    assert request.header("nothing", "x") == "x"
    assert request.headers is head.headers and request.header_text is head.text
    assert request.header_text.startswith("Host\na.example\nConnection\nkeep-alive\n")
    request.replace_headers(["cookie"], [("Cookie", "g=h")])
    assert request.header("cookie") == "g=h" and head.find("cookie") == "e=f"


def test_it_keeps_nothing_of_a_head_that_is_gone() -> None:
    data = bytes(bytearray(ORDINARY["browser"]))  # of its own
    before = sys.getrefcount(data)
    for _ in range(100):
        head = _http.read_plain(data, 2000, True)
        assert head is not None
        assert (head.headers, head.text, head.find("host")) and sys.getrefcount(data) == before + 1
        del head
        assert _http.read_plain(data[:-1], 2000, True) is None
    gc.collect()
    assert sys.getrefcount(data) == before


def test_it_takes_bytes_and_is_made_of_nothing_else() -> None:
    for wrong in ((bytearray(b""), 1, True), (b"", -1, True), (b"", 1), (b"", "1", True)):
        with pytest.raises((TypeError, ValueError)):
            _http.read_plain(*wrong)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError):
        _http.Head()
    assert _http.read_plain(b"", 1, True) is None
    assert _http.read_plain(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b"x", 9, True) is None
    assert _http.read_plain(b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 9, True) is None
