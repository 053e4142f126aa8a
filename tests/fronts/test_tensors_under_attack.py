"""Requests that cross as tensors, when something goes wrong or changes meanwhile: over real sockets and processes."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
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

from pyserve.fronts.channel import MEMORY_SIZE
from tests.support.networks import Gate, Gated
from tests.support.serving import JSON, LIMIT_S, RAW, SEED, Client, Server, at_once
from tests.support.serving_models import Linear, write_linear, write_torchscript

pytestmark = pytest.mark.server

ITEM = torch.tensor([1.0, 2.0, 3.0, 4.0])
BODY = ITEM.numpy().tobytes()
# What begins the request that a gate holds up, and one that nobody waits for.
HELD = 7
FREE = struct.pack("<2f", 1, 0)


def right(seed: int = 0) -> bytes:
    with torch.no_grad():
        return Linear(seed)(ITEM.unsqueeze(0)).numpy().tobytes()


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    """Of the model ``gated``: whoever shuts it opens it again."""
    return Gate(tmp_path_factory.mktemp("gate") / "gate")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, gate: Gate) -> Iterator[Server]:
    """A running server with two front ends; leave it as you found it."""
    server = Server(tmp_path_factory.mktemp("tensors"))
    write_linear(server.store, "linear")
    write_torchscript(
        server.store, Gated(str(gate.path)), "gated", config={"input": {"dtype": "float32", "shape": [2]}}
    )
    server.start("--models", "all", "--front-ends", "2")
    wait_until(lambda: crossed(server, "linear", BODY), "tensors to cross")
    wait_until(lambda: crossed(server, "gated", FREE), "tensors to cross")
    try:
        yield server
    finally:
        server.run("stop")
        server.kill()


def crossed(server: Server, model: str, body: bytes) -> bool:
    """Whether a request goes as a tensor."""
    before = server.metric("pyserve_front_end_tensors_total")
    assert server.ask("POST", f"/predictions/{model}", body, RAW).status == 200
    return server.metric("pyserve_front_end_tensors_total") > before


class Many:
    """Clients that ask for ``linear`` without pause; a context.

    Attributes:
        seen: statuses and bodies of answers, in no order; 0 for a connection that was lost.
    """

    def __init__(self, server: Server, count: int = 8):
        self.seen: list[tuple[int, bytes]] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def _ask(self) -> None:
        client = self._server.client()
        while not self._stop.is_set():
            try:
                answer = client.ask("POST", "/predictions/linear", BODY, RAW)
                self.seen.append((answer.status, answer.body))
            except (OSError, ValueError) as error:
                self.seen.append((0, repr(error).encode()))
                client.close()
                client = self._server.client()
        client.close()

    def wait_for_more(self, count: int) -> None:
        wanted = len(self.seen) + count
        wait_until(lambda: len(self.seen) >= wanted, "answers")

    def __enter__(self) -> Many:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._threads:
            each.join(LIMIT_S)


def memory_of(process: psutil.Process) -> int:
    """A descriptor of the memory that a front end shares with the engine; it has none while it looks for it anew."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for path in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if "memfd:pyserve-front" in os.readlink(path):
                    return os.open(path, os.O_RDWR)
        time.sleep(0.02)
    raise AssertionError("a front end without a ring")


def test_one_that_writes_rubbish_into_its_ring_harms_its_own_clients_only(pair: Server) -> None:
    rng = random.Random(SEED)
    print(f"PYSERVE_TEST_SEED={SEED}")
    engine = pair.process.pid
    with Many(pair) as load:
        load.wait_for_more(50)
        for _ in range(6):
            fd = memory_of(rng.choice(pair.front_ends))
            with mmap.mmap(fd, MEMORY_SIZE) as memory:
                for _ in range(rng.choice((1, 20, 2000))):
                    # Mostly where the counters are, and the bytes behind them.
                    at = rng.choice((rng.randrange(256), 4096 + rng.randrange(1 << 16), rng.randrange(MEMORY_SIZE - 8)))
                    memory[at : at + 8] = rng.randbytes(8)
            os.close(fd)
            load.wait_for_more(50)
    assert pair.process.pid == engine
    wrong = [each for each in load.seen if each[0] not in (0, 200, 503)]
    assert not wrong, wrong[0]
    wait_until(lambda: crossed(pair, "linear", BODY), "tensors to cross again")
    assert "Traceback" not in pair.log()


