"""Snapshots: the format, what an interruption at any step leaves, and servers that come back with what they served."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.config.config import Config, load_config
from pyserve.config.properties import format_properties, parse_properties
from pyserve.models import snapshot
from pyserve.models.snapshot import (
    CHANGE,
    SHUTDOWN,
    SNAPSHOT_COUNT_MAX,
    STARTUP,
    SnapshotFolder,
    models_to_restore,
    snapshot_names,
    write_durably,
)
from pyserve.models.snapshot_models import SnapshotError, saved_models
from pyserve.models.state_file import StateKeeper
from pyserve.os_errors import cause_of
from pyserve.server import pid_file
from tests.support.serving import ROOT, Server, at_once
from tests.support.serving_models import Linear

pytest_plugins = ["tests.support.serving_fixtures"]

ITEM = [0.5, -1, 2, 0.25]
STEPS = ["created", "written", "synced", "renamed", "folder synced", "pruned"]
ENTRY = {
    "defaultVersion": True, "marName": "m.mar", "minWorkers": 1, "maxWorkers": 5, "batchSize": 2, "maxBatchDelay": 7,
}  # fmt: skip


def models(batch_size: int = 2) -> dict[str, Any]:
    return {"m": {"1.0": {**ENTRY, "batchSize": batch_size}}}


def restored_batch_size(folder: Path) -> int | None:
    """Of the model in the newest whole snapshot; None if there is none."""
    found = models_to_restore(Config(restore=True), folder)
    return None if found is None else found[0].settings["batch_size"]


# --- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["", "plain", " in front", "a = b: c # d ! e", "C:\\x\\", "tab\tline\nend\r\f", "é ü", "鳥", "🦆", "a,b "]
)
def test_what_is_written_as_properties_is_read_back(value: str) -> None:
    text = format_properties({"key": value, "a key": value}, "one\ntwo")
    assert text.isascii() and text.startswith("#one\n#two\n")
    assert [(entry.key, entry.value) for entry in parse_properties(text)] == [("key", value), ("a key", value)]


def test_a_snapshot_is_a_configuration_with_everything_but_secrets(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "config.properties").write_text(
        f"model_store={tmp_path / 'store'}\ninference_address=http://127.0.0.1:8085\nkeystore_pass=secret\n"
        'job_queue_size=7\ncors_allowed_origin=*\nmodels={"m": {"1.0": {"minWorkers": 3}}}\nload_models=all\n'
    )
    config = load_config(ts_config=str(tmp_path / "config.properties"), environ={})
    SnapshotFolder(tmp_path / "config", config).write(STARTUP, models())
    [name] = snapshot_names(tmp_path / "config")
    text = (tmp_path / "config" / name).read_text()
    assert "inference_address=http\\://127.0.0.1\\:8085\n" in text
    assert "secret" not in text and "keystore_pass" not in text

    values = {entry.key: entry.value for entry in parse_properties(text)}
    assert values["tsConfigFile"] == str(tmp_path / "config.properties") and values["version"]
    written = json.loads(values["model_snapshot"])
    assert list(written) == ["name", "modelCount", "created", "models"]
    assert (written["name"], written["modelCount"], written["models"]) == (name, 1, models())
    assert abs(written["created"] / 1000 - (tmp_path / "config" / name).stat().st_mtime) < 60

    again = load_config(ts_config=str(tmp_path / "config" / name), environ={})
    not_compared = {"origin", "overridden", "notices", "model_snapshot", "keystore_pass"}
    assert {k: v for k, v in vars(again).items() if k not in not_compared} == {
        k: v for k, v in vars(config).items() if k not in not_compared
    }
    assert again.model_snapshot == written


def test_a_signed_url_is_written_without_its_signature(tmp_path: Path) -> None:
    signed = "m=https://host/m.mar?X-Amz-Signature=abc123&part=1"
    SnapshotFolder(tmp_path, Config(load_models=signed)).write(STARTUP, models())
    text = (tmp_path / snapshot_names(tmp_path)[0]).read_text()
    assert "abc123" not in text and "https\\://host/m.mar" in text


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({}, ""),
        ({"responseTimeout": 30, "startupTimeout": 40, "runtimeType": "python", "parallelLevel": 2}, ""),
        ({"unheard": 1}, ""),
        *(({key: None}, f"{key} ") for key in ENTRY),
        ({"batchSize": 0}, "batchSize must be a whole number from 1"),
        ({"batchSize": "2"}, "batchSize must be"),
        ({"minWorkers": 6}, "maxWorkers (5) is less than minWorkers"),
        ({"maxBatchDelay": -1}, "maxBatchDelay must be"),
        ({"responseTimeout": 0}, "responseTimeout must be"),
        ({"defaultVersion": "true"}, "defaultVersion must be true or false"),
        ({"marName": "../m.mar"}, "marName must be the name of a file"),
        ({"marName": ""}, "marName must be"),
        ({"handler": 1}, "handler must be text"),
        ({"workers": -1}, "workers must be"),
        ({"minBatch": 3}, "minBatch (3) is larger than batchSize (2)"),
    ],
)
def test_which_keys_a_model_needs_and_what_they_may_be(changes: dict[str, Any], problem: str) -> None:
    entry = {key: value for key, value in {**ENTRY, **changes}.items() if value is not None}
    [model] = saved_models({"models": {"m": {"1.0": entry}}}, "/store")
    assert problem in model.problem and bool(problem) == bool(model.problem)
    assert not problem or model.problem.startswith("model_snapshot: m 1.0: ")
    assert problem or (model.path, model.settings["workers_max"]) == ("/store/m.mar", 5)


@pytest.mark.parametrize("text", [{}, {"models": []}, {"models": {"m": 1}}, {"models": {"m": {"1.0": []}}}])
def test_an_object_of_another_shape_is_no_snapshot(text: dict[str, Any]) -> None:
    with pytest.raises(SnapshotError):
        saved_models(text, None)


# --- files ------------------------------------------------------------------------------------------------------------


def test_snapshots_sort_in_their_order_whatever_the_clock_does(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, Config())
    for number in range(10):  # many within one millisecond
        folder.write(CHANGE, models(number + 1))
    (tmp_path / "29991231235959998-snapshot.cfg").write_text("")  # the clock was set back since
    folder.write(SHUTDOWN, models(50))
    names = snapshot_names(tmp_path)
    assert len(names) == 12 and names[-1] == "29991231235959999-shutdown.cfg"
    assert restored_batch_size(tmp_path) == 50
    for number, name in enumerate(names[:10]):
        assert f'"batchSize"\\: {number + 1},' in (tmp_path / name).read_text()


def test_the_oldest_snapshots_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.cfg").write_text("")
    old, new = tmp_path / ".snapshot-old", tmp_path / ".snapshot-new"
    for draft in (old, new):
        draft.write_text("")
    os.utime(old, (1, 1))
    folder = SnapshotFolder(tmp_path, Config())
    for number in range(3 * SNAPSHOT_COUNT_MAX):
        folder.write(CHANGE if number else STARTUP, models(number + 1))
        assert len(snapshot_names(tmp_path)) == min(number + 1, SNAPSHOT_COUNT_MAX)
    assert restored_batch_size(tmp_path) == 3 * SNAPSHOT_COUNT_MAX
    assert (tmp_path / "mine.cfg").exists() and new.exists() and not old.exists()
    assert len(list(tmp_path.iterdir())) == SNAPSHOT_COUNT_MAX + 2


KILLED = """
import os, signal, sys
from pathlib import Path
from pyserve.config.config import Config
from pyserve.models.snapshot import CHANGE, SnapshotFolder
def on_step(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
entry = {"defaultVersion": True, "marName": "m.mar", "minWorkers": 1, "maxWorkers": 5, "maxBatchDelay": 7}
SnapshotFolder(Path(sys.argv[1]), Config(), on_step=on_step).write(CHANGE, {"m": {"1.0": {**entry, "batchSize": 9}}})
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_writer_killed_at_any_step_leaves_before_or_after(tmp_path: Path, step: str) -> None:
    SnapshotFolder(tmp_path, Config()).write(STARTUP, models(2))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), step], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert restored_batch_size(tmp_path) == (9 if STEPS.index(step) >= STEPS.index("renamed") else 2)
    SnapshotFolder(tmp_path, Config()).write(CHANGE, models(3))  # what was left is in nobody's way
    assert restored_batch_size(tmp_path) == 3


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_writer_that_fails_at_any_step_leaves_before_or_after_and_no_draft(tmp_path: Path, step: str) -> None:
    def fail(done: str) -> None:
        if done == step:
            raise OSError(28, "No space left on device")

    write_durably(tmp_path / "state", b"before", draft_prefix=".draft-")
    with pytest.raises(OSError, match="No space"):
        write_durably(tmp_path / "state", b"after", draft_prefix=".draft-", on_step=fail)
    assert (tmp_path / "state").read_bytes() == (b"after" if step in ("renamed", "folder synced") else b"before")
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: text.index("model_snapshot") + 40],
        lambda text: text[: text.index("model_snapshot")],
        lambda text: text.replace('"modelCount"\\: 1', '"modelCount"\\: 2'),
        lambda text: text.replace("marName", "marNane"),
        lambda text: text.replace('"models"', '"model"'),
        lambda text: text.replace("model_snapshot=", "model_snapshot=\\u12"),
        lambda text: "model_snapshot=" + "[" * 100_000,
    ],
)
def test_instead_of_a_damaged_snapshot_the_one_before_is_restored(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SnapshotFolder(tmp_path, Config())
    folder.write(CHANGE, models(4))
    folder.write(CHANGE, models(8))
    newest = tmp_path / snapshot_names(tmp_path)[-1]
    newest.write_text(damage(newest.read_text()))
    assert restored_batch_size(tmp_path) == 4
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(newest) in warning and "trying the one before" in warning


def test_what_is_no_file_is_passed_over_and_holds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SnapshotFolder(tmp_path, Config()).write(CHANGE, models(7))
    [whole] = snapshot_names(tmp_path)
    os.mkfifo(tmp_path / "99991231235959001-snapshot.cfg")
    (tmp_path / "99991231235959002-snapshot.cfg").mkdir()
    (tmp_path / "99991231235959003-snapshot.cfg").symlink_to("99991231235959003-snapshot.cfg")
    before = len(os.listdir("/proc/self/fd"))
    assert restored_batch_size(tmp_path) == 7
    assert len(os.listdir("/proc/self/fd")) == before
    assert caplog.text.count("cannot be used: it is not a regular file") == 2
    assert caplog.text.count("cannot be used: Too many levels of symbolic links") == 1
    for number in range(SNAPSHOT_COUNT_MAX):
        assert SnapshotFolder(tmp_path, Config()).write(CHANGE, models(number + 1)) == ""
    assert whole not in snapshot_names(tmp_path) and restored_batch_size(tmp_path) == SNAPSHOT_COUNT_MAX


def test_without_a_whole_snapshot_the_configuration_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "20260101000000000-startup.cfg").write_text("garbage")
    assert models_to_restore(Config(restore=True), tmp_path) is None
    assert models_to_restore(Config(), tmp_path) is None
    assert models_to_restore(Config(restore=True), tmp_path / "none") is None
    assert caplog.text.count("there is no snapshot in") == 2 and caplog.text.count("trying the one before") == 1
    written_by_hand = Config(model_snapshot={"models": models(3)}, restore=True)
    [model] = models_to_restore(written_by_hand, tmp_path) or []
    assert model.settings["batch_size"] == 3
    SnapshotFolder(tmp_path, Config()).write(CHANGE, models(6))
    [model] = models_to_restore(written_by_hand, tmp_path) or []  # what was changed since goes before it
    assert model.settings["batch_size"] == 6


