"""A client's own limit, told in ``x-request-timeout-ms``: it holds in the queue and while running, on every path."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pyserve.errors import BadRequestError
from pyserve.request.deadline import TIMEOUT_MAX_MS, client_deadline
from pyserve.request.messages import TIMEOUT_HEADER, Request
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.networks import Gate, Gated
from tests.support.serving import JSON, LIMIT_S, Answer, Server

LONG = str(TIMEOUT_MAX_MS)
HELD = 7  # what begins the requests that a gate holds up

# Notes each request that it is called with; a request may wait for a file.
NOTES = """
import os
import time


class Notes:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        orders = [row["body"] for row in data]
        for order in orders:
            with open(order["notes"], "a") as file:
                file.write(order["name"] + "\\n")
        for order in orders:
            while "until" in order and not os.path.exists(order["until"]):
                time.sleep(0.001)
        return [{"name": order["name"], "batch": len(orders), "pid": os.getpid()} for order in orders]
"""


# Says when it runs, then goes on until its client has gone, which it notes.
WATCHER = """
import json
import time


class Watcher:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        orders = [row["body"] for row in data]
        remaining = [context.remaining_s(index) for index in range(len(data))]
        for order in orders:
            open(order["notes"] + ".running", "w").close()
        while not context.is_cancelled(0):
            time.sleep(0.001)
        gone = [context.is_cancelled(index) for index in range(len(data))] + [context.cancelled]
        with open(orders[0]["notes"], "w") as file:
            json.dump({"gone": gone, "remaining": remaining}, file)
        return ["seen"] * len(data)
"""


# Streams without end, and notes how it came to one.
ENDLESS = """
import time


def handle(data, context):
    if data is not None:
        return parts(data[0]["body"]["notes"], context)


def parts(notes, context):
    try:
        while True:
            time.sleep(0.001)
            yield ["part"]
    finally:
        with open(notes, "w") as file:
            file.write(f"cancelled={context.is_cancelled()}")
"""


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Of the model ``gated``: whoever shuts it opens it again."""
    return Gate(tmp_path_factory.mktemp("gate") / "gate")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("deadlines"))
    serving_models.write_torchscript(
        server.store, Gated(str(gate.path)), "gated", config={"input": {"dtype": "float32", "shape": [2]}}
    )
    write_handler(server.store, "notes", NOTES)
    write_handler(server.store, "pairs", NOTES, config={"batchSize": 2, "minBatch": 2, "maxBatchDelay": 600_000})
    write_handler(server.store, "watcher", WATCHER, config={
        "batchSize": 2, "minBatch": 2, "maxBatchDelay": 600_000,
    })  # fmt: skip
    write_handler(server.store, "endless", ENDLESS)
    write_handler(server.store, "sequence", NOTES, config={
        "sequenceBatching": True, "maxNumSequence": 10, "maxSequenceJobQueueSize": 10,
    })  # fmt: skip
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


def hang_up(connection: socket.socket, *, resets: bool) -> None:
    if resets:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


class Desk:
    """Sends requests to handlers of NOTES from threads, and reads their notes."""

    def __init__(self, server: Server, folder: Path):
        self._server = server
        self.path = folder / "notes"
        self._gate = folder / "open"
        self._pool = ThreadPoolExecutor(8)

    def send(self, path: str, name: str, timeout_ms: str | None = None, **headers: str) -> Future[Answer]:
        """A request that waits until the gate is open, unless its name is ``quick``."""
        order = {"name": name, "notes": str(self.path)}
        if name != "quick":
            order["until"] = str(self._gate)
        more = {TIMEOUT_HEADER: timeout_ms} if timeout_ms is not None else {}
        return self._pool.submit(
            self._server.ask, "POST", path, json.dumps(order).encode(), {**JSON, **more, **headers}
        )  # fmt: skip

    def notes(self) -> list[str]:
        return self.path.read_text().split() if self.path.exists() else []

    def wait_for_note(self, name: str) -> None:
        self._server.wait_for(lambda: name in self.notes(), f"the call for {name}")

    def open(self) -> None:
        self._gate.touch()

    def close(self) -> None:
        self.open()
        self._pool.shutdown()


