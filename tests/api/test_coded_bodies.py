"""Compressed bodies: undone for built-in handlers, as they were sent for others."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from pyserve.api.coded_bodies import CodedBodies
from pyserve.errors import OverloadedError, ServeError, TooLargeError
from pyserve.request.body_budget import BodyBudget
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request
from tests.support.handler_archives import write_handler
from tests.support.serving import Server
from tests.support.serving_models import write_linear

compressed = functools.partial(gzip.compress, mtime=0)  # of which the names of tests are made

JSON = "application/json"
ECHO = """
def handle(data, context):
    if data is None:
        return None
    return [{"type": type(row["body"]).__name__, "size": len(row["body"]),
             "coding": context.get_request_header(i, "Content-Encoding")} for i, row in enumerate(data)]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("coded"))
    server.environment["PYSERVE_MAX_REQUEST_SIZE"] = "100000"
    write_linear(server.store)
    write_handler(server.store, "own", ECHO)
    with server:
        server.start("--models", "all")
        yield server


@pytest.mark.server
@pytest.mark.parametrize(
    "path",
    [
        "predictions/linear",
        "predictions/linear/1.0",
        "models/linear/invoke",
        "linear/predict",
        "invocations?model_name=linear",
        "v1/models/linear:predict",
    ],
)
def test_built_in_handlers_read_compressed_bodies(server: Server, path: str) -> None:
    values: Any = [1.0, 2.0, 3.0, 4.0]
    body = json.dumps({"instances": [values]} if path.startswith("v1") else values).encode()
    plain = server.ask("POST", f"/{path}", body, {"Content-Type": JSON})
    assert plain.status == 200, plain.body
    for coding, packed in (("gzip", compressed(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        answer = server.ask("POST", f"/{path}", packed, {"Content-Type": JSON, "Content-Encoding": coding})
        assert (answer.status, answer.body) == (200, plain.body)


@pytest.mark.server
def test_numbers_as_they_lie_in_memory_may_be_compressed(server: Server) -> None:
    body = np.arange(4, dtype="<f4").tobytes()
    raw = {"Content-Type": "application/octet-stream"}
    plain = server.ask("POST", "/predictions/linear", body, raw)
    answer = server.ask("POST", "/predictions/linear", compressed(body), {**raw, "Content-Encoding": "gzip"})
    assert (answer.status, answer.body) == (200, plain.body)


@pytest.mark.server
@pytest.mark.parametrize(
    ("coding", "body", "status", "word"),
    [
        ("br", b"x", 415, "as it is."), ("gzip", b"x", 400, "not what its Content-Encoding"),
        ("gzip", compressed(b"[" + b"0," * 1_000_000 + b"0]"), 413, "max_request_size is 100000"),
    ],
)  # fmt: skip
def test_what_cannot_be_undone_is_said(server: Server, coding: str, body: bytes, status: int, word: str) -> None:
    answer = server.ask("POST", "/predictions/linear", body, {"Content-Type": JSON, "Content-Encoding": coding})
    assert answer.status == status and word in answer.json["message"], answer.body
    if status == 415:
        assert answer.headers["accept-encoding"].startswith("gzip, deflate")


@pytest.mark.server
@pytest.mark.parametrize("coding", ["gzip", "br", "utf-8", "bogus", "gzip, gzip"])
def test_own_handlers_get_what_was_sent(server: Server, coding: str) -> None:
    body = compressed(b"[1]" * 1000)
    answer = server.ask("POST", "/predictions/own", body, {"Content-Type": JSON, "Content-Encoding": coding})
    assert answer.json == {"type": "bytearray", "size": len(body), "coding": coding}
    # What is JSON is parsed, whatever the header says.
    answer = server.ask("POST", "/predictions/own", b"[1, 2]", {"Content-Type": JSON, "Content-Encoding": coding})
    assert answer.json == {"type": "list", "size": 2, "coding": coding}


# --- one at a time ----------------------------------------------------------------------------------------------------


def undo(body: bytes, budget: BodyBudget, *, gone: bool = False) -> tuple[Exchange, Mock, ServeError | None]:
    request = Request("POST", "/predictions/m", headers=[("Content-Encoding", "gzip")], body=bytearray(body))
    exchange, then = Exchange(request, Mock()), Mock()
    with ThreadPoolExecutor(1) as pool:
        bodies = CodedBodies(10_000, budget, pool)
        assert bodies.are_undone(request, Mock(built_in_handler="tensor"))
        assert not bodies.are_undone(request, Mock(built_in_handler=None))
        assert bodies.are_undone(request, Mock(built_in_handler=None), has_tensors=True)
        if gone:
            exchange.disconnect()
        try:
            asyncio.run(bodies.undo(exchange, then))
        except ServeError as error:
            return exchange, then, error
    return exchange, then, None


def test_an_undone_body_counts_in_the_budget() -> None:
    packed, budget = compressed(bytes(5000)), BodyBudget(6000)
    exchange, then, error = undo(packed, budget)
    assert error is None and then.call_count == 1
    assert exchange.request.headers == [("Content-Length", "5000")]
    assert exchange.reserved == budget.size == 5000 - len(packed)
    _, then, error = undo(packed, budget)
    assert isinstance(error, OverloadedError) and error.detail["reason"] == "body budget" and not then.called


def test_a_bomb_is_given_up_when_the_budget_is_full_long_before_the_limit() -> None:
    budget = BodyBudget(3_000_000)
    request = Request(
        "POST", "/", headers=[("Content-Encoding", "gzip")], body=bytearray(compressed(bytes(60_000_000)))
    )
    exchange, then = Exchange(request, Mock()), Mock()
    with ThreadPoolExecutor(1) as pool, pytest.raises(OverloadedError):
        asyncio.run(CodedBodies(100_000_000, budget, pool).undo(exchange, then))
    assert not then.called and exchange.reserved == budget.size <= 3_000_000


def test_what_is_over_the_limit_or_whose_client_has_gone_is_not_taken() -> None:
    budget = BodyBudget(1_000_000)
    _, then, error = undo(compressed(bytes(10_001)), budget)
    assert isinstance(error, TooLargeError) and not then.called
    exchange, then, error = undo(compressed(bytes(5000)), budget, gone=True)
    assert error is None and not then.called and exchange.reserved == budget.size == 0


def test_strict_leaves_bodies_alone() -> None:
    request = Request("POST", "/", headers=[("Content-Encoding", "gzip")])
    bodies = CodedBodies(1, BodyBudget(1), Mock(), is_on=False)
    assert not bodies.are_undone(request, Mock(built_in_handler="tensor"), has_tensors=True)
