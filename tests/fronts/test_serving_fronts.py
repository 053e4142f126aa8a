"""A server with two front ends over real sockets: the same answers, and what one of its processes costs that ends."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.front_ends import through
from tests.support.handler_archives import write_handler
from tests.support.raw_http import exchange, request
from tests.support.serving import JSON, LIMIT_S, RAW, Client, Server, at_once
from tests.support.serving_models import Linear, write_linear

pytestmark = pytest.mark.server

ITEM = [1.0, 2.0, 3.0, 4.0]
ECHO = """
import os
import time

from ts.handler_utils.utils import send_intermediate_predict_response


def handle(data, context):
    if data is None:
        return None
    answers = []
    for row in data:
        body = row.get("body")
        if isinstance(body, dict) and "wait" in body:
            open(body["wait"] + ".begun", "w").close()
            while not os.path.exists(body["wait"]):
                time.sleep(0.01)
                context.is_cancelled() if hasattr(context, "is_cancelled") else None
        if isinstance(body, dict) and "stream" in body:
            for number in range(body["stream"]):
                send_intermediate_predict_response([f"part {number};"], context.request_ids, "", 200, context)
        answers.append(body)
    return answers
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with two front ends; leave it as you found it."""
    server = Server(tmp_path_factory.mktemp("fronts"))
    write_linear(server.store, "linear")
    write_handler(server.store, "echo", ECHO, config={"maxWorkers": 2, "minWorkers": 2})
    with server:
        server.start("--models", "all", "--front-ends", "2")
        yield server


def both(server: Server) -> list[Client]:
    return [through(server, process) for process in server.front_ends]


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def end_of(process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
    fd = os.pidfd_open(process.pid)
    try:
        os.kill(process.pid, number)
        assert select.select([fd], [], [], LIMIT_S)[0]
    finally:
        os.close(fd)


def test_both_answer_and_as_the_network_does(pair: Server) -> None:
    with torch.no_grad():
        wanted = Linear()(torch.tensor([ITEM]))[0].tolist()
    assert len(pair.front_ends) == 2
    for client in both(pair):
        with client:
            for _ in range(3):
                answer = client.predict("linear", ITEM)
                assert answer.status == 200 and answer.json == pytest.approx(wanted)
            raw = client.ask("POST", "/predictions/linear", torch.tensor(ITEM).numpy().tobytes(), RAW)
            assert raw.status == 200 and list(struct.unpack("<3f", raw.body)) == pytest.approx(wanted)
    assert all(pair.metric("pyserve_front_end_requests_total", front_end=each) > 0 for each in ("0", "1"))


@pytest.mark.parametrize("size", [0, 1, 4096, 65_536, 300_000, 6_553_500])
def test_bodies_of_all_sizes_come_back_as_they_were(pair: Server, size: int) -> None:
    body = os.urandom(size)
    for client in both(pair):
        with client:
            answer = client.ask("POST", "/predictions/echo", body, RAW)
            assert answer.status == 200 and answer.body == body


def test_a_body_over_the_limit_and_a_chunked_one(pair: Server) -> None:
    assert pair.ask("POST", "/predictions/echo", bytes(6_553_501), RAW).status == 413
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in (b"a" * 70_000, b"bc", b"d")) + b"0\r\n\r\n"
    came = exchange(pair, request("POST", "/predictions/echo", b"", "Transfer-Encoding: chunked") + chunks)
    assert (came.status, came.body) == (200, b"a" * 70_000 + b"bcd")


def test_pipelined_requests_are_answered_in_their_order(pair: Server) -> None:
    bodies = [b"%d" % number * (1 + 5000 * (number % 3)) for number in range(100, 120)]
    with pair.connect() as connection:
        connection.sendall(b"".join(request("POST", "/predictions/echo", body, "Content-Type: a/b") for body in bodies))
        rest = b""
        for body in bodies:
            while (end := rest.find(b"\r\n\r\n")) < 0:
                rest += connection.recv(65536)
            size = re.search(rb"content-length: (\d+)", rest[:end])
            assert size is not None and rest.startswith(b"HTTP/1.1 200")
            while len(rest) < end + 4 + int(size[1]):
                rest += connection.recv(65536)
            assert rest[end + 4 : end + 4 + int(size[1])] == body
            rest = rest[end + 4 + int(size[1]) :]


def test_parts_are_streamed(pair: Server) -> None:
    answer = pair.ask("POST", "/predictions/echo", json.dumps({"stream": 3}).encode(), JSON)
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.body.startswith(b"part 0;part 1;part 2;")


def test_a_client_that_hangs_up_cancels_what_waits(pair: Server, tmp_path: Path) -> None:
    go = tmp_path / "go"
    order = json.dumps({"wait": str(go)}).encode()
    holding = [threading.Thread(target=pair.ask, args=("POST", "/predictions/echo", order, JSON)) for _ in range(2)]
    for each in holding:
        each.start()
    wait_until(lambda: pair.metric("pyserve_batches_running", model="echo") == 2, "both workers to be busy")
    before = pair.metric("pyserve_cancelled_total", model="echo")
    for waiting, process in enumerate(pair.front_ends, 1):
        client = through(pair, process)
        client._connection.request("POST", "/predictions/echo", b"x", RAW)
        wait_until(lambda count=waiting: pair.metric("pyserve_queue_size", model="echo") == count, "it to wait")
        client._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *[0] * 7]))  # a reset
        client.close()
        through(pair, process).close()  # it has been answered behind what cancels, and so the workers come too late
    go.touch()
    for each in holding:
        each.join(LIMIT_S)
    wait_until(lambda: pair.metric("pyserve_cancelled_total", model="echo") == before + 2, "both to be cancelled")


def test_a_deadline_holds(pair: Server) -> None:
    headers = {**RAW, "x-request-timeout-ms": "0.5"}
    assert pair.ask("POST", "/predictions/echo", b"x", headers).status in (400, 504)


def test_one_queue_for_both(pair: Server, tmp_path: Path) -> None:
    """As many as fit the queue wait, wherever they came in; one more is refused."""
    pair.manage("PUT", "/models/echo?job_queue_size=4")
    go = tmp_path / "go"
    order = json.dumps({"wait": str(go)}).encode()
    holding = [threading.Thread(target=pair.ask, args=("POST", "/predictions/echo", order, JSON)) for _ in range(2)]
    clients: list[Client] = []
    try:
        for each in holding:
            each.start()
        wait_until(lambda: pair.metric("pyserve_batches_running", model="echo") == 2, "both workers to be busy")
        first, second = pair.front_ends
        for process in (first, second, first, second):
            client = through(pair, process)
            clients.append(client)
            client._connection.request("POST", "/predictions/echo", b"x", RAW)
        wait_until(lambda: pair.metric("pyserve_queue_size", model="echo") == 4, "four to wait")
        for process in (first, second):
            with through(pair, process) as client:
                answer = client.ask("POST", "/predictions/echo", b"x", RAW)
                assert answer.status == 503 and answer.detail["waiting"] == 4
    finally:
        go.touch()
    assert [client._connection.getresponse().status for client in clients] == [200] * 4
    pair.manage("PUT", "/models/echo?job_queue_size=100")


def test_management_and_metrics_from_either(pair: Server) -> None:
    pages = set()
    for process in pair.front_ends:
        with through(pair, process, "management") as client:
            assert [model["modelName"] for model in client.ask("GET", "/models").json["models"]] == ["echo", "linear"]
            assert client.ask("PUT", "/models/linear?min_worker=1").status in (200, 202)
        with through(pair, process, "metrics") as client:
            page = client.ask("GET", "/metrics").body.decode()
            pages.add(frozenset(line.partition("{")[0] for line in page.splitlines() if "front_end" in line))
    assert len(pages) == 1


def test_refusals_of_both_are_one_sum(pair: Server) -> None:
    def refused() -> float:
        return pair.metric("ts_inference_requests_total") * 0 + sum(
            value for name, value in _samples(pair) if 'status="400"' in name or "4XX" in name.upper()
        )

    before = refused()
    for process in pair.front_ends:
        with through(pair, process) as client:
            client._connection.sock.sendall(b"rubbish\r\n\r\n")
            assert client._connection.sock.recv(12) == b"HTTP/1.1 400"
    wait_until(lambda: refused() >= before + 2, "both refusals to be counted")


def _samples(server: Server) -> list[tuple[str, float]]:
    lines = server.ask("GET", "/metrics", port="metrics").body.decode().splitlines()
    return [(line.rpartition(" ")[0], float(line.rpartition(" ")[2])) for line in lines if line and line[0] != "#"]


def test_the_access_log_has_the_lines_of_both(pair: Server) -> None:
    for number, process in enumerate(pair.front_ends):
        with through(pair, process) as client:
            client.ask("GET", f"/nowhere-{number}")
    path = pair.folder / "logs/access_log.log"
    wait_until(lambda: all(f"/nowhere-{number} " in path.read_text() for number in (0, 1)), "both lines")


def test_a_front_end_that_is_killed_takes_only_its_own_connections_and_is_back(pair: Server) -> None:
    first, second = pair.front_ends
    with through(pair, first) as lost, through(pair, second) as kept:
        end_of(first)
        with pytest.raises((ConnectionError, OSError)):
            lost.ask("GET", "/live")
        assert kept.predict("linear", ITEM).status == 200
        wait_until(lambda: len(pair.front_ends) == 2, "it to be back")
        back = next(process for process in pair.front_ends if process.pid != second.pid)
        with through(pair, back) as client:
            assert client.predict("linear", ITEM).status == 200
        assert kept.predict("linear", ITEM).status == 200


def test_clients_that_come_while_their_front_end_is_away_wait_for_it(pair: Server) -> None:
    for process in pair.front_ends:
        process.kill()
    answers = at_once([lambda: pair.predict("linear", ITEM).status] * 8)
    assert answers == [200] * 8


def test_while_there_is_no_engine_connections_stay_and_are_told_when_to_come_again(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store, "linear")
    write_handler(server.store, "echo", ECHO)
    server.start("--models", "all", "--front-ends", "2")
    try:
        clients = both(server)
        waiting = through(server, server.front_ends[0])
        order = json.dumps({"wait": str(tmp_path / "x")}).encode()
        waiting._connection.request("POST", "/predictions/echo", order, JSON)
        wait_until((tmp_path / "x.begun").exists, "it to run")
        server.kill_server_process()
        answer = waiting._connection.getresponse()
        assert answer.status == 503 and answer.headers["Retry-After"] == "1"
        statuses = []
        for client in clients:
            answer = client.predict("linear", ITEM)
            statuses.append(answer.status)
            assert answer.status == 200 or (answer.status == 503 and answer.headers["retry-after"] == "1")
        assert 503 in statuses
        for client in clients:  # the same connections
            wait_until(lambda client=client: client.predict("linear", ITEM).status == 200, "the engine to be back")
            client.close()
        assert "Traceback" not in server.log()
        assert server.run("stop").returncode == 0
    finally:
        server.kill()


def test_sigterm_loses_no_request_that_was_sent(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store, "linear")
    write_handler(server.store, "echo", ECHO, config={"maxWorkers": 2, "minWorkers": 2})
    server.start("--models", "all", "--front-ends", "2")
    try:
        go = tmp_path / "go"
        clients = both(server)
        for client in clients:
            client._connection.request("POST", "/predictions/echo", json.dumps({"wait": str(go)}).encode(), JSON)
        wait_until(lambda: server.metric("pyserve_batches_running", model="echo") == 2, "both to run")
        processes = [psutil.Process(server.running.pid), server.process, *server.front_ends]
        os.kill(server.running.pid, signal.SIGTERM)
        wait_until(lambda: _is_refused(server), "nobody to be let in")
        go.touch()
        for client in clients:
            answer = client._connection.getresponse()
            assert answer.status == 200 and answer.headers["connection"] == "close"
        _, alive = psutil.wait_procs(processes, LIMIT_S)
        assert not alive and "Traceback" not in server.log()
        assert "drained" in server.log()
    finally:
        server.kill()


def _is_refused(server: Server) -> bool:
    try:
        socket.create_connection(server.address(), timeout=0.5).close()
    except OSError:
        return True
    return False


def asks_for(client: Client, size: int) -> bytes:
    """What the server says to somebody who wants to send a body of that size, before it is sent."""
    connection = client._connection.sock
    connection.sendall(b"POST /predictions/echo HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\n"
                       b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size)  # fmt: skip
    answer: bytes = connection.recv(65536)
    return answer.split(b"\r\n")[0]


def test_one_budget_of_bodies_for_both(tmp_path: Path) -> None:
    """One may have more than half of it; then the other one has less; and what dies with one comes back."""
    server = Server(tmp_path)
    write_handler(server.store, "echo", ECHO)
    server.environment["PYSERVE_MAX_REQUEST_SIZE"] = "200000000"
    server.start("--models", "all", "--front-ends", "2")
    try:
        first, second = server.front_ends
        with through(server, first) as large, through(server, second) as other:
            assert asks_for(large, 170_000_000) == b"HTTP/1.1 100 Continue"
            large._connection.sock.sendall(bytes(150_000_000))
            wait_until(lambda: first.memory_info().rss > 150_000_000, "it to have come")
            assert asks_for(other, 150_000_000) == b"HTTP/1.1 503 Service Unavailable"
        with through(server, second) as other:
            assert asks_for(other, 60_000_000) == b"HTTP/1.1 100 Continue"
        with through(server, first) as large:  # the former one has hung up
            assert asks_for(large, 170_000_000) == b"HTTP/1.1 100 Continue"
            large._connection.sock.sendall(bytes(150_000_000))
            wait_until(lambda: first.memory_info().rss > 150_000_000, "it to have come")
            end_of(first)
        with through(server, second) as other:
            wait_until(lambda: len(server.front_ends) == 2, "it to be back")
            assert asks_for(other, 200_000_000) == b"HTTP/1.1 100 Continue"
        assert server.run("stop").returncode == 0
        assert "Traceback" not in server.log()
    finally:
        server.kill()


def test_what_cannot_be_served_with_them_is_said_at_start(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.environment["PYSERVE_CONNECTION_COUNT_MAX"] = "1"
    failed = server.run("start", "--front-ends", "2")
    assert failed.returncode != 0 and "connection_count_max=1 cannot be divided" in failed.stderr + failed.stdout
    failed = server.run("start", "--front-ends", "0")
    assert failed.returncode != 0 and "front_ends cannot be '0'" in failed.stderr
