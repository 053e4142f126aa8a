"""What is registered though it is odd, what is not, and that what is given in a call goes before the manifest."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import zipfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.config.model_source import ModelSource
from pyserve.conversion.torchscript import traced_file
from pyserve.errors import InvalidModelError, ModelLoadError, ServeError
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from tests.models.test_registry import HANG_S, made, register, store
from tests.support.archive_files import manifest, write_folder, write_plain_mar
from tests.support.networks import Identity
from tests.support.packing import EAGER, pack

__all__ = ["store"]  # the fixture

OWN = b"""
def handle(data, context):
    return None if data is None else ["own"] * len(data)
def other(data, context):
    return None if data is None else ["other"] * len(data)
"""
TENSOR_CONFIG = b"input: {dtype: float32, shape: [4]}\n"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))


@asynccontextmanager
async def serving(store: Path, **options: Any) -> AsyncIterator[Registry]:
    """`made`, and the processes that workers are forked from are ended."""
    async with made(store, **options) as table:
        try:
            yield table
        finally:
            await table.drain()
            await table._services.spawner.close()


def write(store: Path, files: dict[str, bytes], name: str = "m.mar", **model: Any) -> str:
    if model.pop("without", False):
        return write_plain_mar(store / name, files).name
    text = manifest(**{"handler": "h.py", "serializedFile": None, **model})
    return write_plain_mar(store / name, {"MAR-INF/MANIFEST.json": text, **files}).name


def lane(model: Model) -> tuple[str, str | None]:
    return model.lane, model.built_in_handler


NOT_NEEDED: list[tuple[dict[str, bytes], dict[str, Any]]] = [
    ({"h.py": OWN, "model.pt": b""}, {"serializedFile": "model.pt"}),
    ({"h.py": OWN}, {"serializedFile": "model.pt", "modelFile": "model.py", "requirementsFile": "r.txt"}),
    ({"h.py": OWN, "model.py": b"", "r.txt": b""}, {"modelFile": "model.py", "requirementsFile": "r.txt"}),
    ({"h.py": OWN, "model.pt": b"PK\3\4broken"}, {"serializedFile": "model.pt"}),
    ({"my handler.py": OWN}, {"handler": "my handler.py"}),
    ({"h\u00e9.py": OWN}, {"handler": "h\u00e9.py"}),
    ({"h.v2.py": OWN}, {"handler": "h.v2.py:other"}),
    ({"h.py": OWN}, {"handler": "/home/me/work/../h.py:handle"}),
    ({"sub/h.py": OWN}, {"handler": "sub/h.py:handle"}),
    ({"sub/h.py": OWN}, {"handler": "sub.h"}),
    ({"h.py": OWN}, {"modelVersion": "1.0 beta", "modelName": "my m\u00f6del"}),
    (
        {"h.py": OWN, "c.yaml": b"isolation: none\nprecision: high\ninput: pictures\nbatchSize: many\n"},
        {"configFile": "c.yaml"},
    ),
]


def test_what_a_handler_does_not_need_keeps_no_model_from_it(store: Path) -> None:
    async def test() -> None:
        async with serving(store) as table:
            for number, (files, model) in enumerate(NOT_NEEDED):
                url = write(store, files, f"{number}.mar", **{"modelName": f"m{number}", **model})
                served = await register(table, url)
                assert (served.state, served.has_ready_worker, lane(served)) == ("READY", True, ("python", None)), model

    run(test())


READS_CONFIG = b"""
import yaml

class Handler:
    def initialize(self, context):
        with open(context.system_properties["model_dir"] + "/c.yaml") as file:
            expected = yaml.load(file, yaml.CSafeLoader)
        assert repr(context.model_yaml_config) == repr(expected), context.model_yaml_config

    def handle(self, data, context):
        return ["x"] * len(data)