def test_the_version_that_is_the_default_answers_from_the_moment_on_that_it_is(pair: Server) -> None:
    write_torchscript(pair.store, Linear(5), "linear", version="2.0", file="second",
                      config={"input": {"dtype": "float32", "shape": [4]}})  # fmt: skip
    pair.manage("POST", "/models?url=second.mar&initial_workers=1&synchronous=true")
    answers = {"1.0": right(), "2.0": right(5)}
    with Many(pair) as load:
        for turn in range(20):
            version = ("2.0", "1.0")[turn % 2]
            pair.manage("PUT", f"/models/linear/{version}/set-default")
            for client in (pair.client(), pair.client()):
                with client:
                    assert client.ask("POST", "/predictions/linear", BODY, RAW).body == answers[version]
            load.wait_for_more(10)
    assert {status for status, _ in load.seen} == {200}
    assert {body for _, body in load.seen} == set(answers.values())
    pair.manage("DELETE", "/models/linear/2.0")
    assert pair.ask("POST", "/predictions/linear/2.0", BODY, RAW).status == 404


def test_a_model_that_takes_another_shape_now_is_never_given_the_old_one(pair: Server) -> None:
    """The same name is registered and unregistered again with two shapes, while both kinds of requests come."""
    for size in (4, 6):
        write_torchscript(pair.store, torch.nn.Identity(), "shape", file=f"shape{size}",
                          config={"input": {"dtype": "float32", "shape": [size]}})  # fmt: skip
    stop = threading.Event()
    wrong: list[Any] = []

    def ask(size: int) -> None:
        body = struct.pack(f"<{size}f", *range(size))
        with pair.client() as client:
            while not stop.is_set():
                answer = client.ask("POST", "/predictions/shape", body, RAW)
                if answer.status not in (200, 400, 404, 503) or (answer.status == 200 and answer.body != body):
                    wrong.append(answer)

    threads = [threading.Thread(target=ask, args=(size,)) for size in (4, 6) * 3]
    for each in threads:
        each.start()
    try:
        for turn in range(8):
            size = (4, 6)[turn % 2]
            pair.manage("POST", f"/models?url=shape{size}.mar&initial_workers=1&synchronous=true")
            body = struct.pack(f"<{size}f", *range(size))
            assert pair.ask("POST", "/predictions/shape", body, RAW).body == body
            time.sleep(0.3)
            assert pair.ask("POST", "/predictions/shape", body, RAW).body == body
            pair.manage("DELETE", "/models/shape")
            assert pair.ask("POST", "/predictions/shape", body, RAW).status == 404
    finally:
        stop.set()
        for each in threads:
            each.join(LIMIT_S)
    assert not wrong, wrong[0]


def hold(pair: Server, gate: Gate) -> Client:
    """A client whose request runs until the gate is opened."""
    gate.shut()
    runs = gate.runs_of(HELD)
    client = pair.client()
    client._connection.request("POST", "/predictions/gated", struct.pack("<2f", HELD, 0), RAW)
    wait_until(lambda: gate.runs_of(HELD) > runs, "the worker to be busy")
    return client


def answered(clients: list[Client]) -> int:
    """How many have an answer to read."""
    return len(select.select([client._connection.sock for client in clients], [], [], 0)[0])


def test_one_bound_on_the_queue(pair: Server, gate: Gate) -> None:
    """While the worker is busy as many wait as may, wherever they came in; all others are refused."""
    pair.manage("PUT", "/models/gated?job_queue_size=5&batch_size=1")
    clients = [hold(pair, gate), *(pair.client() for _ in range(11))]
    for client in clients[1:]:
        client._connection.request("POST", "/predictions/gated", FREE, RAW)
    wait_until(lambda: answered(clients) >= 6, "six to be refused")
    gate.open()
    answers = [client._connection.getresponse() for client in clients]
    assert [answer.status for answer in answers].count(200) == 6, [answer.status for answer in answers]
    refused = [answer for answer in answers if answer.status != 200]
    assert {answer.status for answer in refused} == {503}
    assert all(json.loads(answer.read())["detail"]["reason"] == "queue full" for answer in refused)
    pair.manage("PUT", "/models/gated?job_queue_size=100")


