"""Metrics of a real server, in every mode, read back with Prometheus' own parser."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyserve.telemetry.metrics_config import MODEL_METRICS, SERVER_METRICS
from tests.support import handler_archives, serving_models
from tests.support.serving import Server

HANDLER = """
class Handler:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        context.metrics.add_counter("seen", len(data))
        return ["ok"] * len(data)
"""
pytest_plugins = ["tests.support.serving_fixtures"]
ODD = "odd.name-1"


def shown(server: Server, query: str = "") -> dict[str, list[Any]]:
    text = server.ask("GET", f"/metrics{query}", port="metrics").body.decode()
    return {each.name: list(each.samples) for each in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("metrics"))
    serving_models.write_linear(server.store)
    handler_archives.write_handler(server.store, "own", HANDLER)
    server.start("--models", f"{ODD}=linear.mar", "own.mar")
    try:
        for name in (ODD, "own"):
            assert server.predict(name, [1.0, 2.0, 3.0, 4.0]).status in (200, 400)
        server.wait_for(lambda: "CPUUtilization{" in text_of(server) and "seen{" in text_of(server), "metrics")
        yield server
    finally:
        server.kill()


def text_of(server: Server) -> str:
    return server.ask("GET", "/metrics", port="metrics").body.decode()


HAVE_NO_GPU = [name for name in SERVER_METRICS if not name.startswith("GPU")]


@pytest.mark.server
@pytest.mark.parametrize("name", HAVE_NO_GPU)
def test_each_metric_of_torchserve_is_there(measured: Server, name: str) -> None:
    declared, text = SERVER_METRICS[name], text_of(measured)
    unit = f"# HELP {name} Torchserve prometheus {declared.kind} metric with unit: {declared.unit}\n"
    assert unit + f"# TYPE {name} {declared.kind}\n" in text
    labels = "".join(f'{label}="[^"]+",' for label in declared.dimensions)
    assert re.search(rf"^{name}{{{labels}}} [0-9.E-]+$", text, re.MULTILINE)
    assert f'ostname="{socket.gethostname()}",}}' in text


@pytest.mark.server
@pytest.mark.parametrize("declared", MODEL_METRICS, ids=lambda each: each.name)
@pytest.mark.parametrize("model", [ODD, "own"])
def test_both_lanes_have_the_times_of_a_model(measured: Server, declared: Any, model: str) -> None:
    text, host = text_of(measured), socket.gethostname()
    assert f"# HELP {declared.name} Torchserve prometheus gauge metric with unit: ms\n" in text
    assert f'{declared.name}{{ModelName="{model}",Level="Model",Hostname="{host}",}} ' in text


@pytest.mark.server
def test_workers_are_named_as_torchserve_names_them(measured: Server) -> None:
    [mine] = [each for each in shown(measured)["WorkerLoadTime"] if each.labels["WorkerName"].endswith("own_1.0")]
    assert re.fullmatch(r"W-\d+-own_1\.0", mine.labels["WorkerName"]) and mine.value > 0


@pytest.mark.server
def test_a_handlers_counter_needs_no_declaration(measured: Server) -> None:
    before = measured.metric("seen_total", ModelName="own")
    measured.predict("own", [1])
    measured.wait_for(lambda: measured.metric("seen_total", ModelName="own") == before + 1, "the counter")


@pytest.mark.server
@pytest.mark.parametrize("name", ["pyserve_worker_utilization", "pyserve_predicted_wait_seconds", "pyserve_queue_size"])
def test_autoscalers_find_the_load_of_both_lanes(measured: Server, name: str) -> None:
    samples = shown(measured)[name]
    assert {each.labels["model"] for each in samples} == {ODD, "own"}
    assert all(each.value >= 0 for each in samples)


@pytest.mark.server
def test_no_request_is_lost_in_the_books(measured: Server) -> None:
    calls = [lambda: measured.predict(ODD, [1.0, 2.0, 3.0, 4.0]), lambda: measured.predict(ODD, ["x"]),
             lambda: measured.predict(f"{ODD}/1.0", [1.0, 2.0, 3.0, 4.0])]  # fmt: skip

    def books() -> tuple[float, float]:
        found = shown(measured)
        asked = [each.value for each in found["ts_inference_requests"] if each.labels["model_name"] == ODD]
        ended = [each.value for name in ("pyserve_requests", "pyserve_requests_aborted") for each in found[name]
                 if each.labels["model"] == ODD]  # fmt: skip
        return sum(asked), sum(ended)

    before = books()
    statuses = [call().status for call in calls * 5]
    with measured.connect() as client:  # goes away before its answer, or just after it
        body = json.dumps([1.0, 2.0, 3.0, 4.0]).encode()
        head = f"POST /predictions/{ODD} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    measured.wait_for(lambda: books()[0] == before[0] + len(statuses) + 1, "the last request")
    asked, ended = books()
    assert asked == ended and set(statuses) == {200, 400}


@pytest.mark.server
def test_names_filter(measured: Server) -> None:
    assert list(shown(measured, "?name[]=CPUUtilization&name[]=QueueTime")) == ["QueueTime", "CPUUtilization"]


def ask_and_lines(server: Server, file: str, count: int) -> list[str]:
    path = server.folder / "logs" / file

    def lines() -> list[str]:
        return path.read_text().splitlines() if path.exists() else []

    assert server.predict("own", [1]).status == 200
    server.wait_for(lambda: len(lines()) >= count, f"{count} lines of {file}")
    return lines()


DATE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} - "
HOST = re.escape(socket.gethostname())


@pytest.mark.server
def test_strict_log_mode_writes_files_and_leaves_the_endpoint_empty(server: Server) -> None:
    handler_archives.write_handler(server.store, "own", HANDLER)
    server.environment["METRICS_LOCATION"] = str(server.folder / "logs")
    config = server.folder / "config.properties"
    script = server.folder / "measure"
    script.write_text("#!/bin/sh\necho 'CPUUtilization.Percent:12.5|#Level:Host|#hostname:h,1'\necho noise\n")
    script.chmod(0o755)
    config.write_text(f"compat=strict\nsystem_metrics_cmd={script}\ndisable_token_authorization=true\n")
    server.start("--models", "own.mar", "--ts-config", str(config))
    assert server.ask("GET", "/metrics", port="metrics")[::2] == (200, b"")
    ask_and_lines(server, "ts_metrics.log", 20)
    server.wait_for(lambda: "CPUUtilization" in (server.folder / "logs" / "ts_metrics.log").read_text(), "the system's")
    server_lines = ask_and_lines(server, "ts_metrics.log", 20)
    assert any(
        re.fullmatch(DATE + rf"CPUUtilization\.Percent:12\.5\|#Level:Host\|#hostname:{HOST},timestamp:\d+", line)
        for line in server_lines
    )
    worker = r"\|#WorkerName:W-9000-own_1\.0,Level:Host\|"
    loaded = rf"WorkerLoadTime\.Milliseconds:\d+\.0{worker}#hostname:{HOST},timestamp:\d+"
    assert any(re.fullmatch(DATE + loaded, line) for line in server_lines)
    assert any("Requests2XX.Count:1.0|#Level:Host|" in line for line in server_lines)
    counted = r"ts_inference_requests_total\.Count:1\.0\|#model_name:own,model_version:default\|"
    assert any(re.search(counted, line) for line in server_lines)
    model_lines = ask_and_lines(server, "model_metrics.log", 3)
    form = rf"PredictionTime\.ms:[0-9.E-]+\|#ModelName:own,Level:Model\|#hostname:{HOST},requestID:[\w-]+,timestamp:\d+"
    assert any(re.fullmatch(DATE + form, line) for line in model_lines)
    assert not any("seen" in line for line in model_lines)  # it is not declared


YAML_WRONG = "ts_metrics:\n  counter:\n    - name: Requests2XX\n      dimensions: [Level, Hostname]\n"


@pytest.mark.server
def test_strict_start_fails_on_a_wrong_metrics_yaml(server: Server, tmp_path: Path) -> None:
    serving_models.write_linear(server.store)
    (tmp_path / "m.yaml").write_text(YAML_WRONG)
    (tmp_path / "config.properties").write_text(f"metrics_config={tmp_path}/m.yaml\n")
    options = ("--models", "linear.mar", "--ts-config", str(tmp_path / "config.properties"))
    failed = server.run("start", *options, "--strict")
    assert failed.returncode != 0
    assert "m.yaml, line 3: ts_metrics.counter: a metric needs a unit" in failed.stderr
    server.start(*options)
    server.wait_for_log("a metric needs a unit")
    assert "Requests2XX" in text_of(server)


@pytest.mark.server
def test_legacy_mode_of_strict_shows_the_three_counters(server: Server) -> None:
    serving_models.write_linear(server.store)
    config = server.folder / "config.properties"
    config.write_text("compat=strict\nmetrics_mode=legacy\ndisable_system_metrics=true\n")
    server.start("--models", "linear.mar", "--ts-config", str(config))
    assert set(shown(server)) == {
        "ts_inference_requests", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds",
    }  # fmt: skip
