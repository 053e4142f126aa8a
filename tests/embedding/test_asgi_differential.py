"""The same requests to a server by its socket and to an engine as an ASGI application: the same answers."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.asgi_site import AsgiSite, new_site
from tests.support.handler_archives import write_handler
from tests.support.raw_http import Raw, exchange, request
from tests.support.serving import Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

SIZE_MAX = 50_000
CONFIG = {
    "max_request_size": SIZE_MAX,
    "cors_allowed_origin": "https://a.example",
    "response_compression_size_min": 64,
    "error_detail": "none",
}
# Of the connection, which the ASGI server has, or another one each time.
OWN_HEADERS = {"date", "connection", "x-request-id", "transfer-encoding"}
ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")

HANDLER = """
from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException


def handle(data, context):
    if data is None:
        return None
    body = data[0].get("body")
    if not isinstance(body, dict):
        return [{"rows": [{key: str(value) for key, value in row.items()} for row in data],
                 "length": context.get_request_header(0, "content-length")}]
    if "prediction" in body:
        raise PredictionException(*body["prediction"])
    if "raise" in body:
        raise ValueError(body["raise"])
    for name, value in body.get("headers", {}).items():
        context.set_response_header(0, name, value)
    if "type" in body:
        context.set_response_content_type(0, body["type"])
    if "status" in body:
        context.set_response_status(body["status"], body.get("phrase", ""), 0)
    for part in body.get("parts", []):
        send_intermediate_predict_response([part], context.request_ids, "", 200, context)
    return [body.get("give", "")]
