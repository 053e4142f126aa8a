"""A real server whose models do not come to an end: what is answered, what health says, and how it gets rid of them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.held import ENDLESS, Endless, EndlessNumbers
from tests.support.serving import LIMIT_S, Server
from tests.support.serving_models import LINEAR_INPUT, write_linear, write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

POISON, ITEM = [ENDLESS] * 4, [1.0, 2.0, 3.0, 4.0]


class AlwaysEndless(torch.nn.Module):
    """Without an operator in its loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = 0
        while n >= 0:
            n = (n + 1) % 1000
        return x


class AlwaysLooping(torch.nn.Module):
    """With operators in its loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool((x < 1e30).all()):
            x = x.abs()
        return x


def write(server: Server, network: torch.nn.Module, name: str, **config: Any) -> Path:
    """Its requests may wait for longer than they may run."""
    times = {"responseTimeout": 1, "clientTimeoutInMills": 60_000}
    return write_torchscript(server.store, network, name, config={"input": LINEAR_INPUT, **times, **config})


def is_ready(server: Server) -> bool:
    return server.ask("GET", "/ready").status == server.ask("GET", "/ping").status == 200


def test_an_endless_loop_costs_its_request_only(server: Server) -> None:
    write(server, Endless(), "loop")
    server.start("--models", "loop.mar")
    pid = server.process.pid
    workers = [row["id"] for row in server.describe("loop")["workers"]]
    for _ in range(3):
        assert server.predict("loop", POISON).status == 504
        assert server.predict("loop", ITEM).status == 200
    assert is_ready(server) and [row["id"] for row in server.describe("loop")["workers"]] == workers
    assert server.metric("pyserve_batches_interrupted_total", model="loop") == 3
    assert server.metric("pyserve_workers_stuck", model="loop") == 0
    server.manage("DELETE", "/models/loop")
    assert server.process.pid == pid


def test_a_loop_that_nothing_ends_costs_a_worker_that_is_replaced_and_told(server: Server) -> None:
    write(server, EndlessNumbers(), "numbers", minWorkers=1, maxWorkers=2)
    write_linear(server.store)
    server.start("--models", "numbers.mar", "linear.mar")
    pid = server.process.pid
    assert server.predict("numbers", POISON).status == 504
    assert server.predict("numbers", ITEM).status == 200  # by the one that took its place
    server.wait_for(lambda: server.metric("pyserve_workers_stuck", model="numbers") == 1, "the loss")
    assert server.metric("pyserve_workers_lost_total", model="numbers") == 1
    described = server.describe("numbers")
    assert described["stuckWorkers"] == 1 and described["state"] == "READY" and is_ready(server)
    assert sorted(row["status"] for row in described["workers"]) == ["READY", "UNLOADING"]
    server.manage("PUT", "/models/numbers?min_worker=0&max_worker=0&synchronous=true")
    server.manage("PUT", "/models/numbers?min_worker=1&synchronous=true")
    assert server.predict("numbers", ITEM).status == 200 and server.process.pid == pid


def test_the_process_is_replaced_when_a_stuck_model_goes_and_loses_no_other_request(server: Server) -> None:
    write(server, EndlessNumbers(), "numbers")
    write_linear(server.store)
    server.start("--models", "numbers.mar", "linear.mar")
    pid = server.process.pid
    assert server.predict("numbers", POISON).status == 504
    server.wait_for(lambda: server.metric("pyserve_workers_stuck", model="numbers") == 1, "the loss")
    for _ in range(20):
        assert server.predict("linear", ITEM).status == 200
    server.manage("DELETE", "/models/numbers")
    answers = [server.predict("linear", ITEM).status for _ in range(200)]  # each on a connection of its own
    assert answers == [200] * 200
    server.wait_for(lambda: server.process.pid != pid, "another process")
    assert server.predict("linear", ITEM).status == 200
    assert {each["modelName"] for each in server.manage("GET", "/models")["models"]} == {"linear"}
    server.wait_for_log("is not served any more")


def test_the_process_is_replaced_when_too_many_are_stuck(server: Server) -> None:
    write(server, EndlessNumbers(), "numbers")
    server.environment["PYSERVE_STUCK_THREADS_MAX"] = "1"
    server.start("--models", "numbers.mar")
    pid = server.process.pid
    assert server.predict("numbers", POISON).status == 504
    assert server.predict("numbers", ITEM).status == 200 and server.process.pid == pid
    assert server.predict("numbers", POISON).status == 504
    server.wait_for(lambda: server.process.pid != pid and is_ready(server), "another process")
    assert server.predict("numbers", ITEM).status == 200
    assert server.metric("pyserve_workers_stuck", model="numbers") == 0


def test_a_server_with_a_stuck_thread_stops_and_says_why_it_did_not_wait(server: Server) -> None:
    write(server, EndlessNumbers(), "numbers")
    with server.foreground("--models", "numbers.mar") as popen:
        assert server.predict("numbers", POISON).status == 504
        server.wait_for(lambda: server.metric("pyserve_workers_stuck", model="numbers") == 1, "the loss")
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(LIMIT_S) == 0
    assert "threads of it are stuck: 1 native workers" in (server.folder / "foreground.log").read_text()


@pytest.mark.parametrize("network", [AlwaysLooping(), AlwaysEndless()], ids=["ended", "stuck"])
def test_a_model_that_never_answers_fails_at_its_time_and_leaves_nothing(
    server: Server, network: torch.nn.Module
) -> None:
    write(server, network, "never", startupTimeout=1)
    write_linear(server.store)
    server.start("--models", "never.mar", "linear.mar")
    described = server.describe("never")
    assert described["state"] == "FAILED" and "startup_timeout=1 s" in described["error"]
    if isinstance(network, AlwaysEndless):  # which may have happened before anybody could ask for the first one
        server.wait_for(lambda: server.log().count(" preprocessing threads and ") == 2, "another process")
        server.wait_for(lambda: server.predict("linear", ITEM).status == 200, "the same models")
        assert server.describe("never")["state"] == "FAILED"
    pid = server.process.pid
    server.manage("DELETE", "/models/never")
    answer = server.ask("POST", "/models?url=never.mar", port="management")
    assert answer.status >= 400 and "did not come to an end" in str(answer.json)
    server.wait_for(lambda: (server.process.pid == pid) is isinstance(network, AlwaysLooping), "what follows")
    server.wait_for(lambda: server.predict("linear", ITEM).status == 200, "the same models")
    assert {each["modelName"] for each in server.manage("GET", "/models")["models"]} == {"linear"}
