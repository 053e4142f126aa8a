"""What a description shows of workers that are coming and going, beside a server that others ask meanwhile."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.lanes.worker_rows import WorkerRow, with_coming
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import Server

SLOW = """
import os
import threading

class Handler:
    def initialize(self, context):
        while not os.path.exists(GATE):
            threading.Event().wait(0.01)

    def handle(self, data, context):
        return ["ok"] * len(data)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("rows"))
    write_handler(server.store, "broken", "import there_is_none\n\ndef handle(data, context):\n    return data\n")
    write_handler(server.store, "slow", SLOW.replace("GATE", repr(str(server.folder / "gate"))))
    serving_models.write_linear(server.store)
    with server:
        server.start()
        yield server


def rows(server: Server, model: str) -> list[dict[str, Any]]:
    described: list[dict[str, Any]] = server.describe(model)["workers"]
    return described


def states(server: Server, model: str) -> list[str]:
    return [row["status"] for row in rows(server, model)]


@pytest.mark.server
def test_workers_are_shown_from_the_answer_on_until_they_are_told_to_go(server: Server, tmp_path: Path) -> None:
    answer = server.ask("POST", "/models?url=slow.mar&initial_workers=2&synchronous=false", port="management")
    assert answer.status == 202
    shown = rows(server, "slow")
    assert [row["id"] for row in shown] == ["9000", "9001"]
    for row in shown:
        assert list(row) == ["id", "startTime", "status", "memoryUsage", "pid", "gpu", "gpuUsage"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["startTime"])
        assert (row["status"], row["gpu"], row["gpuUsage"]) == ("UNLOADING", False, "N/A")
        assert row["pid"] == -1 or row["pid"] > 1
    assert server.ask("GET", "/ping").json == {"status": "Healthy"}
    (server.folder / "gate").touch()
    server.wait_for(lambda: states(server, "slow") == ["READY"] * 2, "both workers")
    (server.folder / "gate").unlink()
    assert server.ask("PUT", "/models/slow?min_worker=3", port="management").status == 202
    assert states(server, "slow") == ["READY", "READY", "UNLOADING"]
    assert server.ask("PUT", "/models/slow?min_worker=1&max_worker=1", port="management").status == 202
    server.wait_for(lambda: states(server, "slow") == ["READY"], "one worker")


@pytest.mark.server
def test_native_workers_are_shown_at_once_too(server: Server) -> None:
    path = "/models?url=linear.mar&initial_workers=2&synchronous=false"
    assert server.ask("POST", path, port="management").status == 202
    first = [{key: row[key] for key in ("id", "status", "memoryUsage", "pid")} for row in rows(server, "linear")]
    unloading = {"status": "UNLOADING", "memoryUsage": 0, "pid": -1}
    assert first == [{"id": "9000", **unloading}, {"id": "9001", **unloading}]
    server.wait_for(lambda: states(server, "linear") == ["READY"] * 2, "both workers")
    assert all(row["pid"] > 1 and row["memoryUsage"] > 0 for row in rows(server, "linear"))
    assert server.ask("PUT", "/models/linear?min_worker=0&synchronous=true", port="management").status == 200
    assert rows(server, "linear") == []


@pytest.mark.server
def test_a_registration_that_fails_after_its_answer_is_removed(server: Server) -> None:
    path = "/models?url=broken.mar&initial_workers=1&synchronous=false"
    assert server.ask("POST", path, port="management").status == 202
    assert states(server, "broken") == ["UNLOADING"]

    def is_gone() -> bool:
        return server.ask("GET", "/models/broken", port="management").status == 404

    server.wait_for(is_gone, "its removal")
    server.wait_for_log("there_is_none")


@pytest.mark.server
def test_strict_registers_what_cannot_be_loaded_without_workers(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "broken", "import there_is_none\n\ndef handle(data, context):\n    return data\n")
    serving_models.write_linear(server.store)
    config = tmp_path / "config.properties"
    config.write_text("compat=strict\nenable_model_api=true\ndisable_token_authorization=true\n")
    with server:
        server.start("--ts-config", str(config))
        for query in (
            "url=broken.mar",
            "url=linear.mar&model_name=odd&handler=nonsense",
            "url=linear.mar&handler=../x.py",
        ):
            told = server.manage("POST", f"/models?{query}")["status"]
            assert told.endswith("0 initial workers. Use scale workers API to add workers for the model.")
        for name in ("broken", "odd", "linear"):
            assert rows(server, name) == []
            answer = server.ask("PUT", f"/models/{name}?min_worker=1&synchronous=true", port="management")
            assert (answer.status, answer.json) == (500, {
                "code": 500, "type": "InternalServerException",
                "message": f"Failed to start workers for model {name} version: null",
            })  # fmt: skip
            assert server.manage("DELETE", f"/models/{name}") == {"status": f'Model "{name}" unregistered'}
        for query in ("url=linear.mar&startup_timeout=0", "url=linear.mar&handler=nonsense", "url=broken.mar"):
            answer = server.ask("POST", f"/models?{query}&initial_workers=1", port="management")
            name = "broken" if "broken" in query else "linear"
            assert answer.status == 500
            assert answer.json["message"] == f"Failed to start workers for model {name} version: 1.0"
            assert server.ask("GET", f"/models/{name}", port="management").status == 404


def test_only_those_that_have_not_begun_are_added() -> None:
    since: Any = "then"
    there = [WorkerRow("9000", since, "READY", 7, 42, False)]
    assert with_coming(there, 1, first_id=9000, since=since, gpu=False) == there
    added = with_coming(there, 3, first_id=9000, since=since, gpu=True)
    assert added[:1] == there
    assert [(row.id, row.status, row.memory_usage, row.pid, row.gpu) for row in added[1:]] == [
        ("9001", "UNLOADING", 0, -1, True), ("9002", "UNLOADING", 0, -1, True),
    ]  # fmt: skip