@pytest.mark.parametrize(
    "settings, restored",
    [
        ({}, False),
        ({"compat": "strict"}, True),
        ({"compat": "strict", "origin": {"compat": "config.properties:3"}}, True),
        ({"compat": "strict", "origin": {"compat": "/etc/own.properties:3"}}, False),
        ({"compat": "strict", "no_config_snapshots": True}, False),
    ],
)
def test_strict_restores_unasked_unless_a_configuration_is_named(
    tmp_path: Path, settings: dict[str, Any], restored: bool
) -> None:
    SnapshotFolder(tmp_path, Config()).write(CHANGE, models())
    assert (models_to_restore(Config(**settings), tmp_path) is not None) == restored


@pytest.mark.slow
def test_ten_thousand_changes_leave_as_many_files_as_twenty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a change costs does not grow: it looks at no more files than are kept."""
    looked_at: list[int] = []
    list_ = os.listdir

    def listed(path: Any) -> list[str]:
        names = list_(path)
        looked_at.append(len(names))
        return names

    monkeypatch.setattr(snapshot.os, "fsync", lambda _: None)  # which is what takes time
    monkeypatch.setattr(snapshot.os, "listdir", listed)
    folder = SnapshotFolder(tmp_path, Config())
    for number in range(10_000):
        folder.write(CHANGE, models(number + 1))
    assert len(looked_at) == 10_000 and max(looked_at) == SNAPSHOT_COUNT_MAX
    assert len(list_(tmp_path)) == SNAPSHOT_COUNT_MAX
    assert restored_batch_size(tmp_path) == 10_000


def test_a_folder_that_cannot_be_written_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "logs").write_text("a file")
    folder = SnapshotFolder(tmp_path / "logs" / "config", Config())
    for _ in range(3):
        folder.write(CHANGE, models())
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text and "Not a directory" in caplog.text
    (tmp_path / "logs").unlink()
    folder.write(CHANGE, models())
    folder.write(CHANGE, models())
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
    assert len(snapshot_names(tmp_path / "logs" / "config")) == 2


# --- off the loop, in order -------------------------------------------------------------------------------------------


class Kept:
    """A keeper of a number, and what it wrote."""

    def __init__(self, folder: Path):
        self.number = 0
        self.path = folder / "state"
        self.snapshots = SnapshotFolder(folder / "config", Config())
        self.fails = False
        self.keeper = StateKeeper(self.keep, self.snapshots, lambda: ({"n": self.number}, models(self.number)))

    def keep(self, content: bytes) -> str:
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.path.write_bytes(content)
        return ""

    async def change(self) -> None:
        """Once this returns, what is written is at least as new as the change."""
        self.number += 1
        mine = self.number
        await self.keeper.save()
        assert json.loads(self.path.read_text())["n"] >= mine
        assert (restored_batch_size(self.snapshots.path) or 0) >= mine


def test_changes_at_once_share_a_write_and_none_is_answered_before_it(tmp_path: Path) -> None:
    async def test() -> None:
        kept = Kept(tmp_path)
        await asyncio.gather(*(kept.change() for _ in range(200)))
        assert json.loads(kept.path.read_text()) == {"n": 200}
        assert len(snapshot_names(tmp_path / "config")) <= 3

    asyncio.run(test())


def test_whoever_gives_up_waiting_stops_no_write(tmp_path: Path) -> None:
    async def test() -> None:
        kept = Kept(tmp_path)
        given_up = [asyncio.ensure_future(kept.change()) for _ in range(5)]
        await asyncio.sleep(0)
        for each in given_up:
            each.cancel()
        await asyncio.gather(kept.change(), *given_up, return_exceptions=True)
        assert json.loads(kept.path.read_text()) == {"n": 6}

    asyncio.run(test())


def test_what_cannot_be_written_is_said_until_it_can_be(tmp_path: Path) -> None:
    async def test() -> None:
        kept = Kept(tmp_path)
        await kept.change()
        shutil.rmtree(kept.snapshots.path)
        kept.snapshots.path.write_text("a file in its place")
        kept.fails = True
        kept.number = 2
        await kept.keeper.save()
        assert kept.keeper.problem == (
            "What is served could not be kept for a restart after a crash: the disk is full (ENOSPC: No space left on "
            "device). No snapshot could be written to the log folder, so that --restore will not know of it: "
            f"{cause_of(FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))}."
        )
        kept.fails = False
        kept.snapshots.path.unlink()
        await kept.change()
        assert kept.keeper.problem == ""

    asyncio.run(test())


def test_an_error_of_ours_while_it_is_written_is_raised(tmp_path: Path) -> None:
    async def test() -> None:
        keeper = StateKeeper(lambda _: "", None, lambda: ({"n": object()}, {}))
        with pytest.raises(TypeError):
            await keeper.save()

    asyncio.run(test())


# --- servers ----------------------------------------------------------------------------------------------------------


def kill_everything(server: Server) -> None:
    """SIGKILL to the supervisor; returns when the server is gone too."""
    process = server.process
    os.kill(server.running.pid, signal.SIGKILL)
    process.wait(60)


def ask_status(server: Server, method: str, path: str) -> int:
    return server.ask(method, path, port="management").status


def served(server: Server) -> list[dict[str, Any]]:
    shown = (
        "modelName", "modelVersion", "modelUrl", "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay",
        "responseTimeout", "clientTimeoutInMills", "minBatch",
    )  # fmt: skip
    names = [model["modelName"] for model in server.manage("GET", "/models")["models"]]
    found = []
    for name in names:
        default = server.describe(name)["modelVersion"]
        for version in server.manage("GET", f"/models/{name}/all"):
            row = {key: version[key] for key in shown}
            found.append({**row, "workers": len(version["workers"]), "default": default == version["modelVersion"]})
    return sorted(found, key=lambda row: (row["modelName"], row["modelVersion"]))


@pytest.mark.server
def test_what_was_answered_survives_sigkill_of_everything(server: Server, session_store: Path) -> None:
    for name in ("linear.mar", "linear-2.mar", "burn.mar"):
        shutil.copy(session_store / name, server.store)
    server.start("--models", "linear.mar", "burn.mar")
    config = server.folder / "logs/config"
    assert [name.partition("-")[2] for name in snapshot_names(config)] == ["startup.cfg"]
    server.manage("POST", "/models?url=linear-2.mar&initial_workers=1")
    server.manage("PUT", "/models/linear/2.0/set-default")
    server.manage("POST", "/models?url=burn.mar&model_name=other&initial_workers=0&batch_size=4&max_batch_delay=7")
    server.manage("PUT", "/models/linear/1.0?batch_size=3&min_batch=2&response_timeout=50&job_queue_size=77")
    server.manage("PUT", "/models/linear/1.0?min_worker=3&synchronous=true")
    server.manage("PUT", "/models/linear/1.0?min_worker=2&max_worker=3&synchronous=true")
    server.manage("DELETE", "/models/burn")
    before = served(server)
    kill_everything(server)

    started = server.start("--restore", "--models", "burn.mar")
    assert [line.split()[:2] for line in started.stdout.splitlines() if line.startswith(("burn", "linear", "other"))]
    assert served(server) == before
    with torch.inference_mode():
        expected = Linear(2)(torch.tensor([ITEM]))[0].tolist()
    assert server.predict("linear", ITEM).json == pytest.approx(expected, abs=1e-5)
    # A server that comes back within the same start has the same, too.
    server.kill_server_process()
    assert served(server) == before

    assert server.run("stop").returncode == 0
    names = snapshot_names(config)
    assert names[-1].endswith("-shutdown.cfg")
    (config / names[-1]).write_text("model_snapshot={")  # damaged: the one before it has the same
    server.start("--restore")
    assert served(server) == before
    assert f"the snapshot {Path('logs/config', names[-1])}" in server.log().replace(f"{server.folder}/", "")
    assert server.run("stop").returncode == 0

    server.start()  # nothing is restored unasked
    assert served(server) == []


@pytest.mark.server
def test_a_model_snapshot_in_the_configuration_is_served_and_a_missing_archive_is_reported(
    server: Server, session_store: Path
) -> None:
    """As KServe's config.properties has it."""
    shutil.copy(session_store / "linear.mar", server.store)
    entry = {**ENTRY, "marName": "linear.mar", "maxBatchDelay": 10, "responseTimeout": 120}
    named = {
        "linear": {"1.0": entry},
        "alias": {"9.9": {**entry, "batchSize": 4, "minWorkers": 2}},  # the archive says 1.0
        "gone": {"1.0": {**entry, "marName": "gone.mar"}},
        "odd": {"1.0": {key: value for key, value in entry.items() if key != "batchSize"}},
    }
    path = server.folder / "config.properties"
    path.write_text(
        "load_models=all\nmodel_snapshot="
        + json.dumps({"name": "startup.cfg", "modelCount": 1, "models": named}).replace("{", "{\\\n")
    )
    started = server.start("--ts-config", str(path))
    assert "load_models is ignored" in started.stderr
    rows = served(server)
    assert [(row["modelName"], row["batchSize"], row["workers"], row["maxWorkers"]) for row in rows] == [
        ("alias", 4, 2, 5), ("linear", 2, 1, 5),
    ]  # fmt: skip
    assert server.predict("linear", ITEM).status == server.predict("alias", ITEM).status == 200
    ready = server.ask("GET", "/ready")
    assert ready.status == 503 and sorted(ready.json["models"]) == ["gone", "odd"]
    assert "gone.mar" in ready.json["models"]["gone"]["error"]
    assert ready.json["models"]["odd"]["error"] == "model_snapshot: odd 1.0: batchSize is missing"

    assert server.manage("DELETE", "/models/odd")["status"] == 'Model "odd" unregistered'
    assert list(server.ask("GET", "/ready").json["models"]) == ["gone"]

    assert ask_status(server, "DELETE", "/models/odd") == 404

    # What could not be restored is not forgotten: once its file is there, it is served.
    kill_everything(server)
    shutil.copy(session_store / "linear.mar", server.store / "gone.mar")
    server.start("--restore")
    assert [row["modelName"] for row in served(server)] == ["alias", "gone", "linear"]
    assert server.ask("GET", "/ready").status == 200

    # Unless somebody says so.
    kill_everything(server)
    (server.store / "gone.mar").unlink()
    server.start("--restore")
    assert list(server.ask("GET", "/ready").json["models"]) == ["gone"]
    server.manage("DELETE", "/models/gone")
    assert server.ask("GET", "/ready").status == 200
    kill_everything(server)
    server.start("--restore")
    assert server.ask("GET", "/ready").status == 200


