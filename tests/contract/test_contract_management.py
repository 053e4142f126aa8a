"""The management API against one real server: a row of a table for each row of the contract, and what calls that come
at once, fail or come under load leave behind."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.support.asgi_site import new_site
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, LIMIT_S, Answer, Load, Server, at_once
from tests.support.serving_models import Linear, write_linear

SCALING = "Processing worker updates..."
HANDLER = '''
import os
import time

HERE = {folder!r}


class Handler:
    """Answers with the size of its batch; what it does at its start and when it is asked to describe itself is said by
    files."""

    def initialize(self, context):
        if os.path.exists(HERE + "/fail"):
            raise RuntimeError("told to fail")
        while os.path.exists(HERE + "/stall"):
            time.sleep(0.01)

    def handle(self, data, context):
        if context.get_request_header(0, "describe") == "True":
            return [self.describe(context)]
        if any(row.get("body") == b"wait" for row in data):
            open(HERE + "/running", "w").close()
            while os.path.exists(HERE + "/hold"):
                time.sleep(0.01)
        return [str(len(data)) for _ in data]

    def describe(self, context):
        if os.path.exists(HERE + "/raise"):
            raise ValueError("not now")
        if os.path.exists(HERE + "/status"):
            context.set_response_status(code=203, idx=0, phrase="So They Say")
            context.set_response_header(0, "x-said", "by the handler")
        return "text" if os.path.exists(HERE + "/text") else {{"labels": ["a", "b"], "batch": 1}}
'''


class Files:
    """What the handler looks at: files whose mere presence says something."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, name: str) -> None:
        (self.folder / name).touch()

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module", params=["sockets", "asgi"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, files: Files) -> Iterator[Server]:
    server: Server = new_site(request.param, tmp_path_factory.mktemp("contract"))
    write_linear(server.store)
    write_linear(server.store, version="2.0", seed=2, file="linear-2")
    write_linear(server.store, "shadow")
    write_handler(server.store, "own", HANDLER.format(folder=str(files.folder)))
    write_linear(server.store, "stays")
    with server:
        server.start("--models", "linear.mar", "own.mar", "stays.mar")
        server.manage("POST", "/models?url=linear-2.mar&initial_workers=1")
        yield server


@pytest.fixture
def server(running: Server, files: Files) -> Iterator[Server]:
    """The one server: ``linear`` in versions 1.0, the default, and 2.0; ``own`` and ``stays``; each with a worker."""
    yield running
    files.clear()
    names = {model["modelName"] for model in running.manage("GET", "/models")["models"]}
    for name in names - {"linear", "own", "stays"}:
        running.manage("DELETE", f"/models/{name}")
    served = {name: {row["modelVersion"] for row in running.manage("GET", f"/models/{name}/all")}
              for name in names & {"linear", "own"}}  # fmt: skip
    for name, version, file in (("own", "1.0", "own"), ("linear", "1.0", "linear"), ("linear", "2.0", "linear-2")):
        if version not in served.get(name, ()):
            running.manage("POST", f"/models?url={file}.mar&initial_workers=1")
    running.manage("PUT", "/models/linear/1.0/set-default")
    restored = "min_worker=1&max_worker=1&synchronous=true&batch_size=1&min_batch=1&max_batch_delay=100"
    for model in ("linear/1.0", "own"):
        running.manage(
            "PUT", f"/models/{model}?{restored}&response_timeout=120&startup_timeout=120&job_queue_size=100"
            "&client_timeout=0"
        )  # fmt: skip


def ask(server: Server, method: str, target: str, body: bytes | None = None) -> Answer:
    return server.ask(method, target, body, JSON if body is not None else None, port="management")


def error(code: int, kind: str, message: str) -> dict[str, Any]:
    return {"code": code, "type": kind, "message": message}


# --- one call, one answer ---------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A call and its answer. ``body`` is compared as far as it goes; ``keys`` must be all keys, in order."""

    call: str
    status: int
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    keys: list[str] | None = None


NOT_FOUND = error(404, "ModelNotFoundException", "Model not found: x")
NO_VERSION = error(404, "ModelVersionNotFoundException", "Model version: 9 does not exist for model: linear")
NOT_ALLOWED = error(
    405, "MethodNotAllowedException", "Requested method is not allowed, please refer to API document."
)  # fmt: skip
RESOURCE = error(
    404, "ResourceNotFoundException", "Requested resource is not found, please refer to API document."
)  # fmt: skip


