"""What leaves the server: headers, bodies, errors and streams byte by byte, a row for each row of the contract,
sections 1.5 to 1.9, against one real server."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.handler_archives import write_handler
from tests.support.raw_http import exchange, request
from tests.support.serving import JSON, LIMIT_S, Server, at_once

pytestmark = pytest.mark.server

SIZE_MAX = 100_000

# Does what the body says: {"do": name, ...}.
DOES = """
import os
import signal
import time

import torch

from ts.handler_utils.utils import send_intermediate_predict_response
from ts.utils.util import PredictionException

VALUES = {
    "bytes": b"\\x00\\xff", "bytearray": bytearray(b"ab"), "text": "caf\\u00e9", "empty": "", "none": None,
    "dict": {"a": [1, 2.5], "b": {"c": True}}, "list": [1, "\\u00e9"], "tuple": (1, 2), "int": 3, "float": 0.1,
    "bool": True, "tensor": torch.arange(3.0), "set": {1}, "nan": float("nan"), "object": object(),
    "big": b"x" * 100_001, "full": b"x" * 100_000,
}


def handle(data, context):
    if data is None:
        return None
    return list(map(lambda pair: act(pair[0], pair[1].get("body") or {}, context, len(data)), enumerate(data))) \\
        if not any(isinstance(row.get("body"), dict) and row["body"].get("whole") for row in data) else whole(data)


def whole(data):
    order = next(row["body"]["whole"] for row in data if isinstance(row.get("body"), dict) and "whole" in row["body"])
    if order == "not a list":
        return {"a": 1}
    if order == "too short":
        return ["x"] * (len(data) - 1)
    return ["x"] * (len(data) + 1)


def act(index, order, context, size):
    if not isinstance(order, dict):
        return order
    if order.get("type"):
        context.set_response_content_type(index, order["type"])
    for name, value in order.get("headers", {}).items():
        context.set_response_header(index, name, value)
    if order.get("status"):
        context.set_response_status(order["status"], order.get("phrase", ""), index)
    if order.get("raise"):
        raise {"ValueError": ValueError, "MemoryError": MemoryError, "RuntimeError": RuntimeError,
               "cuda": torch.cuda.OutOfMemoryError}[order["raise"]](order.get("text", "told to"))
    if order.get("prediction"):
        raise PredictionException(*order["prediction"])
    if order.get("kill"):
        os.kill(os.getpid(), getattr(signal, order["kill"]))
    if order.get("exit"):
        os._exit(order["exit"])
    if order.get("sleep"):
        time.sleep(order["sleep"])
    while order.get("hold") and os.path.exists(order["hold"]):
        time.sleep(0.01)
    for part in order.get("parts", []):
        if part == "raise":
            raise ValueError("in the middle")
        send_intermediate_predict_response([part], context.request_ids, "Intermediate Prediction success", 200, context)
    return VALUES[order["give"]] if "give" in order else "done"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("responses"))
    write_handler(server.store, "does", DOES)
    write_handler(server.store, "slow", DOES, config={"responseTimeout": 1, "clientTimeoutInMills": 60_000})
    pair = {"batchSize": 2, "minBatch": 2, "maxBatchDelay": 60_000}
    write_handler(server.store, "pair", DOES, config=pair)
    ticket = {"useJobTicket": True, "minWorkers": 1, "maxWorkers": 1}
    write_handler(server.store, "ticket", DOES, config=ticket)
    server.environment |= {"PYSERVE_MAX_REQUEST_SIZE": str(SIZE_MAX), "PYSERVE_MAX_RESPONSE_SIZE": str(SIZE_MAX)}
    with server:
        server.start("--models", "all")
        yield server


def told(order: dict[str, Any], model: str = "does", *lines: str) -> bytes:
    body = json.dumps(order).encode()
    return request("POST", f"/predictions/{model}", body, "Content-Type: application/json", *lines)


# --- 1.5: headers -----------------------------------------------------------------------------------------------------

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
COMMON = [
    ("Pragma", "no-cache"),
    ("Cache-Control", "no-cache; no-store, must-revalidate, private"),
    ("Expires", "Thu, 01 Jan 1970 00:00:00 UTC"),
]
TYPED = [("content-type", "application/json")]


