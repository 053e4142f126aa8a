"""The lines of metrics that each request, answer and start of a worker leaves in the log files, as TorchServe 0.12 was
measured to write them: which, in which order, and with what labels.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import serving_models
from tests.support.grpc_calls import refused, stub
from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S, RAW, Server

BASE = """
import torch
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def initialize(self, context):
        self.context, self.model, self.device = context, torch.nn.Identity(), torch.device("cpu")
        self.initialized = True

    def preprocess(self, data):
        if "bad" in str(data[0].get("body")):
            raise ValueError("as asked")
        if "teapot" in str(data[0].get("body")):
            self.context.set_response_status(418, 0)
        return torch.ones(len(data), 2)

    def postprocess(self, output):
        return output.tolist()
"""
OWN = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["ok"] * len(data)
"""
HOST = socket.gethostname()
REQUEST = ["ts_inference_requests_total.Count"]
TIMES = ["ts_inference_latency_microseconds.Microseconds", "ts_queue_latency_microseconds.Microseconds"]
QUEUE, THREAD = "QueueTime.Milliseconds", "WorkerThreadTime.Milliseconds"
SUCCESS = [*REQUEST, "Requests2XX.Count", *TIMES, QUEUE, THREAD]
BOTH, ONE = ["HandlerTime.ms", "PredictionTime.ms"], ["PredictionTime.ms"]
LOAD = ["WorkerLoadTime.Milliseconds", THREAD, "Requests2XX.Count"]


class Lines:
    """What was added to the two files since the last look. Nothing is asked of the server, which would add to them."""

    def __init__(self, folder: Path):
        self._paths = [folder / "ts_metrics.log", folder / "model_metrics.log"]
        self._seen = [0, 0]

    def _added(self) -> list[list[str]]:
        texts = [path.read_text().splitlines() if path.exists() else [] for path in self._paths]
        return [lines[seen:] for lines, seen in zip(texts, self._seen, strict=True)]

    def take(self, server_count: int, model_count: int = 0) -> tuple[list[str], list[str]]:
        """As soon as there are so many of each, and a moment later no more."""
        deadline = time.monotonic() + LIMIT_S
        while [len(lines) for lines in self._added()] < [server_count, model_count]:
            assert time.monotonic() < deadline, self._added()
            threading.Event().wait(0.02)
        threading.Event().wait(0.4)
        of_server, of_models = self._added()
        self._seen = [self._seen[0] + len(of_server), self._seen[1] + len(of_models)]
        return of_server, of_models


def started(folder: Path, mode: str) -> Server:
    server = Server(folder)
    write_handler(server.store, "base", BASE)
    write_handler(server.store, "own", OWN)
    serving_models.write_linear(server.store)
    config = folder / "config.properties"
    config.write_text(f"metrics_mode={mode}\ndisable_system_metrics=true\n")
    server.environment["METRICS_LOCATION"] = str(folder / "logs")
    server.start("--ts-config", str(config), "--grpc", "true")
    return server


@pytest.fixture(scope="module")
def logging_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = started(tmp_path_factory.mktemp("lines"), "log")
    with server:
        yield server


@pytest.fixture(scope="module")
def lines(logging_server: Server) -> Lines:
    lines = Lines(logging_server.folder / "logs")
    threading.Event().wait(0.6)
    lines.take(0)
    for name in ("base", "own", "linear"):
        logging_server.manage("POST", f"/models?url={name}.mar&initial_workers=1&synchronous=true")
        of_server, of_models = lines.take(3)
        assert names(of_server) == LOAD and of_models == []
        assert re.search(rf"\|#WorkerName:W-9000-{name}_1\.0,Level:Host\|#hostname:{re.escape(HOST)},", of_server[0])
    return lines


def names(taken: list[str]) -> list[str]:
    return [line.partition(" - ")[2].partition(":")[0] for line in taken]


FORM = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} - [\w.]+:[0-9.E-]+\|#([^|]*)\|#hostname:([^,]+),(.*)timestamp:\d{10}"
)