@pytest.fixture
def desk(server: Server, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(server, tmp_path)
    yield desk
    desk.close()


def of(pairs: list[tuple[str, str]]) -> Request:
    return Request("POST", "/", headers=pairs, arrived_at=5)


@pytest.mark.parametrize(("value", "expected"), [("1", 1_000_005), (LONG, TIMEOUT_MAX_MS * 1_000_000 + 5)])
def test_a_limit_counts_from_the_arrival(value: str, expected: int) -> None:
    request = of([("X-Request-Timeout-Ms", value)])
    assert request.has_timing and client_deadline(request) == expected


def test_without_the_header_there_is_no_limit() -> None:
    request = of([("Accept", "*/*")])
    assert not request.has_timing and client_deadline(request) == 0


BAD = ["0", "-1", "", "1.5", "1e3", "nan", "100 ms", "+5", "١", str(TIMEOUT_MAX_MS + 1), "9" * 5000, "5, 6"]


@pytest.mark.parametrize("value", BAD)
def test_what_is_no_limit_is_refused(value: str) -> None:
    with pytest.raises(BadRequestError, match=rf"{TIMEOUT_HEADER} must be .* from 1 to {TIMEOUT_MAX_MS}"):
        client_deadline(of([(TIMEOUT_HEADER, value)]))


@pytest.mark.server
@pytest.mark.parametrize("value", ["0", "-1", "soon", "9" * 100])
@pytest.mark.parametrize("path", [
    "/predictions/notes", "/predictions/gated", "/v1/models/notes:predict", "/v2/models/notes/infer",
    "/models/notes/invoke", "/explanations/notes", "/notes/predict", "/invocations?model_name=notes",
])  # fmt: skip
def test_a_bad_limit_is_a_400_that_names_it_and_the_model_is_not_called(
    desk: Desk, path: str, value: str
) -> None:  # fmt: skip
    answer = desk.send(path, "quick", value).result()
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert TIMEOUT_HEADER in answer.json["message"] and f"from 1 to {TIMEOUT_MAX_MS}" in answer.json["message"]
    assert desk.notes() == []


@pytest.mark.server
@pytest.mark.parametrize("path", [
    "/predictions/notes", "/predictions/notes/1.0", "/v1/models/notes:predict", "/models/notes/invoke",
    "/invocations?model_name=notes", "/explanations/notes",
])  # fmt: skip
def test_a_request_that_waits_past_its_clients_limit_never_runs(server: Server, desk: Desk, path: str) -> None:
    first = desk.send("/predictions/notes", "first")
    desk.wait_for_note("first")
    late = desk.send(path, "late", "30").result()
    assert (late.status, late.json["type"]) == (503, "ServiceUnavailableException")
    assert (late.detail["reason"], late.detail["limit"]) == ("expired", f"{TIMEOUT_HEADER}=30")
    assert late.detail["queued_s"] >= 0.03 and int(late.headers["retry-after"]) > 0
    patient = desk.send(path, "patient", LONG)
    desk.open()
    assert (first.result().status, patient.result().status) == (200, 200)
    assert desk.notes() == ["first", "patient"]


@pytest.mark.server
def test_one_that_runs_is_answered_at_its_limit_and_its_batch_goes_on(server: Server, desk: Desk) -> None:
    late = desk.send("/predictions/pairs", "late", "2000")
    other = desk.send("/predictions/pairs", "other")
    answer = late.result()
    assert (answer.status, answer.json["type"]) == (504, "InternalServerException")
    assert answer.detail["reason"] == TIMEOUT_HEADER and f"limit {TIMEOUT_HEADER}=2000" in answer.json["message"]
    assert not other.done()
    pid = server.describe("pairs")["workers"][0]["pid"]
    desk.open()
    assert other.result().json == {"name": "other", "batch": 2, "pid": pid}  # the worker lives, and it is the same
    assert sorted(desk.notes()) == ["late", "other"]
    assert server.describe("pairs")["workers"][0]["pid"] == pid


@pytest.mark.server
def test_a_limit_longer_than_the_models_changes_nothing(server: Server, desk: Desk) -> None:
    server.manage("PUT", "/models/notes?response_timeout=1")
    try:
        answer = desk.send("/predictions/notes", "slow", LONG).result()
        assert answer.status == 504 and "response_timeout=1 s" in answer.json["message"]
    finally:
        desk.open()
        server.manage("PUT", "/models/notes?response_timeout=120")
    assert desk.send("/predictions/notes", "quick").result().status == 200


@pytest.mark.server
def test_in_a_sequence_one_that_waits_for_the_one_before_it_expires(server: Server, desk: Desk) -> None:
    first = desk.send("/predictions/sequence", "first", ts_request_sequence_id="a")
    desk.wait_for_note("first")
    late = desk.send("/predictions/sequence", "late", "30", ts_request_sequence_id="a").result()
    assert (late.status, late.detail["limit"]) == (503, f"{TIMEOUT_HEADER}=30")
    after = desk.send("/predictions/sequence", "after", LONG, ts_request_sequence_id="a")
    desk.open()
    assert (first.result().status, after.result().status) == (200, 200)
    assert desk.notes() == ["first", "after"]


def ask_gated(server: Server, timeout_ms: str = "") -> Answer:
    headers = {**JSON, **({TIMEOUT_HEADER: timeout_ms} if timeout_ms else {})}
    return server.ask("POST", "/predictions/gated", json.dumps([HELD, 1]).encode(), headers)


def overrun(ask: Callable[[str], Answer]) -> Answer:
    """The answer to a request that still runs at its limit: on a busy machine a longer one, so that it has begun."""
    for timeout_ms in ("200", "2000", "20000"):
        answer = ask(timeout_ms)
        if answer.status != 503:
            break
    return answer


@pytest.mark.server
def test_the_native_lane_keeps_a_clients_limit_while_queued_and_while_running(server: Server, gate: Gate) -> None:
    def running_count() -> float:
        return server.metric("pyserve_batches_running", model="gated")

    (about,) = server.ask("GET", "/v2/models/gated").json["inputs"]  # which runs it, too
    answers: list[Answer] = []
    running = threading.Thread(target=lambda: answers.append(ask_gated(server)))
    runs = gate.runs_of(HELD)
    gate.shut()
    running.start()
    server.wait_for(lambda: gate.runs_of(HELD) == runs + 1, "the batch")
    expired = server.metric("pyserve_requests_rejected_total", model="gated", reason="expired")
    late = ask_gated(server, "20")
    assert (late.status, late.detail["limit"]) == (503, f"{TIMEOUT_HEADER}=20")
    assert server.metric("pyserve_requests_rejected_total", model="gated", reason="expired") == expired + 1
    gate.open()
    running.join(LIMIT_S)
    assert answers[0].status == 200 and answers[0].json == [2.0 * HELD, 2.0]
    assert ask_gated(server).status == 200 and gate.runs_of(HELD) == runs + 2
    gate.shut()
    over = overrun(lambda timeout_ms: ask_gated(server, timeout_ms))
    assert over.status == 504 and over.detail["reason"] == TIMEOUT_HEADER
    assert over.detail["ran_s"] > 0
    tensor = {"name": about["name"], "datatype": "FP32", "shape": [1, 2], "data": [HELD, 1]}
    body = json.dumps({"inputs": [tensor]}).encode()
    gate.open()
    server.wait_for(lambda: running_count() == 0, "its end")
    gate.shut()
    of_rows = overrun(
        lambda timeout_ms: server.ask("POST", "/v2/models/gated/infer", body, {**JSON, TIMEOUT_HEADER: timeout_ms})
    )
    assert of_rows.status == 504 and of_rows.detail["reason"] == TIMEOUT_HEADER
    gate.open()
    server.wait_for(lambda: running_count() == 0, "its end")
    assert gate.runs_of(HELD) == runs + 4


@pytest.mark.server
@pytest.mark.parametrize("leaves", ["resets", "closes", ""])
def test_a_handler_sees_who_has_gone_and_how_long_the_others_wait(
    server: Server, tmp_path: Path, leaves: str
) -> None:  # fmt: skip
    notes = tmp_path / "notes"
    body = json.dumps({"notes": str(notes)}).encode()
    limit = b"" if leaves else f"{TIMEOUT_HEADER}: 3000\r\n".encode()
    head = b"POST /predictions/watcher HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%b"
    first = server.connect()
    first.sendall(head % limit + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    server.wait_for(lambda: server.metric("pyserve_queue_size", model="watcher") == 1, "the first in the queue")
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(server.ask, "POST", "/predictions/watcher", body, {**JSON, TIMEOUT_HEADER: LONG})
        server.wait_for((tmp_path / "notes.running").exists, "the call")
        assert not notes.exists()
        if leaves:
            hang_up(first, resets=leaves == "resets")
        assert patient.result().body == b"seen"
    seen = json.loads(notes.read_text())
    assert seen["gone"] == [True, False, False]
    assert seen["remaining"][0] is None if leaves else 0 < seen["remaining"][0] < 3
    assert 80_000 < seen["remaining"][1] < 86_400
    if not leaves:
        assert first.recv(12) == b"HTTP/1.1 504"
        first.close()


@pytest.mark.server
@pytest.mark.parametrize("resets", [True, False])
def test_a_client_that_hangs_up_while_it_waits_is_never_run(server: Server, desk: Desk, resets: bool) -> None:
    aborted = server.metric("pyserve_requests_aborted_total", model="notes")
    first = desk.send("/predictions/notes", "first")
    desk.wait_for_note("first")
    body = json.dumps({"name": "gone", "notes": str(desk.path)}).encode()
    with server.connect() as gone:
        gone.sendall(b"POST /predictions/notes HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
        server.wait_for(lambda: server.metric("pyserve_queue_size", model="notes") == 1, "it in the queue")
        hang_up(gone, resets=resets)
    server.wait_for(lambda: server.metric("pyserve_requests_aborted_total", model="notes") == aborted + 1, "its end")
    after = desk.send("/predictions/notes", "after")
    desk.open()
    assert (first.result().status, after.result().status) == (200, 200)
    assert desk.notes() == ["first", "after"]


@pytest.mark.server
def test_a_client_that_only_sends_no_more_still_has_its_answer(server: Server, desk: Desk) -> None:
    body = json.dumps({"name": "patient", "notes": str(desk.path), "until": str(desk.path) + ".never"}).encode()
    with server.connect() as client:
        client.sendall(b"POST /predictions/notes HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
        client.shutdown(socket.SHUT_WR)
        desk.wait_for_note("patient")
        received = b""
        while received.count(b"\r\n\r\n") < 2:  # it is asked twice whether it is there
            received += client.recv(1000)
        assert received == b"HTTP/1.1 100 Continue\r\n\r\n" * 2
        Path(str(desk.path) + ".never").touch()
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 \r\n")
    assert b'"name": "patient"' in answer


@pytest.mark.server
@pytest.mark.parametrize("how", ["resets", "closes", "limit"])
def test_a_stream_ends_when_its_client_has_gone_or_its_time_is_over(server: Server, tmp_path: Path, how: str) -> None:
    notes = tmp_path / "notes"
    body = json.dumps({"notes": str(notes)}).encode()
    limit = f"{TIMEOUT_HEADER}: 1000\r\n".encode() if how == "limit" else b""
    with server.connect() as client:
        client.sendall(b"POST /predictions/endless HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n%b"
                       b"Content-Length: %d\r\n\r\n%b" % (limit, len(body), body))  # fmt: skip
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        if how == "limit":
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := client.recv(65536):
                    received += part
            # The head has left: what came must not be taken for all, so the last chunk is missing.
            assert received and not received.endswith(b"0\r\n\r\n")
        else:
            hang_up(client, resets=how == "resets")
        server.wait_for(lambda: notes.exists() and bool(notes.read_text()), "the end of the stream")
    assert notes.read_text() == "cancelled=True"
    assert server.describe("endless")["workers"][0]["status"] == "READY"


@pytest.mark.server
def test_the_first_explanation_does_not_wait_longer_for_its_worker_than_the_client(server: Server) -> None:
    late = server.ask("POST", "/explanations/gated", b"[7, 1]", {**JSON, TIMEOUT_HEADER: "1"})
    assert (late.status, late.detail["reason"], late.detail["limit"]) == (503, "expired", f"{TIMEOUT_HEADER}=1")
    refused = server.ask("POST", "/explanations/gated", b"[7, 1]", {**JSON, TIMEOUT_HEADER: "0"})
    assert refused.status == 400
    patient = server.ask("POST", "/explanations/gated", b"[7, 1]", {**JSON, TIMEOUT_HEADER: LONG})
    assert patient.status not in (400, 504) and patient.body != late.body
