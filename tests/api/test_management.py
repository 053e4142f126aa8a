"""The management API, one row per promise, driven through the router with a registry that keeps models in a dict."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve.api import openapi, parameters
from pyserve.api.management import Management
from pyserve.api.routes import Router
from pyserve.archive.model_config import ModelConfig
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import (
    BadRequestError,
    ConflictError,
    DefaultVersionError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    ServeError,
    VersionNotFoundError,
)
from pyserve.models.changes import Changes
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response

STARTED = datetime(2026, 11, 23, 1, 57, 15, 723_999)
ATTRIBUTES = {
    "batch_size": "batch_size", "max_batch_delay": "max_batch_delay_ms", "min_batch": "min_batch",
    "response_timeout": "response_timeout_s", "startup_timeout": "startup_timeout_s",
    "job_queue_size": "queue_size_max", "client_timeout": "client_timeout_ms",
}  # fmt: skip


class FakeModel:
    runtime = "python"
    lane = "native"
    copies = 1
    error = ""
    is_scaling = False
    precision = "fp32"
    device = "cpu"
    device_type = "cpu"
    native_devices: tuple[str, ...] = ()
    weights_size = 115_000_000
    loaded_at_startup = True

    def __init__(self, name: str = "m", version: str = "1.0", url: str = "m.mar", workers: int = 1):
        self.name = name
        self.version = version
        self.url = url
        self.state = "READY"
        self.device_ids: list[int] | None = None
        self.workers_min = self.workers_max = workers
        self.batch_size, self.max_batch_delay_ms, self.min_batch = 1, 100, 1
        self.response_timeout_s = self.startup_timeout_s = 120
        self.queue_size_max = 100
        self.client_timeout_ms = 0
        self.settings = SimpleNamespace(client_timeout_ms=0)
        self.archive = SimpleNamespace(config=ModelConfig(), served_dir=Path("/cache/m"))
        self.told: Any = None  # what the handler says of itself
        self.running = workers
        self.running_max = 1024
        self.scale_error: ServeError | None = None
        self.scalings: list[tuple[int, int]] = []
        self.measured: dict[str, Any] = {}

    def checks(self) -> dict[str, Any]:
        return {"batches": "passed"}

    async def loaded(self) -> None:
        pass

    async def describe_handler(self) -> Any:
        if isinstance(self.told, ServeError):
            raise self.told
        return SimpleNamespace(value=self.told, status=200, reason="", headers={})

    def worker_rows(self) -> list[Any]:
        row = {"memory_usage": 7, "pid": 42, "gpu": False, "gpu_id": None}
        return [
            SimpleNamespace(id=str(9000 + index), start_time=STARTED, status="READY", **row)
            for index in range(self.running)
        ]

    def queue_status(self) -> tuple[int, int]:
        return 97, 3

    def stats(self) -> dict[str, Any]:
        return self.measured

    async def scale(self, workers_min: int, workers_max: int) -> int:
        await asyncio.sleep(0)
        if self.scale_error is not None:
            raise self.scale_error
        self.scalings.append((workers_min, workers_max))
        self.workers_min, self.workers_max = workers_min, workers_max
        self.running = min(self.running_max, max(workers_min, min(self.running, workers_max)))
        return self.running

    def take_back(self, changed: dict[str, tuple[int, int]]) -> None:
        self.configure({name: old for name, (old, _) in changed.items()})

    def configure(self, changes: dict[str, int]) -> dict[str, tuple[int, int]]:
        if changes.get("min_batch", self.min_batch) > changes.get("batch_size", self.batch_size):
            raise BadRequestError("min_batch must not be larger than batch_size")
        old = {name: getattr(self, ATTRIBUTES[name]) for name in changes}
        for name, value in changes.items():
            setattr(self, ATTRIBUTES[name], value)
        return {name: (old[name], value) for name, value in changes.items()}


class FakeRegistry:
    def __init__(self, *models: FakeModel):
        self.models = list(models)
        self.defaults: dict[str, str] = {}
        for model in models:
            self.defaults.setdefault(model.name, model.version)
        self.calls: list[dict[str, Any]] = []
        self.error: ServeError | None = None
        self.workers_of_yaml: int | None = None
        self.drained = asyncio.Event()
        self.drained.set()
        self.saves = 0
        self.changes = Changes()
        self.not_kept = ""

    def get(self, name: str, version: str | None = None) -> FakeModel:
        versions = {model.version: model for model in self.models if model.name == name}
        if not versions:
            raise ModelNotFoundError(f"Model not found: {name}")
        if (version or self.defaults[name]) not in versions:
            raise VersionNotFoundError(f"Model version: {version} does not exist for model: {name}")
        return versions[version or self.defaults[name]]

    def default_models(self) -> list[FakeModel]:
        return [self.get(name) for name in sorted(self.defaults)]

    def versions(self, name: str) -> list[FakeModel]:
        self.get(name)
        return [model for model in self.models if model.name == name]

    async def register(self, url: str, **arguments: Any) -> FakeModel:
        self.calls.append({"url": url, **arguments})
        if self.error is not None:
            raise self.error
        workers = arguments["initial_workers"] if self.workers_of_yaml is None else self.workers_of_yaml
        model = FakeModel(arguments["model_name"] or "m", "1.0", url, workers)
        self.models.append(model)
        self.defaults.setdefault(model.name, model.version)
        return model

    async def unregister(self, name: str, version: str | None) -> None:
        model = self.get(name, version)
        if len(self.versions(name)) > 1 and model.version == self.defaults[name]:
            raise DefaultVersionError(f"Cannot remove default version for model {name}")
        self.models.remove(model)
        await self.drained.wait()

    async def set_default(self, name: str, version: str) -> None:
        self.get(name, version)
        self.defaults[name] = version

    async def changed(self) -> None:
        self.saves += 1


@dataclass
class Answer:
    status: int
    json: Any
    headers: dict[str, str] = field(default_factory=dict)


class Api:
    """A management listener with a registry of its own."""

    def __init__(self, *models: FakeModel, store: Path | None = None, **settings: Any):
        self.registry = FakeRegistry(*models)
        self.config = Config(model_store=str(store) if store else None, **settings)
        self.management = Management(self.registry, self.config)  # type: ignore[arg-type]

    def ask(self, method: str, target: str, body: bytes = b"", content_type: str = "application/json") -> Answer:
        """The answer, once everything the call has begun is done."""
        path, _, query = target.partition("?")
        headers = [("Content-Type", content_type)] if body else []
        request = Request(method, path, query=query, headers=headers, body=bytearray(body), id="an-id")

        async def run() -> Response:
            answers: list[Response] = []
            exchange = Exchange(request, lambda done: answers.append(done.response or Response(0)), keep_alive=True)
            router = Router(self.management.routes())
            router(exchange)
            while router.tasks or len(asyncio.all_tasks()) > 1:
                others = asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]
                if answers:
                    self.registry.drained.set()
                await asyncio.gather(*others, return_exceptions=True)
            [answer] = answers
            return answer

        response = asyncio.run(run())
        assert response.content_type == "application/json"
        return Answer(response.status, json.loads(bytes(response.body)), response.headers)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "m.mar").write_bytes(b"an archive")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden.mar").write_bytes(b"")
    return tmp_path


# --- list ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, names, token",
    [
        ("", ["a", "b", "c"], None),
        ("?limit=2", ["a", "b"], "2"),
        ("?limit=2&next_page_token=2", ["c"], None),
        ("?limit=3", ["a", "b", "c"], "3"),  # a token although the page ends exactly at the end
        ("?limit=1&next_page_token=2", ["c"], "3"),
        ("?limit=1&next_page_token=3", [], None),
        ("?limit=0", [], "0"),
        ("?limit=0&next_page_token=1", [], "1"),
        ("?limit=-1", ["a", "b", "c"], None),
        ("?limit=101", ["a", "b", "c"], None),
        ("?next_page_token=-5", ["a", "b", "c"], None),
        ("?next_page_token=99", [], None),
        ("?next_page_token=2147483647", [], None),
        ("?limit=2;next_page_token=1", ["b", "c"], "3"),
    ],
)
def test_list_gives_default_versions_in_pages(query: str, names: list[str], token: str | None) -> None:
    models = [FakeModel(name, version, f"{name}.mar") for name in "cab" for version in ("1", "2")]
    answer = Api(*models).ask("GET", f"/models{query}")
    assert answer.status == 200
    assert answer.json.get("nextPageToken") == token
    assert answer.json["models"] == [{"modelName": name, "modelUrl": f"{name}.mar"} for name in names]
    assert list(answer.json) == (["nextPageToken", "models"] if token is not None else ["models"])


def test_page_holds_at_most_a_hundred_models() -> None:
    api = Api(*(FakeModel(f"m{number:03d}") for number in range(150)))
    for query in ("", "?limit=1000", "?limit=-1"):
        answer = api.ask("GET", f"/models{query}")
        assert len(answer.json["models"]) == 100 and answer.json["nextPageToken"] == "100"


# --- describe --------------------------------------------------------------------------------------------------------

CONTRACT_KEYS = [
    "modelName", "modelVersion", "modelUrl", "runtime", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay",
    "responseTimeout", "startupTimeout", "maxRetryTimeoutInSec", "clientTimeoutInMills", "parallelType",
    "parallelLevel", "deviceType", "deviceIds", "continuousBatching", "useJobTicket", "useVenv", "stateful",
    "sequenceMaxIdleMSec", "sequenceTimeoutMSec", "maxNumSequence", "maxSequenceJobQueueSize", "loadedAtStartup",
    "workers", "jobQueueStatus", "customizedMetadata",
]  # fmt: skip


def test_description_has_torchserves_keys_in_its_order_and_pyserves_after_them() -> None:
    model = FakeModel()
    model.device_type, model.device_ids = "gpu", [0, 1]
    [described] = Api(model).ask("GET", "/models/m?customized=true").json
    keys = list(described)
    assert keys[: len(CONTRACT_KEYS)] == CONTRACT_KEYS
    assert keys[len(CONTRACT_KEYS) :] == [
        "lane", "state", "device", "weightsShared", "copies", "weightsSize", "minBatch", "precision", "checks",
        "modelDir",
    ]  # fmt: skip
    assert described["customizedMetadata"] == {}
    assert described["maxRetryTimeoutInSec"] == 300
    assert described["jobQueueStatus"] == {"remainingCapacity": 97, "pendingRequests": 3}


def test_description_leaves_out_what_is_not_configured_or_asked_for() -> None:
    [described] = Api(FakeModel()).ask("GET", "/models/m").json
    assert list(described)[: len(CONTRACT_KEYS) - 2] == [
        key for key in CONTRACT_KEYS if key not in ("deviceIds", "customizedMetadata")
    ]
    assert "error" not in described


@pytest.mark.parametrize("told, shown", [({"a": [1]}, {"a": [1]}), (None, {}), ("text", {}), ([1], {})])
def test_what_the_handler_says_of_itself_is_shown_if_it_is_an_object(told: object, shown: object) -> None:
    model = FakeModel()
    model.told = told
    assert Api(model).ask("GET", "/models/m?customized=true").json[0]["customizedMetadata"] == shown


def test_handler_that_cannot_describe_itself_is_an_error_of_its_own() -> None:
    model = FakeModel()
    model.told = ModelLoadError("it fell over")
    answer = Api(model).ask("GET", "/models/m?customized=true")
    assert (answer.status, answer.json["message"]) == (ModelLoadError("").status, "it fell over")


def test_settings_of_the_yaml_file_are_described() -> None:
    model = FakeModel()
    model.archive.config = ModelConfig.parse(
        b"maxRetryTimeoutInSec: 7\nsequenceBatching: true\nmaxNumSequence: 5\nuseJobTicket: true\nuseVenv: true\n"
        b"sequenceMaxIdleMSec: 900\nmaxSequenceJobQueueSize: 3\n", "m"
    )  # fmt: skip
    [described] = Api(model).ask("GET", "/models/m").json
    assert {
        "maxRetryTimeoutInSec": 7, "stateful": True, "maxNumSequence": 5, "useJobTicket": True, "useVenv": True,
        "sequenceMaxIdleMSec": 900, "maxSequenceJobQueueSize": 3, "continuousBatching": False,
    }.items() <= described.items()  # fmt: skip


def test_worker_is_described_with_local_time_and_a_literal_z() -> None:
    model = FakeModel()
    [described] = Api(model).ask("GET", "/models/m").json
    assert described["workers"] == [{
        "id": "9000", "startTime": "2026-11-23T01:57:15.723Z", "status": "READY", "memoryUsage": 7, "pid": 42,
        "gpu": False, "gpuUsage": "N/A",
    }]  # fmt: skip


def test_worker_start_in_another_zone_is_shown_in_local_time() -> None:
    model = FakeModel()
    aware = STARTED.astimezone(timezone.utc)
    model.worker_rows = lambda: [  # type: ignore[method-assign]
        SimpleNamespace(id="1", start_time=aware, status="READY", memory_usage=0, pid=1, gpu=False, gpu_id=None)
    ]
    assert Api(model).ask("GET", "/models/m").json[0]["workers"][0]["startTime"] == "2026-11-23T01:57:15.723Z"


def test_failed_model_says_why_and_statistics_are_shown() -> None:
    model = FakeModel(workers=0)
    model.state, model.error = "FAILED", "weights do not fit"
    model.measured = {
        "batch_size": ([1.0, 2.0, 4.0], [5, 0, 2, 1], 40.0),
        "queue": ([0.1], [3, 1], 0.01),
    }
    [described] = Api(model).ask("GET", "/models/m").json
    assert (described["state"], described["error"], described["workers"]) == ("FAILED", "weights do not fit", [])
    assert described["batchSizeHistogram"] == {"1": 5, "4": 2, "more": 1}
    assert described["meanQueueMs"] == 2.5


def test_a_model_on_accelerators_names_them_and_what_fits() -> None:
    model = FakeModel()
    model.native_devices, model.measured = ("cuda:0", "cuda:2"), {"batch_ceiling": 0}
    [described] = Api(model).ask("GET", "/models/m").json
    assert described["devices"] == ["cuda:0", "cuda:2"] and "batchCeiling" not in described
    assert "stagingNote" not in described
    model.measured = {"batch_ceiling": 16, "pinned_refused": 2}
    [described] = Api(model).ask("GET", "/models/m").json
    assert described["batchCeiling"] == 16 and "ulimit -l" in described["stagingNote"]
    model.native_devices = ()
    [described] = Api(model).ask("GET", "/models/m").json
    assert "devices" not in described and "batchCeiling" not in described


@pytest.mark.parametrize(
    "path, versions",
    [("/models/m", ["1"]), ("/models/m/2", ["2"]), ("/models/m/all", ["1", "2"]), ("/models/m/", ["1"])],
)
def test_description_is_an_array_of_the_versions_asked_for(path: str, versions: list[str]) -> None:
    api = Api(FakeModel("m", "1"), FakeModel("m", "2"), FakeModel("n"))
    assert [row["modelVersion"] for row in api.ask("GET", path).json] == versions
    assert "customizedMetadata" not in api.ask("GET", "/models/m/all?customized=true").json[0]


@pytest.mark.parametrize(
    "method, path",
    [("GET", "/models/x"), ("GET", "/models/x/1.0"), ("GET", "/models/x/all"), ("PUT", "/models/x"),
     ("DELETE", "/models/x"), ("PUT", "/models/x/1/set-default"), ("OPTIONS", "/models/x"), ("GET", "/v1/models/x")],
)  # fmt: skip
def test_unknown_model_is_404_everywhere(method: str, path: str) -> None:
    answer = Api(FakeModel()).ask(method, path)
    assert (answer.status, answer.json["type"]) == (404, "ModelNotFoundException")
    assert answer.json["message"] == "Model not found: x"
    assert answer.json["detail"]["request_id"] == "an-id"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_unknown_version_is_404(method: str) -> None:
    answer = Api(FakeModel()).ask(method, "/models/m/9")
    assert (answer.status, answer.json["type"]) == (404, "ModelVersionNotFoundException")
    assert answer.json["message"] == "Model version: 9 does not exist for model: m"


@pytest.mark.parametrize("workers, ready", [(1, True), (0, False)])
def test_kserve_readiness_tells_whether_a_worker_is_ready(workers: int, ready: bool) -> None:
    assert Api(FakeModel(workers=workers)).ask("GET", "/v1/models/m").json == {"name": "m", "ready": ready}


# --- register --------------------------------------------------------------------------------------------------------

WITHOUT_WORKERS = (
    'Model "m" Version: 1.0 registered with 0 initial workers. Use scale workers API to add workers for the model.'
)


@pytest.mark.parametrize(
    "query, status, text",
    [
        ("", 200, WITHOUT_WORKERS),
        ("&initial_workers=0", 200, WITHOUT_WORKERS),
        ("&initial_workers=0&synchronous=false", 200, WITHOUT_WORKERS),
        ("&initial_workers=2", 200, 'Model "m" Version: 1.0 registered with 2 initial workers'),
        ("&initial_workers=2&synchronous=TRUE", 200, 'Model "m" Version: 1.0 registered with 2 initial workers'),
        ("&initial_workers=2&synchronous=false", 202, "Processing worker updates..."),
    ],
)
def test_register_answers_as_torchserve_does(store: Path, query: str, status: int, text: str) -> None:
    answer = Api(store=store).ask("POST", f"/models?url=m.mar{query}")
    assert (answer.status, answer.json) == (status, {"status": text})


def test_register_passes_on_what_was_given_and_nothing_else(store: Path) -> None:
    api = Api(store=store)
    api.ask("POST", "/models?url=m.mar")
    api.ask(
        "POST",
        "/models?url=m.mar&model_name=n&handler=h.py:f&runtime=python3&batch_size=4&max_batch_delay=20"
        "&response_timeout=60&startup_timeout=61&initial_workers=1&synchronous=false&s3_sse_kms=false",
    )
    assert api.registry.calls == [
        {"url": "m.mar", "waits": True, "model_name": None, "handler": None, "runtime": None,
         "initial_workers": 0, "settings": {}},
        {
            "url": "m.mar", "waits": False, "model_name": "n", "handler": "h.py:f", "runtime": "python3",
            "initial_workers": 1,
            "settings": {"batch_size": 4, "max_batch_delay": 20, "response_timeout": 60, "startup_timeout": 61},
        },
    ]  # fmt: skip


def test_json_body_takes_the_place_of_the_query(store: Path) -> None:
    api = Api(store=store)
    body = b'{"url": "m.mar", "initial_workers": 1, "batch_size": 2}'
    assert api.ask("POST", "/models?url=other.mar&colour=red", body, "application/json; charset=utf-8").status == 200
    assert api.registry.calls[0]["settings"] == {"batch_size": 2}
    assert api.ask("POST", "/models?url=m.mar", b" ").status == 200  # an empty body leaves the query
    assert api.ask("POST", "/models?url=m.mar", b"{", "text/plain").status == 200


def test_number_of_workers_defaults_to_the_configuration_and_yields_to_the_archive(store: Path) -> None:
    api = Api(store=store, default_workers_per_model=3)
    assert api.ask("POST", "/models?url=m.mar").json["status"].endswith("registered with 3 initial workers")
    api.registry.workers_of_yaml = 5
    answer = api.ask("POST", "/models?url=m.mar&initial_workers=1")
    assert answer.json["status"].endswith("registered with 5 initial workers")


@pytest.mark.parametrize(
    "query, status, kind, message",
    [
        ("", 400, "BadRequestException", "Parameter url is required."),
        ("?model_name=m", 400, "BadRequestException", "Parameter url is required."),
        ("?url=m.mar&runtime=java", 400, "BadRequestException", "Invalid RuntimeType value: java"),
        ("?url=m.mar&runtime=LSP", 400, "BadRequestException", "Invalid RuntimeType value: LSP"),
    ],
)  # fmt: skip
def test_archive_that_may_not_be_registered_is_refused(
    store: Path, query: str, status: int, kind: str, message: str
) -> None:
    api = Api(store=store)
    answer = api.ask("POST", f"/models{query}")
    assert (answer.status, answer.json["type"], answer.json["message"]) == (status, kind, message)
    assert api.registry.calls == []


def test_key_of_an_object_store_is_of_no_use_elsewhere(store: Path) -> None:
    api = Api(store=store)
    assert api.ask("POST", "/models?url=m.mar&s3_sse_kms=true").json["unused"] == ["s3_sse_kms"]
    assert "unused" not in api.ask("POST", "/models?url=s3://b/m.mar&s3_sse_kms=true").json


@pytest.mark.parametrize(
    "error",
    [
        ConflictError("Model version 1.0 is already registered for model m"),
        ModelLoadError("Failed to start workers for model m version: 1.0"),
        OutOfMemoryError("Failed to start workers for model m version: 1.0"),
    ],
)
def test_error_of_the_registry_is_the_answer(store: Path, error: ServeError) -> None:
    api = Api(store=store)
    api.registry.error = error
    answer = api.ask("POST", "/models?url=m.mar&initial_workers=1")
    assert (answer.status, answer.json["type"], answer.json["message"]) == (error.status, error.type, error.message)


# --- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, status, text, scalings",
    [
        ("/models/m", 202, "Processing worker updates...", [(1, 1)]),
        ("/models/m?min_worker=3", 202, "Processing worker updates...", [(3, 3)]),
        ("/models/m?min_worker=0", 202, "Processing worker updates...", [(0, 0)]),
        ("/models/m?min_worker=2&max_worker=4", 202, "Processing worker updates...", [(2, 4)]),
        ("/models/m?max_worker=4", 202, "Processing worker updates...", [(1, 4)]),
        ("/models/m?synchronous=true", 200, "Workers scaled to 1 for model: m", [(1, 1)]),
        ("/models/m?min_worker=3&synchronous=true", 200, "Workers scaled to 3 for model: m", [(3, 3)]),
        ("/models/m/1.0?min_worker=3&synchronous=true", 200,
         "Workers scaled to 3 for model: m, version: 1.0", [(3, 3)]),
        ("/models/m?model_version=1.0&min_worker=3&synchronous=true", 200,
         "Workers scaled to 3 for model: m, version: 1.0", [(3, 3)]),
        ("/models/m?min_worker=5&synchronous=true", 206, "Workers scaling in progress...", [(5, 5)]),
    ],
)  # fmt: skip
def test_scale_answers_as_torchserve_does(target: str, status: int, text: str, scalings: list[tuple[int, int]]) -> None:
    model = FakeModel(workers=2)
    model.running_max = 4
    api = Api(model)
    answer = api.ask("PUT", target)
    assert (answer.status, answer.json) == (status, {"status": text})
    assert model.scalings == scalings
    assert api.registry.saves == 1  # what was answered survives a crash


@pytest.mark.parametrize(
    "query, status, text, changed, scalings",
    [
        ("batch_size=8", 202, "Processing worker updates...", {"batch_size": "1 -> 8"}, []),
        ("batch_size=8&max_batch_delay=20&synchronous=true", 200, "Workers scaled to 2 for model: m",
         {"batch_size": "1 -> 8", "max_batch_delay": "100 -> 20"}, []),
        ("response_timeout=60&startup_timeout=61&job_queue_size=7&batch_size=4&min_batch=2", 202,
         "Processing worker updates...",
         {"batch_size": "1 -> 4", "response_timeout": "120 -> 60", "startup_timeout": "120 -> 61",
          "min_batch": "1 -> 2", "job_queue_size": "100 -> 7"}, []),
        ("batch_size=8&min_worker=3&synchronous=true", 200, "Workers scaled to 3 for model: m",
         {"batch_size": "1 -> 8"}, [(3, 3)]),
        ("batch_size=8&max_worker=4", 202, "Processing worker updates...", {"batch_size": "1 -> 8"}, [(2, 4)]),
        ("batch_size=1", 202, "Processing worker updates...", {"batch_size": "1 -> 1"}, []),
    ],
)  # fmt: skip
def test_settings_are_changed_live_and_told_old_and_new(
    query: str, status: int, text: str, changed: dict[str, str], scalings: list[tuple[int, int]]
) -> None:
    model = FakeModel(workers=2)
    api = Api(model)
    answer = api.ask("PUT", f"/models/m?{query}")
    assert (answer.status, answer.json) == (status, {"status": text, "changed": changed})
    assert model.scalings == scalings
    assert api.registry.saves >= 1


@pytest.mark.parametrize(
    "target, fix",
    [
        ("/models/m?min_workers=3", "did you mean min_worker?"),
        ("/models/m?batch_size=8&batchsize=9", "did you mean batch_size?"),
        ("/models/m?batch_size=8&min_worker=nan", "Parameter min_worker"),
        ("/models/m?min_worker=-1", "Parameter min_worker"),
        ("/models/m?min_worker=1000000000", "Parameter min_worker"),
        ("/models/m?batch_size=dd", "Parameter batch_size"),
        ("/models/m?batch_size=0&min_worker=2", "Parameter batch_size"),
        ("/models/m?synchronous=nan", "Parameter synchronous"),
        ("/models/m?timeout=-1", "Parameter timeout"),
        ("/models/m?batch_size=8&min_worker=4&max_worker=3", "max_worker cannot be less than min_worker."),
        ("/models/m?max_worker=0", "max_worker cannot be less than min_worker."),
        ("/models/m?batch_size=2&min_batch=3&min_worker=4", "min_batch"),
        ("/models/m/1.0?model_version=2.0", "give one"),
    ],
)
def test_refused_scale_call_changes_nothing(target: str, fix: str) -> None:
    model = FakeModel(workers=2)
    api = Api(model)
    answer = api.ask("PUT", target)
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert fix in answer.json["message"]
    assert (model.batch_size, model.workers_min, model.scalings, api.registry.saves) == (1, 2, [], 0)


def test_parameters_without_effect_are_named() -> None:
    answer = Api(FakeModel()).ask("PUT", "/models/m?min_worker=1&number_gpu=0&timeout=5")
    assert answer.json == {"status": "Processing worker updates...", "unused": ["number_gpu", "timeout"]}


@pytest.mark.parametrize("path, version", [("/models/m", "null"), ("/models/m/1.0", "1.0")])
@pytest.mark.parametrize("kind", [ModelLoadError, OutOfMemoryError])
def test_workers_that_do_not_start_are_the_answer_of_a_synchronous_call(
    path: str, version: str, kind: type[ServeError]
) -> None:
    model = FakeModel()
    model.scale_error = kind("weights do not fit")
    answer = Api(model).ask("PUT", f"{path}?min_worker=2&synchronous=true")
    assert (answer.status, answer.json["type"]) == (kind.status, "InternalServerException")
    assert answer.json["message"] == f"Failed to start workers for model m version: {version}"
    assert answer.json["detail"]["reason"] == "weights do not fit"


def test_workers_that_do_not_start_later_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    model.scale_error = ModelLoadError("weights do not fit")
    with caplog.at_level(logging.ERROR):
        assert Api(model).ask("PUT", "/models/m?min_worker=2").status == 202
    assert "scaling m 1.0 failed" in caplog.text


# --- set default, unregister -----------------------------------------------------------------------------------------


def test_default_version_is_set() -> None:
    api = Api(FakeModel("m", "1"), FakeModel("m", "2"))
    answer = api.ask("PUT", "/models/m/2/set-default")
    assert answer.json == {"status": 'Default version successfully updated for model "m" to "2"'}
    assert api.registry.defaults == {"m": "2"}


def test_default_version_that_does_not_exist_is_refused_without_a_colon() -> None:
    answer = Api(FakeModel()).ask("PUT", "/models/m/9/set-default")
    assert (answer.status, answer.json["type"]) == (404, "ModelVersionNotFoundException")
    assert answer.json["message"] == "Model version 9 does not exist for model m"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_set_default_takes_no_other_method(method: str) -> None:
    api = Api(FakeModel())
    answer = api.ask(method, "/models/m/1.0/set-default")
    assert (answer.status, answer.headers["Allow"]) == (405, "PUT")
    assert len(api.registry.models) == 1


@pytest.mark.parametrize("path", ["/models/m", "/models/m/1.0", "/models/m?synchronous=true&timeout=5"])
def test_model_is_unregistered(path: str) -> None:
    api = Api(FakeModel())
    answer = api.ask("DELETE", path)
    assert (answer.status, answer.json) == (200, {"status": 'Model "m" unregistered'})
    assert api.registry.models == []


@pytest.mark.parametrize("path", ["/models/m", "/models/m/1"])
def test_default_version_is_not_removed_while_there_are_others(path: str) -> None:
    answer = Api(FakeModel("m", "1"), FakeModel("m", "2")).ask("DELETE", path)
    assert (answer.status, answer.json["type"]) == (403, "InvalidModelVersionException")
    assert answer.json["message"] == "Cannot remove default version for model m"


def test_model_that_drains_too_long_is_answered_408_and_goes_on_draining() -> None:
    api = Api(FakeModel(), unregister_model_timeout=0)
    api.registry.drained.clear()
    answer = api.ask("DELETE", "/models/m")
    assert (answer.status, answer.json["type"]) == (408, "RequestTimeoutException")
    assert answer.json["message"] == "Timed out while cleaning resources: m"
    assert api.registry.models == []


@pytest.mark.parametrize(
    "method, target",
    [
        ("GET", "/models?limits=3"), ("GET", "/models?limit=abc"), ("GET", "/models?next_page_token=x"),
        ("GET", "/models/m?customised=true"), ("GET", "/models/m?customized=1"),
        ("GET", "/models/m/all?customized=nan"),
        ("POST", "/models?url=m.mar&model_nam=x"), ("POST", "/models?url=m.mar&synchronous=nan"),
        ("POST", "/models?url=m.mar&batch_size=dd"), ("POST", "/models?url=m.mar&initial_workers=nan"),
        ("POST", "/models?url=m.mar&response_timeout=-1"), ("POST", "/models?url=m.mar&model_name=../x"),
        ("DELETE", "/models/m?force=true"), ("DELETE", "/models/m?timeout=-1"),
        ("PUT", "/models/m/1.0/set-default?x=1"),
    ],
)  # fmt: skip
def test_unknown_or_malformed_parameter_is_refused_by_every_call(store: Path, method: str, target: str) -> None:
    api = Api(FakeModel(), store=store)
    answer = api.ask(method, target)
    assert (answer.status, answer.json["type"]) == (400, "BadRequestException")
    assert answer.json["detail"]["parameter"] in target
    assert len(api.registry.models) == 1 and api.registry.calls == []


def strict_api(store: Path, workers: int = 1) -> Api:
    return Api(FakeModel(workers=workers), store=store, compat="strict", enable_model_api=True)


def test_strict_mode_ignores_what_torchserve_ignores(store: Path) -> None:
    api = strict_api(store)
    assert api.ask("PUT", "/models/m?min_worker=nan&colour=red&synchronous=nan").status == 202
    assert api.ask("POST", "/models?url=m.mar&batch_size=dd").status == 200
    assert api.registry.calls[0]["settings"] == {} and api.registry.calls[0]["waits"]
    assert api.ask("POST", "/models?url=m.mar&synchronous=nan&initial_workers=1").status == 202
    answer = api.ask("PUT", "/models/m/1.0?min_worker=1&synchronous=true&model_version=9&number_gpu=1&timeout=x")
    assert answer.json == {"status": "Workers scaled to 1 for model: m, version: 1.0"}
    assert (
        api.ask("PUT", "/models/m?min_worker=&min_worker=5&synchronous=true")
        .json["status"]
        .startswith("Workers scaled to 1")
    )


OUT_OF_BOUNDS = (500, "IndexOutOfBoundsException", "Index -1 out of bounds for length 0")
TOO_FEW = (400, "BadRequestException", "max_worker cannot be less than min_worker.")


@pytest.mark.parametrize("is_synchronous", [True, False])
@pytest.mark.parametrize(
    "query, answer",
    [
        ("min_worker=-1", OUT_OF_BOUNDS), ("min_worker=-2", OUT_OF_BOUNDS), ("min_worker=-2147483648", OUT_OF_BOUNDS),
        ("min_worker=-1&max_worker=-1", OUT_OF_BOUNDS), ("min_worker=-1&max_worker=2", OUT_OF_BOUNDS),
        ("max_worker=-1", TOO_FEW), ("max_worker=0", TOO_FEW), ("min_worker=0&max_worker=-1", TOO_FEW),
        ("min_worker=2&max_worker=1", TOO_FEW), ("min_worker=x&max_worker=0", TOO_FEW),
    ],
)  # fmt: skip
def test_strict_mode_refuses_numbers_of_workers_as_torchserve_does(
    store: Path, query: str, answer: tuple[int, str, str], is_synchronous: bool
) -> None:
    api = strict_api(store, workers=3)
    told = api.ask("PUT", f"/models/m?{query}" + ("&synchronous=true" if is_synchronous else ""))
    assert (told.status, told.json["type"], told.json["message"]) == answer
    assert api.registry.models[0].scalings == []


def test_a_registration_with_workers_below_0_is_refused(store: Path) -> None:
    answer = Api(store=store).ask("POST", "/models?url=m.mar&initial_workers=-1")
    assert (answer.status, answer.json["detail"]["parameter"]) == (400, "initial_workers")
    api = strict_api(store)
    assert api.ask("POST", "/models?url=m.mar&initial_workers=-3").status == 200
    assert api.registry.calls[0]["initial_workers"] == 0


@pytest.mark.parametrize("query", ["min_worker=-1", "max_worker=-1", "min_worker=0&max_worker=-1", "number_gpu=-1",
                                   "timeout=-1", "min_worker=-1&max_worker=2"])  # fmt: skip
def test_a_number_below_0_is_refused_by_name(store: Path, query: str) -> None:
    api = Api(FakeModel(workers=3), store=store)
    answer = api.ask("PUT", f"/models/m?{query}")
    assert answer.status == 400 and re.search(
        r"Parameter \w+ cannot be .-1.; allowed: a whole number from 0", answer.json["message"]
    )
    assert api.registry.models[0].scalings == []


@pytest.mark.parametrize(
    "body, kind",
    [(b" ", "NullPointerException"), (b"{", "JsonSyntaxException"), (b'{"url": "m.mar", "batch_size": 2.5}',
     "JsonSyntaxException")],
)  # fmt: skip
def test_strict_mode_reads_a_json_body_as_torchserve_does(store: Path, body: bytes, kind: str) -> None:
    api = strict_api(store)
    answer = api.ask("POST", "/models?url=m.mar", body, "application/json")
    assert (answer.status, answer.json["type"]) == (500, kind) and api.registry.calls == []
    body = b'{"url": "m.mar", "batch_size": "2.0", "startup_timeout": 0, "colour": "red"}'
    assert api.ask("POST", "/models?batch_size=7", body, "application/json; charset=utf-8").status == 200
    assert api.registry.calls[0]["settings"] == {"batch_size": 2, "startup_timeout": 0}


# --- who may do what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, enabled",
    [
        ({}, True),
        ({"management_address": Address("0.0.0.0", 8081)}, False),
        ({"management_address": Address("0.0.0.0", 8081), "enable_model_api": True}, True),
        ({"enable_model_api": False}, False),
        ({"compat": "strict"}, False),
        ({"management_address": Address(path="/run/x.sock")}, True),
    ],
)
def test_model_api_is_on_only_for_this_machine_unless_said(
    store: Path, settings: dict[str, Any], enabled: bool
) -> None:
    api = Api(FakeModel("n"), store=store, **settings)
    for method, target in (("POST", "/models?url=m.mar"), ("DELETE", "/models/n")):
        answer = api.ask(method, target)
        assert answer.status == (200 if enabled else 405)
        if not enabled:
            assert answer.json["type"] == "MethodNotAllowedException"
    assert Api(FakeModel(), **settings).ask("PUT", "/models/m?min_worker=1").status == 202


@pytest.mark.parametrize("method, path", [("PUT", "/models"), ("DELETE", "/models"), ("POST", "/models/m"),
                                          ("POST", "/v1/models/m"), ("GET", "/")])  # fmt: skip
def test_other_method_is_405(method: str, path: str) -> None:
    answer = Api(FakeModel()).ask(method, path)
    assert (answer.status, answer.json["type"]) == (405, "MethodNotAllowedException")
    assert answer.headers["Allow"]


# --- descriptions of the API -----------------------------------------------------------------------------------------


def check_document(document: dict[str, Any]) -> None:
    """What OpenAPI 3.0.1 demands of the parts that are used."""
    assert document["openapi"] == "3.0.1"
    assert document["info"]["title"] and document["info"]["version"]
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids))
    for path, item in document["paths"].items():
        assert path.startswith("/")
        for method, operation in item.items():
            assert method in ("get", "put", "post", "delete", "options")
            assert operation["responses"]
            assert all(answer["description"] for answer in operation["responses"].values())
            rows = operation.get("parameters", [])
            in_path = {row["name"] for row in rows if row["in"] == "path"}
            assert in_path == {part.strip("{}") for part in path.replace(":", "/").split("/") if part[:1] == "{"}
            assert all(row["required"] for row in rows if row["in"] == "path")


@pytest.mark.parametrize("method, path", [("OPTIONS", "/"), ("GET", "/api-description"), ("POST", "/api-description")])
def test_management_describes_all_it_has_and_nothing_else(method: str, path: str) -> None:
    api = Api()
    document = api.ask(method, path).json
    check_document(document)
    assert document["info"]["title"] == "TorchServe APIs"
    described = {(verb.upper(), path) for path, item in document["paths"].items() for verb in item}
    routes = {
        (verb, pattern) for verbs, pattern, _ in api.management.routes()
        for verb in verbs.replace("*", "GET").split()
        if not (verb == "OPTIONS" and pattern != "/")
    }  # fmt: skip
    assert described == routes
    ids = {operation["operationId"] for item in document["paths"].values() for operation in item.values()}
    assert ids >= {
        "apiDescription", "listModels", "registerModel", "describeModel", "setAutoScale", "unregisterModel",
        "version_describeModel", "version_setAutoScale", "version_unregisterModel", "setDefault", "api-description",
    }  # fmt: skip


def test_described_parameters_are_those_that_are_read() -> None:
    paths = Api().ask("OPTIONS", "/").json["paths"]
    for (path, method), known in {
        ("/models", "get"): parameters.LIST, ("/models", "post"): parameters.REGISTER,
        ("/models/{model_name}", "get"): parameters.DESCRIBE, ("/models/{model_name}", "put"): parameters.SCALE,
        ("/models/{model_name}", "delete"): parameters.UNREGISTER,
    }.items():  # fmt: skip
        rows = paths[path][method]["parameters"]
        assert [row["name"] for row in rows if row["in"] == "query"] == [each.name for each in known]


def test_description_of_a_model_is_described_in_full() -> None:
    model = FakeModel()
    model.device_type, model.device_ids, model.error = "gpu", [0], "x"
    model.measured = {"batch_size": ([1.0], [1, 0], 1.0), "queue": ([1.0], [1, 0], 1.0), "stuck": 1}
    model.measured |= {"batch_ceiling": 8, "pinned_refused": 1}
    model.native_devices, model.is_scaling = ("cuda:0",), True
    [described] = Api(model).ask("GET", "/models/m?customized=true").json
    properties = Api().ask("OPTIONS", "/").json["components"]["schemas"]["Model"]["properties"]
    assert list(described) == list(properties)


@pytest.mark.parametrize("path", ["/models/m", "/models/m/1.0"])
def test_options_of_a_model_describes_how_to_manage_it(path: str) -> None:
    document = Api(FakeModel()).ask("OPTIONS", path).json
    check_document(document)
    assert document["info"] == {"title": "RESTful Management API for: m", "version": "1.0.0"}
    of_version = "/models/m/{model_version}"
    assert list(document["paths"]) == ["/models/m", of_version, f"{of_version}/set-default"]


def test_inference_and_its_models_describe_the_routes_they_have() -> None:
    patterns = {"/", "/ping", "/ready", "/live", "/api-description", "/predictions/{model_name}",
                "/predictions/{model_name}/{model_version}"}  # fmt: skip
    document = openapi.inference_api(patterns)
    check_document(document)
    assert set(document["paths"]) == patterns
    assert openapi.inference_api([pattern.replace("model_", "") for pattern in patterns]) == document
    of_model = openapi.model_api("m", patterns)
    check_document(of_model)
    assert of_model["info"] == {"title": "RESTful API for: m", "version": "1.0.0"}
    assert list(of_model["paths"]) == ["/predictions/m", "/predictions/m/{model_version}"]
    check_document(openapi.inference_api({*patterns, "/v1/models/{model_name}:predict", "/metrics"}))


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/models?url=m.mar&initial_workers=1"),
        ("PUT", "/models/m?min_worker=2&synchronous=true"),
        ("PUT", "/models/m?batch_size=8"),
        ("PUT", "/models/m/1.0/set-default"),
        ("DELETE", "/models/m"),
    ],
)
def test_a_change_that_could_not_be_written_down_is_made_and_says_so(method: str, target: str) -> None:
    answers = []
    for compat, problem in (("default", ""), ("default", "The disk is full."), ("strict", "The disk is full.")):
        api = Api(FakeModel(), compat=compat, enable_model_api=True)
        api.registry.not_kept = problem
        answers.append(api.ask(method, target))
    whole, cut, strict = answers
    assert (cut.status, cut.json) == (whole.status, {**whole.json, "warning": "The disk is full."})
    assert strict.status == whole.status and "warning" not in strict.json