@pytest.mark.parametrize(
    ("sent", "line", "own"),
    [
        (request("GET", "/ping"), (200, "OK"), TYPED),
        (request("GET", "/nowhere"), (404, "Not Found"), TYPED),
        (request("PUT", "/"), (405, "Method Not Allowed"), [*TYPED, ("Allow", None)]),
        (told({}), (200, ""), []),  # no type unless the handler gives one, and no phrase
        (told({"give": "dict"}), (200, ""), []),
        (told({"type": "image/png"}), (200, ""), [("content-type", "image/png")]),
        (told({"headers": {"X-A": "1", "x-b": "2"}}), (200, ""), [("X-A", "1"), ("x-b", "2")]),
        (told({"status": 201, "phrase": "Made It"}), (201, "Made It"), []),
        (told({"status": 418, "phrase": "Teapot"}), (418, "Teapot"), []),
        (told({"raise": "ValueError"}), (503, "Service Unavailable"), TYPED),
    ],
)  # fmt: skip
def test_1_5_headers_of_an_answer(
    server: Server, sent: bytes, line: tuple[int, str], own: list[tuple[str, str | None]]
) -> None:
    answer = exchange(server, sent)
    assert (answer.version, answer.status, answer.reason) == ("HTTP/1.1", *line)
    assert UUID.fullmatch(answer.header("x-request-id") or "")
    assert [pair for pair in answer.headers if pair[0] in dict(COMMON)] == COMMON
    fixed = {"x-request-id", "date", "content-length", "connection", *(name.lower() for name in dict(COMMON))}
    rest = [(name, value) for name, value in answer.headers if name.lower() not in fixed]
    assert sorted(rest) == sorted((name, answer.header(name) if value is None else value) for name, value in own)
    assert answer.header("content-length") == str(len(answer.body))
    assert answer.header("connection") == "keep-alive"
    assert len({name.lower() for name, _ in answer.headers}) == len(answer.headers)


def test_1_5_handlers_may_not_break_the_framing(server: Server) -> None:
    answer = exchange(server, told({"headers": {"content-length": "1", "transfer-encoding": "chunked"}}))
    assert (answer.status, answer.body, answer.header("content-length")) == (200, b"done", "4")
    assert answer.header("transfer-encoding") is None


@pytest.mark.parametrize(
    ("id", "is_kept"),
    [("mine-1", True), ("", False), ("with blank", False), ("x" * 4000, False)],
)
def test_1_5_request_id(server: Server, id: str, is_kept: bool) -> None:
    given = exchange(server, request("GET", "/ping", b"", f"x-request-id: {id}")).header("x-request-id") or ""
    assert (given == id) == is_kept and (is_kept or UUID.fullmatch(given))


# --- 1.6: bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("give", "body"),
    [
        ("bytes", b"\x00\xff"),
        ("bytearray", b"ab"),
        ("text", "café".encode()),
        ("empty", b""),
        ("none", b"null"),
        ("dict", b'{\n  "a": [\n    1,\n    2.5\n  ],\n  "b": {\n    "c": true\n  }\n}'),
        ("list", b'[\n  1,\n  "\\u00e9"\n]'),
        ("tuple", b"[\n  1,\n  2\n]"),
        ("int", b"3"),
        ("float", b"0.1"),
        ("bool", b"true"),
        ("nan", b"null"),
        ("full", b"x" * SIZE_MAX),
    ],
)
def test_1_6_a_value_as_bytes(server: Server, give: str, body: bytes) -> None:
    answer = exchange(server, told({"give": give}))
    assert (answer.status, answer.body) == (200, body)


def test_1_6_a_tensor_is_sent_as_torch_saves_it(server: Server) -> None:
    answer = exchange(server, told({"give": "tensor"}))
    assert torch.equal(torch.load(io.BytesIO(answer.body), weights_only=True), torch.arange(3.0))


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("/ping", '{\n  "status": "Healthy"\n}\n'),
        ("/predictions/no<&>", '{\n  "code": 404,\n  "type": "ModelNotFoundException",\n'
                               '  "message": "Model not found: no<&>"'),
    ],
)  # fmt: skip
def test_1_6_json_of_the_server_is_indented_by_two_and_ends_a_line(server: Server, target: str, text: str) -> None:
    body = exchange(server, request("GET", target)).body.decode()
    assert body.startswith(text) and body.endswith("\n}\n")


