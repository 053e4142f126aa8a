"""The table of models, with real archives and the real engine: what a change leaves, above all when it fails."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource
from pyserve.engine import Engine
from pyserve.errors import (
    ConflictError,
    DefaultVersionError,
    InvalidModelError,
    ModelLoadError,
    ModelNotFoundError,
    ServeError,
    VersionNotFoundError,
)
from pyserve.lanes.resources import Services
from pyserve.lanes.spawner import Spawner
from pyserve.lanes.worker_slot import DOWN, SERVING, Condition
from pyserve.models import loader
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request
from pyserve.telemetry.metrics import Metrics
from tests.support.handler_archives import write_handler
from tests.support.networks import Affine, Gate, Gated, Identity
from tests.support.packing import EAGER, TENSOR_CONFIG, pack

HANG_S = 120


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@asynccontextmanager
async def made(store: Path, *, started: bool = True, **config: Any) -> AsyncIterator[Registry]:
    """A registry; ``started``: it keeps its state, as after the models of the start are loaded."""
    engine = Engine(asyncio.get_running_loop(), cpu_budget=2)
    pool = ThreadPoolExecutor(2)
    services = Services(
        Config(model_store=str(store), **config), engine, Metrics(torch_version=torch.__version__), pool, Spawner(),
        ErrorFormat(),
    )  # fmt: skip
    table = Registry(services, keep_state=lambda content: keep(store.parent / "state.json", content))
    if started:
        await table.load_at_start([], {}, {})
    try:
        yield table
    finally:
        await table.drain()
        pool.shutdown()
        engine.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))


async def register(table: Registry, url: str = "m-1.0.mar", *, workers: int = 1, **options: Any) -> Model:
    settings = options.pop("settings", {})
    arguments = {"model_name": None, "handler": None, **options}
    return await table.register(url, initial_workers=workers, settings=settings, **arguments)


def keep(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return ""


def state(store: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((store.parent / "state.json").read_text())
    return read


def descriptors_of(store: Path) -> int:
    """Open files of this process below the store."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith(str(store))
        except OSError:
            pass
    return count


def test_a_registered_model_is_ready_and_kept(store: Path) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            model = await register(table, workers=2, settings={"batch_size": 4})
            assert table.get("m") is table.get("m", "1.0") is model
            assert (model.state, model.wanted_workers, model.batch_size) == ("READY", 2, 4) and model.has_ready_worker
            assert (state(store)["models"][0]["workers"], state(store)["defaults"]) == (2, {"m": "1.0"})
            await table.unregister("m", None)
            assert table.all_models() == [] and state(store)["models"] == [] and state(store)["defaults"] == {}
            assert descriptors_of(store) == 0

    run(test())


def test_of_fifty_concurrent_registrations_one_wins(store: Path) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            results = await asyncio.gather(*(register(table) for _ in range(50)), return_exceptions=True)
            assert sum(isinstance(result, Model) for result in results) == 1
            conflicts = [result for result in results if isinstance(result, ConflictError)]
            assert len(conflicts) == 49
            assert conflicts[0].message == "Model version 1.0 is already registered for model m"
            assert table.get("m").has_ready_worker
            assert descriptors_of(store) <= 1  # the losers' archives are closed

    run(test())


def test_names_and_versions_registered_at_once_do_not_mix(store: Path) -> None:
    async def test() -> None:
        for version in ("1.0", "2.0"):
            pack(store, version=version, network=Identity())
        async with made(store) as table:
            await asyncio.gather(*(
                register(table, f"m-{version}.mar", model_name=name, workers=0)
                for name in ("a", "b", "c") for version in ("1.0", "2.0")
            ))  # fmt: skip
            found = {(model.name, model.version) for model in table.all_models()}
            assert found == {(name, version) for name in "abc" for version in ("1.0", "2.0")}
            await asyncio.gather(*(table.unregister(name, None) for name in ("a", "b")), return_exceptions=True)

    run(test())