def bad(message: str) -> dict[str, Any]:
    return error(400, "BadRequestException", message)


OVERVIEW = [
    Row("PATCH /models", 405, NOT_ALLOWED, {"allow": "GET, HEAD, POST"}),
    Row("PUT /models", 405, NOT_ALLOWED, {"allow": "GET, HEAD, POST"}),
    Row("DELETE /models", 405, NOT_ALLOWED, {"allow": "GET, HEAD, POST"}),
    Row("POST /models/linear", 405, NOT_ALLOWED, {"allow": "GET, HEAD, PUT, DELETE, OPTIONS"}),
    Row("PATCH /models/linear/1.0", 405, NOT_ALLOWED, {"allow": "GET, HEAD, PUT, DELETE, OPTIONS"}),
    Row("GET /models/linear/1.0/set-default", 405, NOT_ALLOWED, {"allow": "PUT"}),
    Row("DELETE /models/linear/1.0/set-default", 405, NOT_ALLOWED, {"allow": "PUT"}),
    Row("GET /models/linear/1.0/else", 404, RESOURCE),
    Row("GET /nowhere", 404, RESOURCE),
    Row("GET /models/", 200, keys=["models"]),
    Row("GET /models/linear/", 200),
    Row("OPTIONS /models/linear", 200, {"info": {"title": "RESTful Management API for: linear", "version": "1.0.0"}}),
    Row("OPTIONS /models/linear/2.0", 200,
        {"info": {"title": "RESTful Management API for: linear", "version": "1.0.0"}}),
    Row("OPTIONS /", 200),
    Row("DELETE /api-description", 200),
    Row("GET /v1/models/linear", 200, {"name": "linear", "ready": True}),
    Row("GET /v1/models/own", 200, {"name": "own", "ready": False},
        before=("PUT /models/own?min_worker=0&synchronous=true",)),
    Row("GET /v1/models/x", 404, NOT_FOUND),
]  # fmt: skip

SCALE = [
    Row("PUT /models/linear?min_worker=2", 202, {"status": SCALING}, keys=["status"]),
    Row("PUT /models/linear", 202, {"status": SCALING}, keys=["status"]),
    Row("PUT /models/linear?min_worker=2&synchronous=true", 200, {"status": "Workers scaled to 2 for model: linear"}),
    Row("PUT /models/linear?synchronous=TRUE", 200, {"status": "Workers scaled to 1 for model: linear"}),
    Row("PUT /models/linear/2.0?min_worker=1&synchronous=true", 200,
        {"status": "Workers scaled to 1 for model: linear, version: 2.0"}),
    Row("PUT /models/linear?model_version=2.0&min_worker=1&synchronous=true", 200,
        {"status": "Workers scaled to 1 for model: linear, version: 2.0"}),
    Row("PUT /models/linear?min_worker=0&max_worker=0&synchronous=true", 200,
        {"status": "Workers scaled to 0 for model: linear"}),
    Row("PUT /models/linear?min_worker=3&max_worker=2", 400, bad("max_worker cannot be less than min_worker.")),
    Row("PUT /models/linear?max_worker=0", 400, bad("max_worker cannot be less than min_worker.")),
    Row("PUT /models/linear?min_worker=-1", 400,
        bad('Parameter min_worker cannot be "-1"; allowed: a whole number from 0 to 1024 workers.')),
    Row("PUT /models/linear?min_worker=-1&max_worker=-1", 400),
    Row("PUT /models/linear?min_worker=many", 400),
    Row("PUT /models/linear?minworker=2", 400, bad('Unknown parameter "minworker"; did you mean min_worker?')),
    Row("PUT /models/linear?synchronous=maybe", 400),
    Row("PUT /models/linear/1.0?model_version=2.0", 400),
    Row("PUT /models/linear?number_gpu=1&timeout=2&min_worker=1", 202, {"unused": ["number_gpu", "timeout"]}),
    Row("PUT /models/x?min_worker=1", 404, NOT_FOUND),
    Row("PUT /models/linear/9?min_worker=1", 404, NO_VERSION),
    Row("PUT /models/linear?model_version=9", 404, NO_VERSION),
    Row("PUT /models/linear?batch_size=4", 202, {"status": SCALING, "changed": {"batch_size": "1 -> 4"}}),
    Row("PUT /models/own?batch_size=4&max_batch_delay=9&response_timeout=8&startup_timeout=7&job_queue_size=6"
        "&client_timeout=5&min_batch=2&synchronous=true", 200,
        {"changed": {"batch_size": "1 -> 4", "max_batch_delay": "100 -> 9", "response_timeout": "120 -> 8",
                     "startup_timeout": "120 -> 7", "min_batch": "1 -> 2", "job_queue_size": "100 -> 6",
                     "client_timeout": "0 -> 5"}, "status": "Workers scaled to 1 for model: own"}),
    Row("PUT /models/own?batch_size=4&client_timeout=-5", 400),
    Row("PUT /models/own?batch_size=0", 400),
]  # fmt: skip