@pytest.mark.server
@pytest.mark.parametrize(
    ("path", "model", "version", "model_names"),
    [
        ("/predictions/base", "base", "default", BOTH),
        ("/predictions/base/1.0", "base", "1.0", BOTH),
        ("/models/base/invoke", "base", "default", BOTH),
        ("/predictions/own", "own", "default", ONE),
        ("/predictions/linear", "linear", "default", BOTH),
    ],
)
def test_a_request_that_a_handler_answers(  # noqa: PLR0917
    logging_server: Server, lines: Lines, path: str, model: str, version: str, model_names: list[str]
) -> None:
    headers = {**RAW, "x-request-id": "the-one"}
    assert logging_server.ask("POST", path, b"\0" * 16, headers).status == 200
    of_server, of_models = lines.take(len(SUCCESS), len(model_names))
    assert names(of_server) == SUCCESS and names(of_models) == model_names
    for line in of_server:
        match = FORM.fullmatch(line)
        assert match is not None and match[2] == HOST and not match[3], line
        is_of_requests = "ts_" in line.partition(" - ")[2][:3]
        assert match[1] == (f"model_name:{model},model_version:{version}" if is_of_requests else "Level:Host")
    for line in of_models:
        match = FORM.fullmatch(line)
        assert match is not None and match[1] == f"ModelName:{model},Level:Model" and match[3] == "requestID:the-one,"


@pytest.mark.server
def test_a_status_that_a_handler_sets_is_an_answer_like_others(logging_server: Server, lines: Lines) -> None:
    assert logging_server.ask("POST", "/predictions/base", b"teapot").status == 418
    of_server, _ = lines.take(6, 2)
    assert names(of_server) == [*REQUEST, "Requests4XX.Count", *TIMES, QUEUE, THREAD]


@pytest.mark.server
def test_a_request_that_fails_has_no_times(logging_server: Server, lines: Lines) -> None:
    assert logging_server.ask("POST", "/predictions/base", b"bad").status == 503
    of_server, of_models = lines.take(3)
    assert names(of_server) == [*REQUEST, "Requests5XX.Count", THREAD] and of_models == []


@pytest.mark.server
def test_a_request_for_a_model_without_workers_is_counted(logging_server: Server, lines: Lines) -> None:
    logging_server.manage("PUT", "/models/own?min_worker=0&synchronous=true")
    lines.take(1)
    assert logging_server.ask("POST", "/predictions/own", b"x").status == 503
    assert names(lines.take(2)[0]) == [*REQUEST, "Requests5XX.Count"]
    logging_server.manage("PUT", "/models/own?min_worker=1&synchronous=true")
    assert names(lines.take(3)[0]) == LOAD


@pytest.mark.server
@pytest.mark.parametrize(
    ("port", "path", "name"),
    [
        ("inference", "/ping", "Requests2XX"), ("inference", "/nonsense", "Requests4XX"),
        ("inference", "/predictions/none", "Requests4XX"), ("inference", "/predictions/base/9", "Requests4XX"),
        ("management", "/models", "Requests2XX"), ("metrics", "/metrics", "Requests2XX"),
    ],
)  # fmt: skip
def test_an_answer_that_no_model_gives_has_one_line(
    logging_server: Server, lines: Lines, port: str, path: str, name: str
) -> None:
    logging_server.ask("GET", path, port=port)
    of_server, of_models = lines.take(1)
    assert names(of_server) == [f"{name}.Count"] and of_models == []
    assert f"{name}.Count:1.0|#Level:Host|#hostname:{HOST},timestamp:" in of_server[0]


@pytest.mark.server
def test_a_handler_that_is_asked_about_itself_has_no_request(logging_server: Server, lines: Lines) -> None:
    assert logging_server.ask("GET", "/models/base?customized=true", port="management").status == 200
    of_server, of_models = lines.take(2, 2)
    assert sorted(names(of_server)) == ["Requests2XX.Count", THREAD] and names(of_models) == BOTH


@pytest.mark.server
def test_calls_of_grpc_have_neither_a_class_nor_microseconds(logging_server: Server, lines: Lines) -> None:
    with stub(logging_server) as client:
        client.Predictions(model_name="base", input={"data": b"x"})
        assert names(lines.take(3, 2)[0]) == [*REQUEST, QUEUE, THREAD]
        refused(client.Predictions, model_name="none")
        client.Ping()
    assert lines.take(0) == ([], [])


@pytest.mark.server
def test_legacy_mode_leaves_the_three_counters_to_the_endpoint(tmp_path: Path) -> None:
    server = started(tmp_path, "legacy")
    with server:
        server.manage("POST", "/models?url=base.mar&initial_workers=1&synchronous=true")
        lines = Lines(tmp_path / "logs")
        assert names(lines.take(3)[0])[-3:] == LOAD
        assert server.ask("POST", "/predictions/base", b"x").status == 200
        of_server, of_models = lines.take(3, 2)
        assert names(of_server) == ["Requests2XX.Count", QUEUE, THREAD] and names(of_models) == BOTH
        assert server.metric("ts_inference_requests_total", model_name="base") == 1