def test_the_first_version_is_the_default_until_another_is_named(store: Path) -> None:
    async def test() -> None:
        for version in ("1.0", "2.0"):
            pack(store, version=version, network=Identity())
        async with made(store) as table:
            await register(table, workers=0)
            await register(table, "m-2.0.mar", workers=0)
            assert table.default_version("m") == "1.0"
            with pytest.raises(DefaultVersionError, match="Cannot remove default version for model m"):
                await table.unregister("m", None)
            with pytest.raises(DefaultVersionError):
                await table.unregister("m", "1.0")
            await table.set_default("m", "2.0")
            assert table.get("m").version == "2.0" and state(store)["defaults"] == {"m": "2.0"}
            await table.unregister("m", "1.0")
            assert [model.version for model in table.versions("m")] == ["2.0"]
            await table.unregister("m", "2.0")
            with pytest.raises(ModelNotFoundError, match="Model not found: m"):
                table.get("m")

    run(test())


def test_what_waits_is_refused_when_the_last_thread_is_taken_away(store: Path) -> None:
    gate = Gate(store.parent / "gate")
    statuses: list[int] = []

    def deliver(exchange: Exchange) -> None:
        assert exchange.response is not None
        statuses.append(exchange.response.status)

    def post(model: Model) -> None:
        request = Request("POST", "/predictions/m", headers=[("Content-Type", "application/json")],
                          body=bytearray(b"[1, 2, 3, 4]"), id="r", arrived_at=time.monotonic_ns())  # fmt: skip
        model.predict(Exchange(request, deliver))

    async def until(is_done: Callable[[], bool]) -> None:
        while not is_done():  # noqa: ASYNC110 - counts what a thread of C++ does
            await asyncio.sleep(0.001)

    async def test() -> None:
        pack(store, network=Gated(str(gate.path)))
        async with made(store) as table:
            model = await register(table)
            assert model.lane == "native"
            gate.shut()
            runs = gate.runs
            post(model)
            await until(lambda: gate.runs > runs)
            for _ in range(5):
                post(model)
            scaling = asyncio.ensure_future(model.scale(0, 0))
            await until(lambda: len(statuses) == 5)
            assert statuses == [503] * 5
            gate.open()
            await until(lambda: len(statuses) == 6)
            assert statuses[-1] == 200  # what runs is finished
            await scaling

    try:
        run(test())
    finally:
        gate.open()