LIST = [
    Row("GET /models?limit=1", 200,
        {"nextPageToken": "1", "models": [{"modelName": "linear", "modelUrl": "linear.mar"}]},
        keys=["nextPageToken", "models"]),
    Row("GET /models?limit=3", 200, {"nextPageToken": "3"}),  # although the page ends at the end
    Row("GET /models?limit=4", 200, keys=["models"]),
    Row("GET /models?limit=1&next_page_token=1", 200,
        {"nextPageToken": "2", "models": [{"modelName": "own", "modelUrl": "own.mar"}]}),
    Row("GET /models?limit=0", 200, {"nextPageToken": "0", "models": []}),
    Row("GET /models?limit=-1", 200, keys=["models"]),
    Row("GET /models?limit=101", 200, keys=["models"]),
    Row("GET /models?next_page_token=-3", 200, keys=["models"]),
    Row("GET /models?next_page_token=7", 200, {"models": []}, keys=["models"]),
    Row("GET /models?limit=ten", 400),
    Row("GET /models?next_page_token=bad", 400),
]  # fmt: skip

UNREGISTER = [
    Row("DELETE /models/linear/2.0", 200, {"status": 'Model "linear" unregistered'}, keys=["status"]),
    Row("DELETE /models/own", 200, {"status": 'Model "own" unregistered'}),
    Row("DELETE /models/own/1.0?synchronous=true&timeout=3", 200, {"status": 'Model "own" unregistered'}),
    Row("DELETE /models/x", 404, NOT_FOUND),
    Row("DELETE /models/linear/9", 404, NO_VERSION),
    Row("DELETE /models/linear", 403,
        error(403, "InvalidModelVersionException", "Cannot remove default version for model linear")),
    Row("DELETE /models/linear/1.0", 403,
        error(403, "InvalidModelVersionException", "Cannot remove default version for model linear")),
    Row("DELETE /models/linear?force=true", 400),
    Row("DELETE /models/linear/1.0", 200, before=("PUT /models/linear/2.0/set-default",)),
]  # fmt: skip

DEFAULT = [
    Row("PUT /models/linear/2.0/set-default", 200,
        {"status": 'Default version successfully updated for model "linear" to "2.0"'}, keys=["status"]),
    Row("PUT /models/linear/1.0/set-default", 200,
        {"status": 'Default version successfully updated for model "linear" to "1.0"'}),
    Row("PUT /models/x/1.0/set-default", 404, NOT_FOUND),
    Row("PUT /models/linear/9/set-default", 404,
        error(404, "ModelVersionNotFoundException", "Model version 9 does not exist for model linear")),
    Row("PUT /models/linear/2.0/set-default?now=1", 400),
]  # fmt: skip