# --- 1.7: errors ------------------------------------------------------------------------------------------------------

INTERNAL = "InternalServerException"


@pytest.mark.parametrize(
    ("order", "status", "message"),
    [
        ({"raise": "ValueError"}, 503, "Prediction failed"),
        ({"raise": "RuntimeError", "text": "no CUDA"}, 503, "Prediction failed"),
        ({"raise": "MemoryError"}, 507, "Out of resources"),
        ({"raise": "cuda", "text": "CUDA out of memory"}, 507, "Out of resources"),
        ({"prediction": ["not today", 513]}, 513, "not today"),
        ({"prediction": ["unsaid"]}, 500, "unsaid"),
        ({"prediction": ["no such path", 404]}, 404, "no such path"),
        ({"whole": "not a list"}, 503, "Invalid model predict output"),
        ({"whole": "too short"}, 503, "number of batch response mismatched"),
        ({"whole": "too long"}, 503, "number of batch response mismatched"),
        ({"give": "object"}, 503, "Unsupported model output data type."),
        ({"exit": 3}, 500, "Worker died."),
        ({"kill": "SIGSEGV"}, 500, "Worker died."),
        ({"kill": "SIGKILL"}, 500, "Worker died."),
    ],
)
def test_1_7_what_a_handler_does_wrong(server: Server, order: dict[str, Any], status: int, message: str) -> None:
    answer = exchange(server, told(order))
    said = answer.json
    assert (answer.status, said["code"], said["type"], said["message"]) == (status, status, INTERNAL, message)
    assert list(said)[:3] == ["code", "type", "message"]
    server.wait_for(lambda: exchange(server, told({})).status == 200, "the worker to be back")


def test_1_7_an_answer_over_the_limit_names_it(server: Server) -> None:
    answer = exchange(server, told({"give": "big"}))
    assert (answer.status, answer.json["type"]) == (503, INTERNAL)
    assert f"{SIZE_MAX + 1} bytes, more than max_response_size={SIZE_MAX}" in answer.json["message"]
    assert exchange(server, told({})).status == 200


def test_1_7_a_status_of_the_handler_has_its_body(server: Server) -> None:
    answer = exchange(server, told({"status": 422, "give": "dict"}))
    assert (answer.status, answer.json) == (422, {"a": [1, 2.5], "b": {"c": True}})


def test_1_7_a_call_over_its_time_is_504(server: Server) -> None:
    answer = exchange(server, told({"sleep": 60}, "slow"))
    assert (answer.status, answer.json["type"]) == (504, INTERNAL)
    assert "response_timeout=1" in answer.json["message"]
    assert exchange(server, told({}, "slow")).status == 200


@pytest.mark.parametrize("bad", [{"raise": "ValueError"}, {"give": "object"}])
def test_1_7_one_bad_item_fails_alone(server: Server, bad: dict[str, Any]) -> None:
    answers = at_once([lambda order=order: exchange(server, told(order, "pair")) for order in (bad, {"give": "int"})])
    assert [(answer.status, answer.body if answer.status == 200 else None) for answer in answers] == [
        (503, None), (200, b"3"),
    ]  # fmt: skip


@pytest.mark.parametrize("version", ["", "/1.0"])
def test_1_7_without_workers(server: Server, version: str) -> None:
    server.manage("PUT", "/models/pair?min_worker=0&max_worker=0&synchronous=true")
    try:
        answer = exchange(server, request("POST", f"/predictions/pair{version}", b"x"))
    finally:
        server.manage("PUT", "/models/pair?min_worker=1&synchronous=true")
    assert (answer.status, answer.json["type"]) == (503, "ServiceUnavailableException")
    named = 'Model "pair" Version 1.0" has no worker' if version else 'Model "pair" has no worker'
    assert answer.json["message"].startswith(f"{named} to serve inference request.")


