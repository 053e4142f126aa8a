"""Rows of DEVIATIONS.md that no other file proves, against one real server whose archives cannot all be served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.handler_archives import Doubler, write_handler
from tests.support.serving import JSON, Answer, Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

# A package that an import inside of it breaks must not become the built-in handler of the same name.
BREAKS = "import no_such_package_at_all\n\n\ndef handle(data, context):\n    return data\n"
TELLS = """
import dataclasses
import datetime

import numpy
import PIL.Image


@dataclasses.dataclass
class Box:
    left: int


VALUES = {
    "numpy": {"a": numpy.float32(0.5), "b": numpy.arange(2)},
    "dataclass": Box(3),
    "date": [datetime.date(2026, 1, 2)],
    "picture": PIL.Image.new("RGB", (2, 2)),
    "error": ValueError("this one only"),
}


def handle(data, context):
    if data is None:
        return None
    if data[0]["body"] == "yield":
        return parts()
    if data[0]["body"] == "metric":
        context.metrics.add_counter("Undeclared", 3)
        return ["x"] * len(data)
    return [VALUES[row["body"]] for row in data]


def parts():
    yield ["one"]
    yield ["two"]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("deviations"))
    write_linear(server.store)
    write_handler(server.store, "linear", BREAKS, version="2.0", file="linear-2")
    write_linear(server.store, "again")
    again = (server.store / "again.mar").read_bytes()
    write_handler(server.store, "again", BREAKS, file="again")
    write_handler(server.store, "image_classifier", BREAKS, handler="image_classifier.py")
    write_handler(server.store, "spread", TELLS, config={"torchrun": {"nproc-per-node": 2}, "parallelType": "tp"})
    write_handler(server.store, "parallel", TELLS, config={"parallelLevel": 2, "parallelType": "custom"})
    write_handler(server.store, "tells", TELLS)
    lazy = {"batchSize": 8, "maxBatchDelay": 600_000, "input": {"dtype": "float32", "shape": [2]}}
    write_handler(server.store, "lazy", None, handler="tensor", network=Doubler(), config=lazy)
    (server.store / "damaged.mar").write_bytes(b"PK\x03\x04 no more")
    server.start("--models", "all")
    (server.store / "again.mar").write_bytes(again)
    with server:
        yield server


def manage(server: Server, method: str, path: str) -> Answer:
    return server.ask(method, path, port="management")


def not_ready(server: Server) -> dict[str, Any]:
    models: dict[str, Any] = server.ask("GET", "/ready").json.get("models", {})
    return models


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("again", "no_such_package_at_all"),
        ("image_classifier", "no_such_package_at_all"),
        ("spread", "torchrun and parallelLevel"),
        ("parallel", "torchrun and parallelLevel"),
    ],
)
def test_a_model_that_cannot_be_served_fails_once_with_its_reason(server: Server, model: str, said: str) -> None:
    described = server.describe(model)
    assert described["state"] == "FAILED" and said in described["error"]
    refused = server.predict(model, 1)
    assert (refused.status, refused.json["type"]) == (503, "ServiceUnavailableException")
    assert server.ask("GET", "/predictions/linear").status != 503  # the others are


def test_a_version_that_failed_does_not_become_the_default(server: Server) -> None:
    refused = manage(server, "PUT", "/models/linear/2.0/set-default")
    assert (refused.status, refused.json["type"]) == (409, "ConflictStatusException"), refused.body
    assert server.describe("linear")["modelVersion"] == "1.0"


def test_registering_over_a_version_that_failed_replaces_it(server: Server) -> None:
    assert server.describe("again")["state"] == "FAILED"
    assert manage(server, "POST", "/models?url=again.mar&initial_workers=1").status == 200
    assert server.predict("again", [1, 2, 3, 4]).status == 200
    assert manage(server, "POST", "/models?url=again.mar&initial_workers=1").status == 409


def test_an_archive_that_could_not_be_opened_is_forgotten_on_request(server: Server) -> None:
    assert "damaged" in " ".join(not_ready(server))
    named = next(name for name in not_ready(server) if "damaged" in name)
    assert manage(server, "DELETE", f"/models/{named}").status == 200
    assert named not in not_ready(server)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a\u202eb", "x" * 256])
def test_a_name_that_cannot_stand_in_a_url_is_refused(server: Server, name: str) -> None:
    answer = server.ask(
        "POST", "/models", json.dumps({"url": "linear.mar", "model_name": name}).encode(), JSON, port="management"
    )  # fmt: skip
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException"), answer.body
    assert "cannot be used: it must be 1 to 255 printable characters" in answer.json["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/workflows?url=a.war"), ("GET", "/workflows"),
                                              ("GET", "/workflows/w"), ("DELETE", "/workflows/w")])  # fmt: skip
def test_there_are_no_workflows(server: Server, method: str, path: str) -> None:
    answer = manage(server, method, path)
    assert (answer.status, answer.json["type"]) == (404, "ResourceNotFoundException")
    assert server.ask("POST", "/wfpredict/w", b"x").status == 404


def test_a_lone_request_does_not_wait_for_others(server: Server) -> None:
    assert server.predict("lazy", [1.0, 2.0]).json == [2.0, 4.0]  # with ten minutes of delay


@pytest.mark.parametrize(
    ("value", "status", "body"),
    [
        ("numpy", 200, {"a": 0.5, "b": [0, 1]}),
        ("dataclass", 200, {"left": 3}),
        ("date", 200, ["2026-01-02"]),
        ("error", 503, None),
    ],
)
def test_results_that_json_cannot_hold(server: Server, value: str, status: int, body: Any) -> None:
    answer = server.predict("tells", value)
    assert answer.status == status
    if body is None:
        assert answer.detail["text"] == "this one only"
    else:
        assert answer.json == body


def test_a_picture_is_sent_as_png(server: Server) -> None:
    answer = server.predict("tells", "picture")
    assert (answer.headers["content-type"], answer.body[:4]) == ("image/png", b"\x89PNG")


def test_what_a_handler_yields_is_streamed(server: Server) -> None:
    answer = server.predict("tells", "yield")
    assert (answer.headers["transfer-encoding"], answer.body) == ("chunked", b"onetwo")


def test_metrics_of_handlers_need_no_declaration(server: Server) -> None:
    assert server.predict("tells", "metric").status == 200
    server.wait_for(lambda: b"\nUndeclared{" in server.ask("GET", "/metrics", port="metrics").body, "the metric")