REGISTERED = 'Model "shadow" Version: 1.0 registered with'
REGISTER = [
    Row("POST /models?url=shadow.mar", 200,
        {"status": f"{REGISTERED} 0 initial workers. Use scale workers API to add workers for the model."}),
    Row("POST /models?url=shadow.mar&initial_workers=-2", 400),
    Row("POST /models?url=shadow.mar&initial_workers=2", 200, {"status": f"{REGISTERED} 2 initial workers"}),
    Row("POST /models?url=shadow.mar&initial_workers=1&synchronous=false", 202, {"status": SCALING}),
    Row("POST /models?url=linear.mar", 409,
        error(409, "ConflictStatusException", "Model version 1.0 is already registered for model linear")),
    Row("POST /models", 400, bad("Parameter url is required.")),
    Row("POST /models?url=", 404, error(404, "ModelNotFoundException", "empty url")),
    Row("POST /models?url=../shadow.mar", 404,
        error(404, "ModelNotFoundException", "Relative path is not allowed in url: ../shadow.mar")),
    Row("POST /models?url=none.mar", 404, error(404, "ModelNotFoundException", "Model not found at: none.mar")),
    Row("POST /models?url=shadow.mar&runtime=perl", 400, bad("Invalid RuntimeType value: perl")),
    Row("POST /models?url=shadow.mar&batch_size=dd", 400),
]  # fmt: skip

ALL = [*OVERVIEW, *SCALE, *LIST, *UNREGISTER, *DEFAULT, *REGISTER]


@pytest.mark.server
@pytest.mark.parametrize("row", ALL, ids=[f"{row.call} {row.status} {len(row.before)}" for row in ALL])
def test_a_call_is_answered_as_the_contract_says(server: Server, row: Row) -> None:
    for call in row.before:
        assert ask(server, *call.split()).status == 200
    before = server.manage("GET", "/models/linear/all")
    answer = ask(server, *row.call.split())
    assert answer.status == row.status, answer.body
    assert answer.headers["content-type"] == "application/json"
    assert {name: answer.headers.get(name) for name in row.headers} == row.headers
    if row.body:
        assert {key: answer.json.get(key) for key in row.body} == row.body
    if row.keys is not None:
        assert list(answer.json) == row.keys
    if row.status >= 400:
        assert list(answer.json)[:3] == ["code", "type", "message"] and answer.json["code"] == row.status
        assert answer.headers.get("connection") != "close"
        after = server.manage("GET", "/models/linear/all")
        assert [settings_of(version) for version in after] == [settings_of(version) for version in before]


def settings_of(version: dict[str, Any]) -> dict[str, Any]:
    shown = (
        "modelVersion", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout",
        "clientTimeoutInMills",
    )  # fmt: skip
    return {key: version[key] for key in shown} | {"ids": [worker["id"] for worker in version["workers"]]}


# --- describe ---------------------------------------------------------------------------------------------------------

KEYS = [
    "modelName", "modelVersion", "modelUrl", "runtime", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay",
    "responseTimeout", "startupTimeout", "maxRetryTimeoutInSec", "clientTimeoutInMills", "parallelType",
    "parallelLevel", "deviceType", "continuousBatching", "useJobTicket", "useVenv", "stateful", "sequenceMaxIdleMSec",
    "sequenceTimeoutMSec", "maxNumSequence", "maxSequenceJobQueueSize", "loadedAtStartup", "workers", "jobQueueStatus",
]  # fmt: skip


@pytest.mark.server
@pytest.mark.parametrize("model", ["linear", "own"])
def test_a_description_has_the_contracts_keys_in_its_order(server: Server, model: str) -> None:
    [described] = ask(server, "GET", f"/models/{model}").json
    assert list(described)[: len(KEYS)] == KEYS
    assert {
        "modelName": model, "modelVersion": "1.0", "modelUrl": f"{model}.mar", "runtime": "python", "minWorkers": 1,
        "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 100, "responseTimeout": 120, "startupTimeout": 120,
        "maxRetryTimeoutInSec": 300, "clientTimeoutInMills": 0, "parallelType": "", "parallelLevel": 0,
        "deviceType": "cpu", "continuousBatching": False, "useJobTicket": False, "useVenv": False, "stateful": False,
        "sequenceMaxIdleMSec": 0, "sequenceTimeoutMSec": 0, "maxNumSequence": 0, "maxSequenceJobQueueSize": 0,
        "jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0},
    }.items() <= described.items()  # fmt: skip
    [worker] = described["workers"]
    assert list(worker) == ["id", "startTime", "status", "memoryUsage", "pid", "gpu", "gpuUsage"]
    assert (worker["status"], worker["gpu"], worker["gpuUsage"]) == ("READY", False, "N/A")
    assert int(worker["id"]) >= 9000 and worker["memoryUsage"] > 10_000_000
    started = datetime.strptime(worker["startTime"], "%Y-%m-%dT%H:%M:%S.%fZ")
    assert 0 <= (datetime.now() - started).total_seconds() < 3600 and len(worker["startTime"]) == 24
    assert os.path.exists(f"/proc/{worker['pid']}")
    assert (worker["pid"] == server.process.pid) == (model == "linear")