"""


@pytest.mark.parametrize(
    "config",
    [
        "a: 2024-01-02\nb: 2024-01-02T03:04:05Z\nc: !!binary aGVsbG8=\nd: !!set {x}\ne: !!omap [x: 1]\nf: .nan\n"
        "h: {0: cat, 0.5: x, true: y, null: z, 2024-01-02: d}\n0: top\ng: 123456789012345678901234567890\n",
        "l: {" + ", ".join(f"{number}: a label of some length, number {number}" for number in range(9000)) + "}\n",
    ],
    ids=["types", "400 KB"],
)
def test_workers_read_model_config_as_yaml_has_it(store: Path, config: str) -> None:
    async def test() -> None:
        url = write(store, {"h.py": READS_CONFIG, "c.yaml": config.encode()}, configFile="c.yaml")
        async with serving(store) as table:
            assert (await register(table, url)).state == "READY"

    run(test())


@pytest.mark.parametrize(
    ("files", "model", "reason"),
    [
        ({"model.pt": b""}, {"serializedFile": "model.pt"}, 'serializedFile "model.pt" is empty'),
        ({}, {"serializedFile": "model.pt"}, 'serializedFile "model.pt" is not in the archive'),
        ({"w.pt": b"x"}, {"serializedFile": "w.pt", "modelFile": "net.py"}, 'modelFile "net.py" is not in the archive'),
        ({"model.pt": b"PK\3\4broken"}, {"serializedFile": "model.pt"}, "cut short"),
        ({"w.pt": b"x", "c.yaml": b"precision: high\n"}, {"serializedFile": "w.pt", "configFile": "c.yaml"},
         "precision must be one of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("handler", ["tensor", "text_classifier"])  # of the native lane, and of worker processes
def test_what_a_built_in_handler_needs_is_missed_when_it_is_loaded(
    store: Path, files: dict[str, bytes], model: dict[str, Any], reason: str, handler: str
) -> None:  # fmt: skip
    async def test() -> None:
        url = write(store, files, handler=handler, **model)
        open_archive(store / url).close()
        async with serving(store) as table:
            with pytest.raises(ServeError, match=reason):
                await register(table, url)
            assert table.all_models() == []

    run(test())


def test_handler_of_the_call_goes_before_the_manifests(store: Path) -> None:
    async def test() -> None:
        own = write(store, {"h.py": b"raise SystemError", "g.py": OWN})
        nowhere = write(store, {"g.py": OWN}, "n.mar", handler="zz.py", modelName="n")
        none = write(store, {"g.py": OWN}, "o.mar", handler=None, modelName="o")
        async with serving(store) as table:
            for url in (own, nowhere, none):
                model = await register(table, url, handler="../g.py:other")
                assert (model.state, model.handler_name) == ("READY", "../g.py:other")
            for url in (own, nowhere, none):
                with pytest.raises(ModelLoadError):
                    await register(table, url, model_name="x")

    run(test())


def test_default_service_handler_is_for_manifests_without_one(store: Path) -> None:
    async def test() -> None:
        first = write(store, {"h.py": OWN, "g.py": b"raise SystemError"})
        second = write(store, {"g.py": OWN}, "n.mar", handler=None, modelName="n")
        async with serving(store, default_service_handler="g.py:handle") as table:
            for url in (first, second):
                assert (await register(table, url)).state == "READY"

    run(test())


def test_model_file_is_converted_for_the_handler_that_is_given(store: Path) -> None:
    async def test() -> None:
        state = torch.nn.Linear(4, 2).state_dict()
        packed = pack(store, model_code=EAGER, state={f"linear.{key}": value for key, value in state.items()})
        with zipfile.ZipFile(packed) as file:
            files = {name: file.read(name) for name in file.namelist()}
        text = json.loads(files["MAR-INF/MANIFEST.json"])
        text["model"]["handler"] = "h.py"
        path = write_plain_mar(
            store / "own.mar", {**files, "h.py": OWN, "MAR-INF/MANIFEST.json": json.dumps(text).encode()}
        )
        async with serving(store) as table:
            model = await register(table, "own.mar", handler="tensor")
            assert (model.state, lane(model)) == ("READY", ("native", "tensor"))
            kept = traced_file(model.archive)
            assert kept.exists()
        with open_archive(path) as archive:
            assert traced_file(archive) != kept  # which is for the inputs of that handler

    run(test())


# ---- without a manifest


@pytest.mark.parametrize("is_folder", [True, False])
def test_archive_without_manifest_is_served_by_the_name_and_handler_of_the_call(store: Path, is_folder: bool) -> None:
    async def test() -> None:
        files = {"h.py": OWN, "model-config.yaml": b"batchSize: 7\n"}
        url = "folder" if is_folder else write(store, files, without=True)
        if is_folder:
            write_folder(store / url, files)
        async with serving(store) as table:
            for missing in ({}, {"model_name": "n"}, {"handler": "h.py"}):
                with pytest.raises(
                    InvalidModelError, match=r"has no MAR-INF/MANIFEST\.json; .* or give model_name= and"
                ):
                    await register(table, url, **missing)
            model = await register(table, url, model_name="n", handler="h.py")
            assert (model.name, model.version, model.state, model.batch_size) == ("n", "1.0", "READY", 1)
            assert model.archive.manifest.raw is None
            kept = json.loads((store.parent / "state.json").read_text())
        async with serving(store, started=False) as table:  # as after a crash
            await table.restore(kept)
            assert (table.get("n").state, table.failures) == ("READY", [])

    run(test())


def test_archive_without_manifest_at_the_start_is_named_by_its_file(store: Path) -> None:
    async def test() -> None:
        write(store, {"h.py": OWN}, "my-model.mar", without=True)
        write(store, {"h.py": OWN}, "n.mar", modelName=None)
        sources = [ModelSource(None, str(store / "my-model.mar")), ModelSource(None, str(store / "n.mar")),
                   ModelSource("given", str(store / "n.mar"))]  # fmt: skip
        async with serving(store, started=False, default_service_handler="h:handle") as table:
            await table.load_at_start(sources, {}, {})
            assert {model.name for model in table.all_models()} == {"my_model", "n", "given"}
        async with serving(store, started=False) as table:
            await table.load_at_start(sources, {}, {})
            assert {model.name for model in table.all_models()} == {"n", "given"}
            assert "has no MAR-INF/MANIFEST.json" in table.failures[0].error

    run(test())


# ---- what is odd is told once, and strict mode has TorchServe's way


def test_warnings_are_told_once(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        url = write(store, {"h.py": OWN, "c.yaml": b"batchSize: '4'\n"}, configFile="c.yaml", modelFile="net.py")
        async with serving(store) as table:
            model = await register(table, url)
            assert model.batch_size == 4
            for part in ("batchSize is", 'modelFile "net.py" is not in the archive'):
                assert sum(part in text for text in caplog.messages) == 1

    run(test())


def test_strict_leaves_out_what_is_in_quotes_and_refuses_an_odd_runtime(store: Path) -> None:
    async def test() -> None:
        url = write(store, {"h.py": OWN, "c.yaml": b"batchSize: '4'\nmaxBatchDelay: 7\n"}, configFile="c.yaml")
        text = json.loads(manifest(handler="h.py", serializedFile=None, modelName="n"))
        odd = {"MAR-INF/MANIFEST.json": json.dumps({**text, "runtime": "python2.7"}).encode(), "h.py": OWN}
        write_plain_mar(store / "n.mar", odd)
        async with serving(store, compat="strict") as table:
            model = await register(table, url)
            assert (model.batch_size, model.max_batch_delay_ms) == (1, 7)
            with pytest.raises(InvalidModelError, match=r"^Runtime is not defined or invalid\.$"):
                await register(table, "n.mar")
            assert (await register(table, "n.mar", runtime="python")).runtime == "python"
        async with serving(store) as table:
            assert (await register(table, "n.mar")).runtime == "python"

    run(test())


def test_settings_are_not_changed_by_looking(store: Path) -> None:
    pack(store, network=Identity())
    with open_archive(store / "m-1.0.mar") as archive:
        before = dataclasses.replace(archive.manifest)
        archive.use_handler(archive.manifest.handler)
        archive.check_complete()
        assert (archive.manifest, archive.given_handler) == (before, "")