@pytest.mark.server
def test_a_model_snapshot_of_another_shape_ends_the_start(server: Server) -> None:
    path = server.folder / "config.properties"
    path.write_text('model_snapshot={"models": []}\n')
    started = server.run("start", "--ts-config", str(path))
    assert started.returncode == 1
    assert f'pyserve: error: {path}:1: model_snapshot: it has no "models"' in started.stderr
    assert pid_file.read(server.pid_path) is None


@pytest.mark.server
def test_without_a_place_for_snapshots_everything_else_works(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    (server.folder / "file").write_text("")
    server.environment["LOG_LOCATION"] = str(server.folder / "file")
    with server.foreground("--models", "linear.mar"):
        for size in (2, 3, 4):
            server.manage("PUT", f"/models/linear?batch_size={size}")
        assert server.predict("linear", ITEM).status == 200
        assert (server.folder / "foreground.log").read_text().count("snapshots cannot be written") == 1


@pytest.mark.server
def test_snapshots_can_be_turned_off_and_stay_bounded_when_on(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    server.start("--models", "linear.mar", "--ncs")
    server.manage("PUT", "/models/linear?batch_size=2")
    assert not (server.folder / "logs/config").exists()
    assert server.run("stop").returncode == 0

    server.start("--models", "linear.mar")
    config = server.folder / "logs/config"

    def change(first: int) -> int:
        with server.client("management") as client:
            for size in range(first, first + 100):
                assert client.ask("PUT", f"/models/linear?batch_size={size}").status in (200, 202)
                assert len(list(config.iterdir())) <= SNAPSHOT_COUNT_MAX + 2  # one more, and a draft
        return first

    at_once([lambda: change(1), lambda: change(1000), lambda: change(2000)])
    size = server.describe("linear")["batchSize"]
    assert size in (100, 1099, 2099)
    kill_everything(server)
    server.start("--restore")
    assert server.describe("linear")["batchSize"] == size