@pytest.mark.server
def test_start_time_and_process_are_those_of_the_worker_there_is_now(server: Server) -> None:
    [before] = server.describe("own")["workers"]
    os.kill(before["pid"], signal.SIGKILL)

    def is_replaced() -> bool:
        workers = server.describe("own")["workers"]
        return [worker["status"] for worker in workers] == ["READY"] and workers[0]["pid"] != before["pid"]

    server.wait_for(is_replaced, "another worker")
    [after] = server.describe("own")["workers"]
    assert after["startTime"] > before["startTime"]


@pytest.mark.server
def test_versions_are_described_one_by_one_and_all(server: Server) -> None:
    for path, versions in (("", ["1.0"]), ("/2.0", ["2.0"]), ("/all", ["1.0", "2.0"])):
        rows = ask(server, "GET", f"/models/linear{path}").json
        assert sorted(row["modelVersion"] for row in rows) == versions
    assert [server.describe(name)["loadedAtStartup"] for name in ("stays", "linear/2.0")] == [True, False]


@pytest.mark.server
@pytest.mark.parametrize(
    "told, metadata, expected",
    [
        ((), {"labels": ["a", "b"], "batch": 1}, (200, None)),
        (("text",), {}, (200, None)),
        (("status",), {"labels": ["a", "b"], "batch": 1}, (203, "by the handler")),
    ],
)
def test_a_handler_describes_itself(
    server: Server, files: Files, told: tuple[str, ...], metadata: Any, expected: tuple[int, str | None]
) -> None:
    for name in told:
        files.put(name)
    answer = ask(server, "GET", "/models/own?customized=true")
    assert (answer.status, answer.headers.get("x-said")) == expected
    assert answer.json[0]["customizedMetadata"] == metadata
    assert list(answer.json[0])[len(KEYS)] == "customizedMetadata"
    assert "customizedMetadata" not in ask(server, "GET", "/models/own/all?customized=true").json[0]
    assert "customizedMetadata" not in ask(server, "GET", "/models/own?customized=false").json[0]


@pytest.mark.server
def test_what_cannot_describe_itself_says_why(server: Server, files: Files) -> None:
    assert ask(server, "GET", "/models/linear?customized=true").json[0]["customizedMetadata"] == {}
    files.put("raise")
    failed = ask(server, "GET", "/models/own?customized=true")
    assert (failed.status, failed.json["type"]) == (503, "InternalServerException")
    assert (failed.detail["exception"], failed.detail["text"]) == ("ValueError", "not now")
    for model in ("own", "linear"):
        server.manage("PUT", f"/models/{model}?min_worker=0&synchronous=true")
        idle = ask(server, "GET", f"/models/{model}?customized=true")
        assert {k: v for k, v in idle.json.items() if k != "detail"} == error(
            503, "ServiceUnavailableException",
            f'Model "{model}" has no worker to serve describe request. Please use scale workers API to add workers.',
        )  # fmt: skip
        assert ask(server, "GET", f"/models/{model}").status == 200


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("model", ["linear", "own"])
def test_workers_grow_to_the_least_shrink_to_the_most_and_stay_in_between(server: Server, model: str) -> None:
    def scaled(query: str) -> tuple[int, int, int]:
        server.manage("PUT", f"/models/{model}?{query}&synchronous=true")
        described = server.describe(model)
        ready = [worker for worker in described["workers"] if worker["status"] == "READY"]
        assert len(ready) == len(described["workers"])
        return len(ready), described["minWorkers"], described["maxWorkers"]

    assert scaled("min_worker=3") == (3, 3, 3)
    ids = [worker["id"] for worker in server.describe(model)["workers"]]
    assert scaled("min_worker=1&max_worker=4") == (3, 1, 4)  # in between nothing happens
    assert scaled("min_worker=1&max_worker=2") == (2, 1, 2)
    assert scaled("batch_size=2") == (2, 1, 2)  # a setting alone leaves them
    assert scaled("min_worker=2") == (2, 2, 2)
    assert {worker["id"] for worker in server.describe(model)["workers"]} <= set(ids)
    assert scaled("min_worker=0&max_worker=0") == (0, 0, 0)
    refused = server.predict(model, [0.5, 1, 2, 3])
    assert (refused.status, refused.detail["reason"]) == (503, "no worker")
    assert scaled("") == (1, 1, 1)
    assert server.predict(model, [0.5, 1, 2, 3]).status == 200