@pytest.mark.parametrize(
    "sent",
    [b"nonsense\r\n\r\n", b"GET /ping HTTP/1.1\r\nbad header\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"],
)
def test_1_7_what_is_no_http_is_closed_after_the_answer(server: Server, sent: bytes) -> None:
    answer = exchange(server, sent)
    assert answer.is_closed and answer.header("connection") == "close"
    assert answer.json["message"].startswith("Invalid HTTP message") and answer.json["type"] == "BadRequestException"


# --- 1.8: streams -----------------------------------------------------------------------------------------------------


def stream(server: Server, order: dict[str, Any]) -> tuple[bytes, bytes]:
    """Head and the rest of a streamed answer as they were sent, up to its end or the connection's."""
    with server.connect() as connection:
        connection.sendall(told(order))
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            try:
                part = connection.recv(65536)
            except ConnectionResetError:
                break
            if not part:
                break
            received += part
    head, _, rest = received.partition(b"\r\n\r\n")
    return head, rest


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def test_1_8_a_stream_is_one_chunk_for_each_part(server: Server) -> None:
    order = {"parts": ["one", "two"], "type": "text/plain", "headers": {"X-A": "1"}, "give": "int"}
    head, rest = stream(server, order)
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 "
    for line in (b"ts_stream_next: true", b"transfer-encoding: chunked", b"content-type: text/plain", b"X-A: 1"):
        assert line in lines
    assert b"content-length" not in head.lower()
    assert rest == chunks(b"one", b"two", b"3") + b"0\r\n\r\n"


def test_1_8_without_a_type_of_the_handler_a_stream_has_none(server: Server) -> None:
    head, _ = stream(server, {"parts": ["one"]})
    assert b"content-type" not in head.lower()


def test_1_8_a_failing_stream_is_cut_off_without_an_end(server: Server) -> None:
    _, rest = stream(server, {"parts": ["one", "raise"]})
    assert rest == chunks(b"one")


def test_1_8_a_stream_counts_once(server: Server) -> None:
    before = server.metric("Requests2XX_total"), server.metric("ts_inference_requests_total", model_name="does")
    stream(server, {"parts": ["one", "two"]})
    after = server.metric("Requests2XX_total"), server.metric("ts_inference_requests_total", model_name="does")
    assert after[1] == before[1] + 1
    assert after[0] == before[0] + 3  # and both calls that asked for the metrics


# --- 1.9: limits ------------------------------------------------------------------------------------------------------


def test_1_9_a_body_at_the_limit_passes_and_one_above_is_told_both_sizes(server: Server) -> None:
    assert exchange(server, request("POST", "/predictions/does", b"x" * SIZE_MAX)).status == 200
    answer = exchange(server, request("POST", "/predictions/does", b"x" * (SIZE_MAX + 1)))
    assert (answer.status, answer.json["type"]) == (413, "BadRequestException")
    for part in ("max_request_size", str(SIZE_MAX), str(SIZE_MAX + 1)):
        assert part in json.dumps(answer.json)


@pytest.mark.parametrize(("size", "line"), [(5, b"HTTP/1.1 100 Continue\r\n"), (SIZE_MAX + 1, b"HTTP/1.1 413 ")])
def test_1_9_expectations_are_met_by_size(server: Server, size: int, line: bytes) -> None:
    head = f"POST /predictions/does HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {size}\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode())
        assert connection.makefile("rb").readline().startswith(line)


def test_1_9_a_job_ticket_lets_in_only_what_a_worker_waits_for(server: Server, tmp_path: Path) -> None:
    assert exchange(server, told({}, "ticket")).status == 200
    hold = tmp_path / "hold"
    hold.touch()

    def is_running() -> bool:
        return server.metric("pyserve_batches_running", model="ticket") == 1

    with server.connect() as connection:
        connection.settimeout(LIMIT_S)
        connection.sendall(told({"hold": str(hold)}, "ticket"))
        server.wait_for(is_running, "the first request to run")
        refused = exchange(server, told({}, "ticket"))
        assert (refused.status, refused.json["type"]) == (503, "ServiceUnavailableException")
        assert refused.json["message"].startswith('Model "ticket" has no worker to serve inference request.')
        hold.unlink()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert server.ask("POST", "/predictions/ticket", b"{}", JSON).status == 200