def test_who_waits_or_runs_for_too_long_is_told_so(pair: Server, gate: Gate) -> None:
    pair.manage("PUT", "/models/gated?batch_size=1")
    running = hold(pair, gate)
    pair.manage("PUT", "/models/gated?client_timeout=50")
    for answer in at_once([lambda: pair.ask("POST", "/predictions/gated", FREE, RAW)] * 2):
        assert (answer.status, answer.detail["reason"]) == (503, "expired"), answer.body
    pair.manage("PUT", "/models/gated?client_timeout=0&response_timeout=1")
    assert running._connection.getresponse().status == 504
    pair.manage("PUT", "/models/gated?response_timeout=120")
    gate.open()
    assert pair.ask("POST", "/predictions/gated", FREE, RAW).status == 200


def test_a_client_that_hangs_up_is_forgotten(pair: Server, gate: Gate) -> None:
    pair.manage("PUT", "/models/gated?batch_size=1")
    before, runs = pair.metric("pyserve_cancelled_total", model="gated"), gate.runs
    running = hold(pair, gate)
    waiting = [pair.client() for _ in range(4)]
    for client in waiting:
        client._connection.request("POST", "/predictions/gated", FREE, RAW)
    wait_until(lambda: pair.metric("pyserve_queue_size", model="gated") == 4, "four to wait")
    for client in waiting:
        client._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *[0] * 7]))  # a reset
        client.close()
    wait_until(lambda: pair.metric("pyserve_requests_in_flight", model="gated") == 1, "four to be forgotten")
    gate.open()
    assert running._connection.getresponse().status == 200
    wait_until(lambda: pair.metric("pyserve_cancelled_total", model="gated") == before + 4, "four to be cancelled")
    assert gate.runs == runs + 1


def test_what_was_admitted_is_answered_before_a_model_goes(pair: Server, gate: Gate) -> None:
    write_torchscript(pair.store, Gated(str(gate.path)), "going", config={"input": {"dtype": "float32", "shape": [2]}})
    pair.manage("POST", "/models?url=going.mar&initial_workers=1&synchronous=true&batch_size=1")
    wait_until(lambda: crossed(pair, "going", FREE), "tensors to cross")
    gate.shut()
    clients = [pair.client() for _ in range(4)]
    for number, client in enumerate(clients):
        client._connection.request("POST", "/predictions/going", struct.pack("<2f", number, 1), RAW)
    wait_until(lambda: pair.metric("pyserve_requests_in_flight", model="going") == 4, "all to be there")
    deleting = threading.Thread(target=pair.manage, args=("DELETE", "/models/going"))
    deleting.start()
    wait_until(lambda: pair.ask("GET", "/models/going", port="management").status == 404, "it to be on its way out")
    gate.open()
    answers = [client._connection.getresponse() for client in clients]
    assert [(answer.status, answer.read()) for answer in answers] == [
        (200, struct.pack("<2f", 2 * number, 2)) for number in range(4)
    ]
    deleting.join(LIMIT_S)


def test_numbers_are_counted_as_ever(pair: Server) -> None:
    def counted() -> tuple[float, float, float]:
        return (
            pair.metric("ts_inference_requests_total", model_name="linear"),
            pair.metric("pyserve_requests_total", model="linear", status="200"),
            pair.metric("pyserve_request_duration_seconds_count", model="linear"),
        )

    before = counted()
    for _ in range(10):
        assert pair.ask("POST", "/predictions/linear", BODY, RAW).body == right()
        assert pair.ask("POST", "/predictions/linear", json.dumps(ITEM.tolist()).encode(), JSON).status == 200
    assert [after - each for after, each in zip(counted(), before, strict=True)] == [20, 20, 20]


def test_an_engine_that_is_killed_under_load(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store, "linear")
    server.start("--models", "all", "--front-ends", "2")
    try:
        wait_until(lambda: crossed(server, "linear", BODY), "tensors to cross")
        with Many(server) as load:
            load.wait_for_more(200)
            server.kill_server_process()
            wait_until(lambda: any(status == 503 for status, _ in load.seen), "a refusal")
            wait_until(lambda: load.seen[-1][0] == 200, "the next engine")
            load.wait_for_more(200)
        assert {status for status, _ in load.seen} == {200, 503}
        assert {body for status, body in load.seen if status == 200} == {right()}
        for process in server.front_ends:
            fd = os.pidfd_open(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            assert select.select([fd], [], [], LIMIT_S)[0]
            os.close(fd)
            assert server.ask("POST", "/predictions/linear", BODY, RAW).body == right()
        assert server.run("stop").returncode == 0
        assert "Traceback" not in server.log()
    finally:
        server.kill()