@pytest.mark.server
@pytest.mark.parametrize("synchronous", [True, False])
def test_workers_that_cannot_be_started_leave_everything_as_it_was(
    server: Server, files: Files, synchronous: bool
) -> None:
    before = settings_of(server.describe("own"))
    files.put("fail")
    answer = ask(server, "PUT", f"/models/own?min_worker=3&batch_size=7&synchronous={str(synchronous).lower()}")
    if synchronous:
        assert answer.status == 500
        assert answer.json["type"] == "InternalServerException"
        assert answer.json["message"] == "Failed to start workers for model own version: null"
        assert "told to fail" in json.dumps(answer.json["detail"])
        versioned = ask(server, "PUT", "/models/own/1.0?min_worker=2&synchronous=true")
        assert versioned.json["message"] == "Failed to start workers for model own version: 1.0"
    else:
        assert answer.status == 202
    server.wait_for(lambda: settings_of(server.describe("own")) == before, "the old numbers")
    assert server.predict("own", "x").status == 200
    files.clear()
    server.manage("PUT", "/models/own?min_worker=2&synchronous=true")
    assert len(server.describe("own")["workers"]) == 2


@pytest.mark.server
def test_a_worker_that_starts_too_slowly_is_given_up_after_the_new_limit(server: Server, files: Files) -> None:
    files.put("stall")
    server.manage("PUT", "/models/own?startup_timeout=1")
    answer = ask(server, "PUT", "/models/own?min_worker=2&synchronous=true")
    assert answer.status == 500 and "startup_timeout=1" in json.dumps(answer.json["detail"])
    assert server.predict("own", "x").status == 200  # the one that is there goes on


@pytest.mark.server
@pytest.mark.parametrize("model", ["linear", "own"])
def test_calls_at_once_leave_the_state_that_one_of_them_asked_for(server: Server, model: str) -> None:
    wishes = [(1, 11), (2, 12), (3, 13), (4, 14)]
    answers = at_once([
        lambda workers=workers, size=size: ask(
            server, "PUT", f"/models/{model}?min_worker={workers}&batch_size={size}&synchronous=true"
        )
        for workers, size in wishes
    ])  # fmt: skip
    assert [answer.status for answer in answers] == [200] * 4
    for answer, (workers, _) in zip(answers, wishes, strict=True):
        assert answer.json["status"] == f"Workers scaled to {workers} for model: {model}"
    described = server.describe(model)
    assert described["minWorkers"] == described["maxWorkers"] == len(described["workers"])
    assert described["minWorkers"] in (1, 2, 3, 4) and described["batchSize"] in (11, 12, 13, 14)
    assert all(worker["status"] == "READY" for worker in described["workers"])


@pytest.mark.server
def test_a_model_is_removed_once_and_what_comes_at_once_is_told(server: Server) -> None:
    server.manage("POST", "/models?url=shadow.mar&initial_workers=1")
    answers = at_once([
        lambda: ask(server, "DELETE", "/models/shadow"),
        lambda: ask(server, "DELETE", "/models/shadow"),
        lambda: ask(server, "PUT", "/models/shadow?min_worker=3&synchronous=true"),
        lambda: ask(server, "PUT", "/models/shadow?batch_size=2"),
    ])  # fmt: skip
    assert sorted(answer.status for answer in answers[:2]) == [200, 404]
    assert answers[2].status in (200, 404, 500) and answers[3].status in (202, 404)
    assert ask(server, "GET", "/models/shadow").status == 404
    assert server.predict("shadow", [1, 2, 3, 4]).status == 404
    server.manage("POST", "/models?url=shadow.mar&initial_workers=1")
    assert server.predict("shadow", [1, 2, 3, 4]).status == 200