def test_a_version_that_failed_does_not_become_the_default(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        for version in ("1.0", "2.0"):
            pack(store, version=version, network=Identity())
        async with made(store) as table:
            await register(table)
            await register(table, "m-2.0.mar")
            table.get("m", "2.0")._on_condition(Condition(DOWN, "its workers are gone"))
            with pytest.raises(ConflictError, match=r"version 2.0 of model m cannot be the default version") as refused:
                await table.set_default("m", "2.0")
            assert refused.value.detail["text"] == "its workers are gone"
            assert (table.default_version("m"), state(store)["defaults"]) == ("1.0", {"m": "1.0"})
            table.get("m", "2.0")._on_condition(Condition(SERVING))
            await table.set_default("m", "2.0")
            assert table.default_version("m") == "2.0"

    run(test())


def test_what_is_not_there_is_not_found(store: Path) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            await register(table, workers=0)
            with pytest.raises(VersionNotFoundError, match="9 does not exist for model"):
                table.get("m", "9")
            with pytest.raises(VersionNotFoundError, match="9 does not exist for model"):
                await table.set_default("m", "9")
            with pytest.raises(ModelNotFoundError):
                table.get("x")
            with pytest.raises(ModelNotFoundError):
                await table.set_default("x", "1.0")
            with pytest.raises(VersionNotFoundError):
                await table.unregister("m", "9")
            with pytest.raises(ModelNotFoundError):
                await register(table, "nowhere.mar")

    run(test())


def broken_archives(store: Path) -> dict[str, tuple[type[ServeError], str]]:
    (store / "junk.mar").write_bytes(b"junk")
    pack(store, name="state", network=Identity(), config="input: {dtype: float32, shape: [4]}\nminBatch: 4\n")
    pack(store, name="shape", network=Affine())
    pack(store, name="handler", network=Identity(), handler="vllm_handler")
    pack(store, name="eager", model_code="import missing_module\n" + EAGER)
    return {
        "junk.mar": (InvalidModelError, "junk.mar"),
        "state-1.0.mar": (InvalidModelError, "minBatch"),
        "shape-1.0.mar": (
            ModelLoadError,
            "cannot answer an example of its input (float32 [4]): the model's forward: mat1",
        ),
        "handler-1.0.mar": (ModelLoadError, "vllm_handler"),
        "eager-1.0.mar": (ModelLoadError, "missing_module"),
    }


async def closed(store: Path) -> None:
    """Returns once no file of the store is open. The thread that loaded may still be on its way out."""
    deadline = time.monotonic() + 60
    while descriptors_of(store):
        assert time.monotonic() < deadline, "a file of the store stays open"
        await asyncio.sleep(0.01)
        gc.collect()  # the error's frames, which refer to each other, hold the network that it was about


@pytest.mark.slow
def test_a_load_that_fails_leaves_nothing(store: Path) -> None:
    async def test() -> None:
        cases = broken_archives(store)
        async with made(store) as table:
            for url, (error, text) in cases.items():
                with pytest.raises(error, match=re.escape(text)):
                    await register(table, url)
                assert table.all_models() == [], url
                await closed(store)
                assert state(store)["models"] == []

    run(test())


def test_two_models_of_one_file_do_without_each_other(store: Path) -> None:
    async def test() -> None:
        path = str(pack(store, network=Identity()))
        async with made(store, started=False) as table:
            sources = [ModelSource("a", path), ModelSource("b", path)]
            await table.load_at_start(sources, {path: open_archive(path)}, {})
            first, second = table.get("a"), table.get("b")
            await table.unregister("a", None)
            assert await second.scale(2, 2) == 2 and second.archive.files
            assert first.archive is not second.archive and descriptors_of(store) <= 1
            await table.unregister("b", None)
            assert descriptors_of(store) == 0

    run(test())


@pytest.mark.slow
def test_at_start_what_fails_is_kept_with_its_reason_and_the_rest_is_served(store: Path) -> None:
    async def test() -> None:
        cases = broken_archives(store)
        pack(store, network=Identity())
        files = [*cases, "m-1.0.mar", "m-1.0.mar"]
        sources = [ModelSource(None, str(store / file)) for file in files]
        archives: dict[str, Any] = {}
        for source in sources:
            try:
                archives[source.path_or_file] = open_archive(source.path_or_file)
            except ServeError as error:
                archives[source.path_or_file] = error
        async with made(store, started=False) as table:
            await table.load_at_start(sources, archives, {})
            states = {model.name: model.state for model in table.all_models()}
            assert states == {"m": "READY", "shape": "FAILED", "handler": "FAILED", "eager": "FAILED"}
            assert "missing_module" in table.get("eager").error
            assert sorted(failure.url for failure in table.failures) == ["junk.mar", "m-1.0.mar", "state-1.0.mar"]
            await table.unregister("eager", None)  # what failed can be removed
            assert {entry["name"] for entry in state(store)["models"]} == {"m", "shape", "handler"}

    run(test())


# Does not come to an end while the file is there.
ENDLESS = """
import os
import time


def handle(data, context):
    return [b"x"] * len(data or [])


while os.path.exists(FILE):
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_model_that_does_not_load_in_time_has_failed_until_it_does(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyserve.models.recovery.CRASH_PAUSES_S", (0.01,))
    blocker = store / "blocker"
    write_handler(store, "late", f"FILE = {str(blocker)!r}\n{ENDLESS}", config={"startupTimeout": 1})
    path = str(store / "late.mar")

    async def test() -> None:
        blocker.touch()
        async with made(store, started=False) as table:
            await table.load_at_start([ModelSource(None, path)], {path: open_archive(path)}, {})
            model = table.get("late")
            assert model.state == "FAILED" and "startup_timeout=1" in model.error
            blocker.unlink()
            while model.state != "READY":  # noqa: ASYNC110 - tried again by a timer, which reports nothing
                await asyncio.sleep(0.01)
            assert model.has_ready_worker and model.wanted_workers == 1 and not model.error

    run(test())


def hold_loading(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, Callable[[], None]]:
    """(set when a load has begun, lets the loads go on)."""
    import threading

    begun, go = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    load = loader.load_network

    def held(*args: Any, **kwargs: Any) -> Any:
        loop.call_soon_threadsafe(begun.set)
        assert go.wait(HANG_S)
        return load(*args, **kwargs)

    monkeypatch.setattr("pyserve.models.lane_choice.load_network", held)
    return begun, go.set


def test_unregistering_a_model_that_is_loading_ends_both(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            begun, go = hold_loading(monkeypatch)
            loading = asyncio.ensure_future(register(table))
            await begun.wait()
            removing = asyncio.ensure_future(table.unregister("m", None))
            await asyncio.sleep(0)
            assert table.all_models() == []
            go()
            with pytest.raises(ConflictError, match="was unregistered while it was loading"):
                await loading
            await removing
            assert descriptors_of(store) == 0
            await register(table)
            assert table.get("m").has_ready_worker

    run(test())


def test_a_model_that_is_loading_is_not_in_the_state_yet(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        pack(store, name="other", network=Identity())
        async with made(store) as table:
            await register(table, "other-1.0.mar", workers=0)
            begun, go = hold_loading(monkeypatch)
            loading = asyncio.ensure_future(register(table))
            await begun.wait()
            await table.changed()
            assert [entry["name"] for entry in state(store)["models"]] == ["other"]
            go()
            await loading
            assert sorted(entry["name"] for entry in state(store)["models"]) == ["m", "other"]

    run(test())


def test_the_state_brings_back_models_settings_workers_and_defaults(store: Path) -> None:
    async def test() -> None:
        for version in ("1.0", "2.0"):
            pack(store, version=version, network=Identity())
        pack(store, name="gone", network=Identity())
        async with made(store) as table:
            await register(table, settings={"batch_size": 4})
            model = await register(table, "m-2.0.mar", workers=0)
            await register(table, "gone-1.0.mar", workers=0)
            await table.set_default("m", "2.0")
            await model.scale(2, 3)
            model.configure({"max_batch_delay": 7, "job_queue_size": 50})
            await table.changed()
        kept = state(store)
        assert len(kept["models"]) == 3  # draining is no change
        (store / "gone-1.0.mar").unlink()
        async with made(store, started=False) as table:
            await table.restore(kept)
            assert table.default_version("m") == "2.0"
            first, second = table.get("m", "1.0"), table.get("m", "2.0")
            assert (first.batch_size, first.wanted_workers) == (4, 1)
            assert (second.wanted_workers, second.workers_min, second.workers_max) == (2, 2, 3)
            assert (second.max_batch_delay_ms, second.queue_size_max) == (7, 50)
            assert first.has_ready_worker and second.has_ready_worker
            assert [failure.name for failure in table.failures] == ["gone"]

    run(test())


def test_a_change_whose_state_cannot_be_kept_is_made_says_so_and_is_kept_with_the_next(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            with monkeypatch.context() as patch:
                patch.setattr(Path, "write_bytes", fail)
                await register(table, workers=0)
            assert "the disk is full (ENOSPC" in table.not_kept
            assert table.get("m").state == "READY"
            assert state(store)["models"] == []
            await table.changed()
            assert table.not_kept == ""
            assert [model["name"] for model in state(store)["models"]] == ["m"]

    run(test())


def fail(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_scaling_keeps_to_its_bounds(store: Path) -> None:
    async def test() -> None:
        pack(store, network=Identity())
        async with made(store) as table:
            model = await register(table)
            assert await model.scale(3, 3) == 3
            assert await model.scale(1, 2) == 2
            assert await model.scale(0, 0) == 0
            assert not model.has_ready_worker
            assert await model.scale(1, 4) == 1
            assert model.has_ready_worker

    run(test())


def test_configuring_applies_nothing_when_one_value_is_wrong(store: Path) -> None:
    async def test() -> None:
        pack(store, network=Identity(), config=TENSOR_CONFIG + "batchSize: 4\n")
        async with made(store) as table:
            model = await register(table, workers=0)
            with pytest.raises(ServeError, match="min_batch"):
                model.configure({"max_batch_delay": 5, "min_batch": 9})
            assert (model.max_batch_delay_ms, model.min_batch) == (100, 1)
            assert model.configure({"max_batch_delay": 5}) == {"max_batch_delay": (100, 5)}

    run(test())