"""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, AsgiSite]]:
    with contextlib.ExitStack() as stack:
        found: list[Any] = []
        for transport in ("sockets", "asgi"):
            site = new_site(transport, tmp_path_factory.mktemp(transport), CONFIG)
            if transport == "sockets":
                site.environment["PYSERVE_CONSOLE"] = "false"
            write_linear(site.store)
            write_handler(site.store, "own", HANDLER)
            stack.enter_context(site)
            site.start("--models", "all")
            found.append(site)
        yield found[0], found[1]


def told(order: Any, *lines: str, model: str = "own") -> bytes:
    return request(
        "POST", f"/predictions/{model}", json.dumps(order).encode(), "Content-Type: application/json", *lines
    )


def chunked(target: str, *parts: bytes, line: str = "X-Own: 1") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n{line}\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def tensor(values: Any, name: str = "x", datatype: str = "FP32") -> bytes:
    array = np.asarray(values, np.float32)
    body = {
        "inputs": [{"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}]
    }
    return json.dumps(body).encode()


JSON = "Content-Type: application/json"
BYTES = "Content-Type: application/octet-stream"
BOUNDARY = "Content-Type: multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="d"\r\n\r\nv\r\n--b--\r\n'
POST = b"POST /predictions/own HTTP/1.1\r\nHost: a\r\n"
BOMB = gzip.compress(b" " * 10_000_000, mtime=0)
GZIP = "Content-Encoding: gzip"
FORM = "Content-Type: application/x-www-form-urlencoded"
ORIGIN = "Origin: https://a.example"
REQUESTS = {
    "ping": request("GET", "/ping"),
    "ping by POST": request("POST", "/ping", b"x"),
    "ping by HEAD": request("HEAD", "/ping"),
    "live": request("GET", "/live"),
    "ready": request("GET", "/ready"),
    "description": request("OPTIONS", "/"),
    "description of a model": request("OPTIONS", "/predictions/linear"),
    "description of none": request("OPTIONS", "/predictions/none"),
    "api-description": request("GET", "/api-description"),
    "nowhere": request("GET", "/nowhere"),
    "slashes": request("GET", "//ping"),
    "encoded path": request("POST", "/predictions/o%77n", b"x"),
    "encoded slash": request("POST", "/predictions/own%2F1.0", b"x"),
    "bad percent": request("POST", "/predictions/%zz", b"x"),
    "encoded control": request("POST", "/predictions/%0a", b"x"),
    "not UTF-8": request("POST", "/predictions/%ff", b"x"),
    "other letters": request("POST", "/predictions/own/1.0/%E6%97%A5", b"x"),
    "query": request("POST", "/models/own/invoke?a=1;b=x+y&c=%26", b"x"),
    "query twice": request("POST", "/models/own/invoke?a=1&a=2", b"x"),
    "prediction": request("POST", "/predictions/linear", b"[1, 2, 3, 4]", JSON),
    "prediction by GET": request("GET", "/predictions/own"),
    "prediction by PATCH": request("PATCH", "/predictions/own", b"x"),
    "another method": request("PROPFIND", "/predictions/own", b"x"),
    "TRACE": request("TRACE", "/ping"),
    "no model": request("POST", "/predictions/none", b"x"),
    "no version": request("POST", "/predictions/own/9", b"x"),
    "wrong shape": request("POST", "/predictions/linear", b"[1, 2]", JSON),
    "no JSON": request("POST", "/predictions/linear", b"{", JSON),
    "raw": request("POST", "/predictions/linear", np.zeros(4, np.float32).tobytes(), BYTES),
    "raw of a wrong size": request("POST", "/predictions/linear", b"xyz", BYTES),
    "form": request("POST", "/predictions/own", b"a=1&b=2", FORM),
    "form twice": request("POST", "/predictions/own", b"a=1&a=2", FORM),
    "multipart": request("POST", "/predictions/own", PART, BOUNDARY),
    "multipart without its end": request("POST", "/predictions/own", b"--b\r\nContent", BOUNDARY),
    "explain": request("POST", "/explanations/linear", b"[1, 2, 3, 4]", JSON),
    "kserve 1": request("POST", "/v1/models/linear:predict", b'{"instances": [[1, 2, 3, 4]]}', JSON),
    "kserve 1, wrong": request("POST", "/v1/models/linear:predict", b'{"instances": 3}', JSON),
    "kserve 2": request("POST", "/v2/models/linear/infer", tensor([[1, 2, 3, 4]]), JSON),
    "kserve 2, wrong type": request("POST", "/v2/models/linear/infer", tensor([[1, 2, 3, 4]], datatype="INT9"), JSON),
    "kserve 2, no JSON": request("POST", "/v2/models/linear/infer", b"{]", JSON),
    "kserve 2, no model": request("POST", "/v2/models/none/infer", tensor([[1]]), JSON),
    "kserve 2, metadata": request("GET", "/v2/models/linear"),
    "kserve 2, server": request("GET", "/v2"),
    "kserve 2, ready": request("GET", "/v2/models/linear/ready"),
    "generate": request("POST", "/v2/models/own/generate", b'{"text_input": "a"}', JSON),
    "chunks": chunked("/predictions/own", b"one", b"two"),
    "chunks of nothing": chunked("/predictions/own"),
    "chunks above the limit": chunked("/predictions/own", b"x" * 40_000, b"x" * 10_001),
    "a body at the limit": request("POST", "/predictions/own", b"x" * SIZE_MAX),
    "a body above the limit": request("POST", "/predictions/own", b"x" * (SIZE_MAX + 1)),
    "gzip": request("POST", "/predictions/linear", gzip.compress(b"[1, 2, 3, 4]", mtime=0), JSON, GZIP),
    "no gzip": request("POST", "/predictions/linear", b"xxxx", JSON, GZIP),
    "a bomb": request("POST", "/predictions/linear", BOMB, JSON, GZIP),
    "accepts gzip": told({"give": "x" * 500}, "Accept-Encoding: gzip"),
    "accepts gzip, larger": told({"give": "abc" * 10_000}, "Accept-Encoding: gzip"),
    "accepts anything, small": told({"give": "x"}, "Accept-Encoding: *"),
    "large answer": told({"give": "x" * 200_000}),
    "headers of a handler": told({"headers": {"x-a": "1", "cache-control": "max-age=3"}, "type": "text/x"}),
    "a header that cannot be sent": told({"headers": {"x-a": "1\r\nx-b: 2"}}),
    "a header that is the server's": told({"headers": {"connection": "upgrade", "content-length": "3"}}),
    "a status of a handler": told({"status": 299, "give": "x"}),
    "no content": told({"status": 204, "give": "x"}),
    "reset content": told({"status": 205, "give": "x"}),
    "a status that is none": told({"status": 99, "give": "x"}),
    "an error of a handler": told({"raise": "secret"}),
    "an error with a status": told({"prediction": ["not so", 418]}),
    "parts": told({"parts": ["one", "two"], "give": "three", "type": "text/plain"}),
    "parts by HEAD": b"HEAD" + told({"parts": ["one"], "give": "two"})[4:],
    "an id": request("GET", "/ping", b"", "X-Request-Id: mine-1"),
    "an id that is none": request("GET", "/ping", b"", "X-Request-Id: a b\x01"),
    "an origin": request("GET", "/ping", b"", ORIGIN),
    "another origin": request("GET", "/ping", b"", "Origin: https://b.example"),
    "preflight": request("OPTIONS", "/predictions/own", b"", ORIGIN, "Access-Control-Request-Method: POST"),
    "timing": told({"give": "x"}, "x-request-timeout-ms: 60000"),
    "a time that is none": told({"give": "x"}, "x-request-timeout-ms: soon"),
    "no time": told({"give": "x"}, "x-request-timeout-ms: 0"),
    "a host that is none": b"GET /ping HTTP/1.1\r\nHost: a b\r\n\r\n",
    "no host": b"GET /ping HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "two types": request("POST", "/predictions/own", b"x", JSON, "Content-Type: text/plain"),
    "two lengths": b"%bContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx" % POST,
    "a length and chunks": b"%bContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % POST,
    "a length that is none": b"%bContent-Length: -1\r\n\r\n" % POST,
    "another coding": b"%bTransfer-Encoding: gzip\r\n\r\n" % POST,
    "an expectation": b"%bExpect: tea\r\nContent-Length: 1\r\n\r\nx" % POST,
    "many headers": request("GET", "/ping", b"", *(f"x-{n}: 1" for n in range(2100))),
    "a long head": request("GET", "/ping", b"", *(f"x-{n}: {'y' * 7000}" for n in range(10))),
    "a long line": request("GET", "/ping?" + "x" * 9000),
    "names with underscores": request("POST", "/predictions/own", b"x", "x_own: 1", "ts_request_sequence_id: 3"),
}  # fmt: skip
MANAGEMENT = {
    "models": request("GET", "/models"),
    "models, a page": request("GET", "/models?limit=1"),
    "models, no page": request("GET", "/models?limit=x"),
    "describe none": request("GET", "/models/none"),
    "a prediction": request("POST", "/predictions/own", b"x"),
    "register nothing": request("POST", "/models"),
    "register what is not there": request("POST", "/models?url=nothing.mar"),
    "register elsewhere": request("POST", "/models?url=/etc/passwd"),
    "register again": request("POST", "/models?url=own.mar"),
    "scale nothing": request("PUT", "/models/none?min_worker=1"),
    "scale wrongly": request("PUT", "/models/own?min_worker=x"),
    "unregister nothing": request("DELETE", "/models/none"),
    "wrong method": request("PATCH", "/models"),
    "index": request("POST", "/v2/repository/index", b"{}", JSON),
    "an origin": request("PUT", "/models/own?min_worker=1", b"", "Origin: https://evil.example"),
    "description": request("OPTIONS", "/"),
}  # fmt: skip


def shown(answer: Raw) -> tuple[int, dict[str, str], bytes]:
    """What is to be the same. Of an answer in parts no size is told."""
    headers = {name.lower(): value for name, value in answer.headers if name.lower() not in OWN_HEADERS}
    assert len([name for name, _ in answer.headers if name.lower() == "x-request-id"]) == 1
    body = answer.body
    if headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
        del headers["content-length"]
    return answer.status, headers, ID.sub(b"ID", body)


@pytest.mark.parametrize("name", REQUESTS)
def test_inference_is_answered_alike(sites: tuple[Server, AsgiSite], name: str) -> None:
    by_socket, by_asgi = (shown(exchange(site, REQUESTS[name])) for site in sites)
    assert by_asgi == by_socket
    assert not sites[1].engine.running.server.bodies.size


@pytest.mark.parametrize("name", MANAGEMENT)
def test_management_is_answered_alike(sites: tuple[Server, AsgiSite], name: str) -> None:
    by_socket, by_asgi = (shown(exchange(site, MANAGEMENT[name], "management")) for site in sites)
    assert by_asgi == by_socket


SAMPLES = ("Requests2XX_total", "Requests4XX_total", "Requests5XX_total", "ts_inference_requests_total")


def test_both_count_the_same(sites: tuple[Server, AsgiSite]) -> None:
    added = []
    for site in sites:
        before = [site.metric(sample) for sample in SAMPLES]
        for name in ("no model", "two hosts", "a body above the limit"):
            exchange(site, REQUESTS[name])
        site.ask("GET", "/ping")
        site.predict("linear", [1, 2, 3, 4])
        site.predict("own", {"raise": "x"})
        site.predict("own", {"parts": ["a", "b"]})
        added.append([site.metric(sample) - count for sample, count in zip(SAMPLES, before, strict=True)])
    live = 1  # that `exchange` has asked behind an answer which keeps the connection
    assert added[1] == [added[0][0] - live, *added[0][1:]]


def test_loading_is_told_to_be_elsewhere(sites: tuple[Server, AsgiSite]) -> None:
    load = request("POST", "/v2/repository/models/linear/load", b"{}", JSON)
    assert exchange(sites[1], load).status == exchange(sites[0], load).status == 400
    assert "pyserve.asgi.management" in exchange(sites[1], load).body.decode()