@pytest.mark.server
def test_one_of_two_defaults_that_are_set_at_once_holds(server: Server) -> None:
    for _ in range(5):
        answers = at_once([
            lambda: ask(server, "PUT", "/models/linear/1.0/set-default"),
            lambda: ask(server, "PUT", "/models/linear/2.0/set-default"),
            lambda: ask(server, "DELETE", "/models/linear/9"),
        ])  # fmt: skip
        assert [answer.status for answer in answers] == [200, 200, 404]
        assert server.describe("linear")["modelVersion"] in ("1.0", "2.0")
        assert sorted(row["modelVersion"] for row in server.manage("GET", "/models/linear/all")) == ["1.0", "2.0"]


@pytest.mark.server
def test_a_default_that_is_set_while_it_loads_is_one_that_answers(server: Server, files: Files) -> None:
    write_handler(server.store, "own", HANDLER.format(folder=str(files.folder)), version="2.0", file="own-2")
    files.put("stall")
    assert ask(server, "POST", "/models?url=own-2.mar&initial_workers=1&synchronous=false").status == 202
    server.wait_for(lambda: len(server.manage("GET", "/models/own/all")) == 2, "the second version")
    default: list[Answer] = []
    setting = threading.Thread(target=lambda: default.append(ask(server, "PUT", "/models/own/2.0/set-default")))
    setting.start()
    for _ in range(5):
        assert server.predict("own", "x").status == 200
        assert server.ask("GET", "/ping").status == 200
        assert server.describe("own")["modelVersion"] == "1.0"
    files.clear()
    setting.join(LIMIT_S)
    assert default[0].status == 200
    assert server.describe("own")["modelVersion"] == "2.0"
    assert server.predict("own", "x").status == 200
    server.manage("PUT", "/models/own/1.0/set-default")
    server.manage("DELETE", "/models/own/2.0")


# --- live settings ----------------------------------------------------------------------------------------------------


def pending(server: Server) -> int:
    """Requests of ``own`` that wait."""
    return int(server.describe("own")["jobQueueStatus"]["pendingRequests"])


@pytest.mark.server
def test_limits_of_a_running_model_hold_for_the_next_request(server: Server, files: Files) -> None:
    files.put("hold")
    answers: dict[str, Answer] = {}

    def send(name: str, body: bytes) -> threading.Thread:
        def run() -> None:
            answers[name] = server.ask("POST", "/predictions/own", body)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    server.manage("PUT", "/models/own?job_queue_size=1")
    running = send("running", b"wait")
    server.wait_for(lambda: files.has("running"), "the first request to run")
    waiting = send("waiting", b"x")
    server.wait_for(lambda: pending(server) == 1, "the second to wait")
    full = server.ask("POST", "/predictions/own", b"x")
    assert (full.status, full.detail["reason"], full.detail["job_queue_size"]) == (503, "queue full", 1)
    server.manage("PUT", "/models/own?job_queue_size=2&client_timeout=50")
    expired = server.ask("POST", "/predictions/own", b"x")
    assert (expired.status, expired.detail["reason"]) == (503, "expired")
    assert expired.detail["limit"] == "clientTimeoutInMills=0.05 s"
    waiting.join(LIMIT_S)
    assert answers["waiting"].detail["reason"] == "expired"  # the limit holds for what waits already
    assert "running" not in answers
    server.manage("PUT", "/models/own?response_timeout=1&client_timeout=0")
    running.join(LIMIT_S)
    assert answers["running"].status == 504 and "response_timeout=1 s" in answers["running"].json["message"]
    files.clear()
    server.manage("PUT", "/models/own?response_timeout=120&batch_size=3&min_batch=3&max_batch_delay=60000")
    together = at_once([lambda: server.ask("POST", "/predictions/own", b"x")] * 3)
    assert [answer.body for answer in together] == [b"3"] * 3
    server.manage("PUT", "/models/own?min_batch=1")
    assert server.ask("POST", "/predictions/own", b"x").body == b"1"


# --- health -----------------------------------------------------------------------------------------------------------


def health(server: Server) -> tuple[int, str, int, dict[str, str]]:
    """Status and word of ``/ping``; status of ``/ready``, and the states it names."""
    ping, ready = server.ask("GET", "/ping"), server.ask("GET", "/ready")
    states = {name: row["state"] for name, row in ready.json.get("models", {}).items()}
    return ping.status, ping.json["status"], ready.status, states


