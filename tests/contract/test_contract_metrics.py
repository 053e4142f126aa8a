"""The metrics listener on the wire: a row for each row of the contract's section 3 that is about the endpoint."""

from __future__ import annotations

import re

import pytest

from tests.support.raw_http import exchange, request
from tests.support.serving import RAW, Server

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

TYPE = "text/plain; version=0.0.4; charset=utf-8"
# name{label="value",} 8.0, with TorchServe's comma after the last label.
LABELS = r'\{(?:[A-Za-z_]\w*="(?:[^"\\\n]|\\.)*",)+\}'
SAMPLE = re.compile(rf"[A-Za-z_:][A-Za-z0-9_:]*(?:{LABELS})? (?:[-+]?Inf|NaN|-?\d+\.\d+(?:[eE][-+]?\d+)?)")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/metrics/any/thing"])
def test_3_any_method_and_longer_paths_are_answered(site: Server, method: str, path: str) -> None:
    answer = exchange(site, request(method, path), "metrics")
    assert (answer.status, answer.header("content-type")) == (200, TYPE)
    assert answer.header("cache-control") == "no-cache; no-store, must-revalidate, private"
    assert b"# TYPE Requests2XX counter\n" in answer.body


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/", 405, "MethodNotAllowedException"),
        ("GET", "/nowhere", 404, "ResourceNotFoundException"),
        ("GET", "/models", 404, "ResourceNotFoundException"),
        ("GET", "/predictions/linear", 404, "ResourceNotFoundException"),
    ],
)
def test_3_other_paths_are_json_errors(site: Server, method: str, path: str, status: int, kind: str) -> None:
    answer = exchange(site, request(method, path), "metrics")
    assert (answer.status, answer.json["code"], answer.json["type"]) == (status, status, kind)


def test_3_the_listener_describes_itself(site: Server) -> None:
    paths = exchange(site, request("OPTIONS", "/"), "metrics").json["paths"]
    assert paths.keys() == {"/", "/api-description", "/metrics"}


def test_3_every_line_has_torchserves_form(site: Server) -> None:
    assert site.ask("POST", "/predictions/linear", bytes(16), RAW).status == 200
    text = exchange(site, request("GET", "/metrics"), "metrics").body.decode()
    described: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# "):
            described.add(line.split(" ", 3)[2])
            continue
        assert SAMPLE.fullmatch(line), line
        name = re.split(r"[{ ]", line)[0]
        assert {name, re.sub(r"_(bucket|count|sum)$", "", name)} & described, line
    assert re.search(r'^Requests2XX\{Level="Host",Hostname="[^"]+",\} \d+\.0$', text, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "unit", "labels"),
    [
        ("ts_inference_requests_total", "Count", "model_name model_version hostname"),
        ("ts_inference_latency_microseconds", "Microseconds", "model_name model_version hostname"),
        ("ts_queue_latency_microseconds", "Microseconds", "model_name model_version hostname"),
        ("Requests2XX", "Count", "Level Hostname"),
        ("Requests4XX", "Count", "Level Hostname"),
        ("Requests5XX", "Count", "Level Hostname"),
    ],
)
def test_3_a_counter_has_its_words_unit_and_labels(site: Server, name: str, unit: str, labels: str) -> None:
    assert site.ask("POST", "/predictions/linear", bytes(16), RAW).status == 200
    text = exchange(site, request("GET", f"/metrics?name[]={name}"), "metrics").body.decode()
    comment, kind, *samples = text.splitlines()
    assert comment == f"# HELP {name} Torchserve prometheus counter metric with unit: {unit}"
    assert kind == f"# TYPE {name} counter" and samples
    for sample in samples:
        assert re.findall(r'(\w+)="', sample) == labels.split() and sample.startswith(name + "{")


def test_3_a_version_is_named_as_in_the_url(site: Server) -> None:
    def count(version: str) -> float:
        return site.metric("ts_inference_requests_total", model_name="linear", model_version=version)

    before = count("default"), count("1.0")
    site.ask("POST", "/predictions/linear", bytes(16), RAW)
    site.ask("POST", "/predictions/linear/1.0", bytes(16), RAW)
    assert (count("default"), count("1.0")) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("name[]=Requests2XX", {"Requests2XX"}),
        ("name%5B%5D=Requests2XX", {"Requests2XX"}),
        ("name[]=Requests2XX&name[]=Requests5XX", {"Requests2XX", "Requests5XX"}),
        ("name[]=Requests", set()),
    ],
)
def test_3_names_are_exact(site: Server, query: str, names: set[str]) -> None:
    text = exchange(site, request("GET", f"/metrics?{query}"), "metrics").body.decode()
    assert {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")} == names


@pytest.mark.parametrize(
    ("target", "port", "name"),
    [
        ("/ping", "inference", "Requests2XX"),
        ("/nowhere", "inference", "Requests4XX"),
        ("/models", "management", "Requests2XX"),
        ("/models/none", "management", "Requests4XX"),
        ("/nowhere", "metrics", "Requests4XX"),
    ],
)
def test_3_answers_of_every_listener_are_counted(site: Server, target: str, port: str, name: str) -> None:
    def count() -> float:
        return site.metric(f"{name}_total")

    before = count()
    site.ask("GET", target, port=port)
    assert count() == before + (2 if name == "Requests2XX" else 1)  # the call that counted first has been one too