HEALTHY = (200, "Healthy", 200, {})


@pytest.mark.server
def test_health_tells_what_cannot_answer_and_nothing_else(server: Server, files: Files) -> None:
    assert health(server) == HEALTHY
    server.manage("PUT", "/models/own?min_worker=0&synchronous=true")
    assert health(server) == HEALTHY  # none are wanted
    files.put("stall")
    server.manage("PUT", "/models/own?min_worker=1")
    assert health(server) == HEALTHY  # its first one is coming
    files.clear()
    server.wait_for(lambda: server.predict("own", "x").status == 200, "the worker")

    files.put("stall")
    server.manage("POST", "/models?url=own.mar&model_name=another&initial_workers=1&synchronous=false")
    assert health(server) == HEALTHY  # one that is added takes nobody out of rotation
    assert ask(server, "GET", "/models/another").json[0]["state"] == "LOADING"
    files.clear()
    server.wait_for(lambda: ask(server, "GET", "/models/another").json[0]["state"] == "READY", "the model")
    assert health(server) == HEALTHY

    files.put("fail")  # a crash that cannot be mended
    os.kill(server.describe("own")["workers"][0]["pid"], signal.SIGKILL)
    server.wait_for(lambda: health(server)[0] == 500, "the ping to be Unhealthy")
    server.wait_for(lambda: health(server) == (500, "Unhealthy", 503, {"own": "FAILED"}), "its state")
    assert server.ask("GET", "/live").status == 200
    assert server.predict("linear", [1, 2, 3, 4]).status == 200
    assert ask(server, "PUT", "/models/own?min_worker=2&synchronous=true").status == 500
    assert health(server) == (500, "Unhealthy", 503, {"own": "FAILED"})
    server.manage("PUT", "/models/own?min_worker=0&synchronous=true")
    assert health(server) == HEALTHY
    assert ask(server, "PUT", "/models/own?min_worker=1&synchronous=true").status == 500
    server.wait_for(lambda: health(server) == HEALTHY, "the old state, which is no worker")
    files.clear()
    server.manage("PUT", "/models/own?min_worker=1&synchronous=true")
    assert health(server) == HEALTHY
    assert server.predict("own", "x").status == 200


# --- under load -------------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("model", ["linear", "own"])
def test_scaling_up_down_and_to_nothing_under_load_loses_no_request(server: Server, model: str) -> None:
    """Every request is answered, by the model or with the reason that there is no worker."""
    body = json.dumps([0.5, -1, 2, 0.25]).encode()
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def send() -> None:
        with server.client() as client:
            while not stop.is_set():
                answer = client.ask("POST", f"/predictions/{model}", body, JSON)
                seen.append((answer.status, "" if answer.status == 200 else answer.detail["reason"]))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()

    def more(wanted: tuple[int, str]) -> None:
        count = seen.count(wanted)
        server.wait_for(lambda: seen.count(wanted) >= count + 20, f"answers {wanted}")

    try:
        more((200, ""))
        for workers in (4, 0, 2, 1, 3):
            server.manage("PUT", f"/models/{model}?min_worker={workers}&max_worker={workers}&synchronous=true")
            more((200, "") if workers else (503, "no worker"))
    finally:
        stop.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads)
    assert set(seen) == {(200, ""), (503, "no worker")}
    assert server.describe(model)["jobQueueStatus"]["pendingRequests"] == 0


@pytest.mark.server
def test_the_default_moves_a_hundred_times_under_load_without_a_wrong_answer(server: Server) -> None:
    write_linear(server.store, "twin")
    write_linear(server.store, "twin", version="2.0", file="twin-2")  # the same answers
    server.manage("POST", "/models?url=twin.mar&initial_workers=1")
    server.manage("POST", "/models?url=twin-2.mar&initial_workers=1")
    with Load(server, "twin", Linear(), [4], clients=4) as load, server.client("management") as client:
        for number in range(100):
            version = ("2.0", "1.0")[number % 2]
            assert client.ask("PUT", f"/models/twin/{version}/set-default").status == 200
        load.wait_for_more(20)
        server.manage("DELETE", "/models/twin/2.0")
        load.wait_for_more(20)
    assert load.wrong == []
