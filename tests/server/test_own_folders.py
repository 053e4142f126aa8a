"""Every registration has a folder of its own: what handlers do to their files is nobody else's, and ends with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import dry_runs
from tests.support.handler_archives import write_handler
from tests.support.serving import Server

# Renames one file while it loads, as handlers do that unpack others; told to, it changes and shows its files.
HANDLER = """
import json, os, time

class Handler:
    def initialize(self, context):
        self.folder = context.system_properties["model_dir"]
        path = os.path.join(self.folder, "weights.part")
        if os.path.exists(path) or not os.path.exists("weights.bin"):
            os.replace(path, os.path.join(self.folder, "weights.bin"))
        with open("starts", "a") as file:
            file.write(".")

    def handle(self, data, context):
        body = (data[0].get("body") or b"").decode()
        if body == "die":
            os._exit(1)
        if body:
            with open(os.path.join(self.folder, "labels.txt"), "w") as file:
                file.write(body)
        starts = os.path.getsize("starts")
        told = {"folder": os.path.realpath("."), "labels": open("labels.txt").read(), "starts": starts}
        return [told] * len(data)
"""
# Loads its weights, and writes others over them.
OVERWRITER = """
import os, torch

class Handler:
    def initialize(self, context):
        self.path = os.path.join(context.system_properties["model_dir"], "weights.pth")
        self.state = torch.load(self.path)
        with open("/proc/self/maps") as file:
            self.mapped = sorted({line.split(None, 5)[5].strip() for line in file if "weights.pth" in line})

    def handle(self, data, context):
        if data[0].get("body"):
            torch.save({"weight": torch.zeros(3)}, self.path)
        return [{"sum": self.state["weight"].sum().item(), "mapped": self.mapped,
                 "file": torch.load(self.path)["weight"].sum().item()}] * len(data)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """With a cache of its own, and an archive ``m``; not started yet."""
    made = Server(tmp_path)
    write_handler(made.store, "m", HANDLER, files={"weights.part": "abc", "labels.txt": "cat"})
    try:
        yield made
    finally:
        made.kill()


def register(server: Server, name: str, url: str = "m.mar", workers: int = 1) -> None:
    server.manage("POST", f"/models?url={url}&model_name={name}&initial_workers={workers}&synchronous=true")


def told(server: Server, name: str, body: bytes = b"") -> dict[str, object]:
    answer = server.ask("POST", f"/predictions/{name}", body)
    assert answer.status == 200, answer.body
    shown: dict[str, object] = answer.json
    return shown


def folders(server: Server) -> list[str]:
    return sorted(path.name for path in (server.folder / "cache" / "models").iterdir() if path.is_dir())


def test_models_of_one_archive_and_commands_beside_them_do_not_meet(server: Server) -> None:
    server.start()
    register(server, "a")
    register(server, "b")
    for command in ("doctor", "check", "debug"):
        inputs = [] if command == "doctor" else ["--json-body", '""']
        ran = dry_runs.run(server.folder, command, server.store / "m.mar", *inputs)
        assert "weights.part" not in ran.stdout + ran.stderr, ran.stdout + ran.stderr
    first, second = told(server, "a", b"dog"), told(server, "b")
    assert (first["labels"], second["labels"]) == ("dog", "cat")
    assert first["folder"] != second["folder"]
    assert len(folders(server)) == 2


def test_edits_last_as_long_as_the_registration(server: Server) -> None:
    server.start()
    register(server, "a", workers=2)
    before = told(server, "a", b"dog")
    server.manage("PUT", "/models/a?min_worker=3&synchronous=true")
    assert told(server, "a") == {**before, "starts": 3}
    assert server.ask("POST", "/predictions/a", b"die").status == 500
    server.wait_for(lambda: told(server, "a")["starts"] == 4, "another worker")
    assert told(server, "a")["labels"] == "dog"
    server.manage("PUT", "/models/a?min_worker=0&max_worker=0&synchronous=true")
    server.manage("PUT", "/models/a?min_worker=1&max_worker=1&synchronous=true")
    assert told(server, "a") == {**before, "starts": 5}
    server.manage("DELETE", "/models/a")
    assert folders(server) == []
    register(server, "a")
    after = told(server, "a")
    assert (after["labels"], after["starts"]) == ("cat", 1)
    assert after["folder"] != before["folder"]


def test_a_registration_that_fails_leaves_no_folder(server: Server) -> None:
    write_handler(server.store, "bad", "class Handler:\n    def initialize(self, context):\n        raise ValueError\n")
    server.start()
    answer = server.ask("POST", "/models?url=bad.mar&initial_workers=1&synchronous=true", port="management")
    assert answer.status >= 400
    assert folders(server) == []


@pytest.mark.slow
def test_folders_end_with_their_server_however_it_ends(server: Server) -> None:
    server.start()
    register(server, "a")
    first = told(server, "a", b"dog")
    server.kill_server_process()
    second = told(server, "a")
    assert (second["labels"], second["starts"]) == ("cat", 1)
    assert folders(server) == [Path(str(second["folder"])).name]
    assert second["folder"] != first["folder"]
    os.kill(server.process.pid, signal.SIGSTOP)  # so that it does not clear up when its supervisor is gone
    child = server.process.pid
    server.kill()
    os.kill(child, signal.SIGKILL)
    assert len(folders(server)) == 1
    server.start("--models", "again=m.mar")
    third = told(server, "again")
    assert folders(server) == [Path(str(third["folder"])).name]
    assert server.run("stop").returncode == 0
    assert folders(server) == []


@pytest.mark.slow
def test_weights_are_mapped_once_and_stay_when_a_handler_writes_over_its_own(server: Server) -> None:
    state = {"weight": torch.full((1000, 1000), 0.5)}
    model_file = "import torch\n\nclass Network(torch.nn.Module):\n    pass\n"
    write_handler(server.store, "w", OVERWRITER, model_file=model_file, state=state)
    server.start()
    register(server, "a", "w.mar", workers=2)
    register(server, "b", "w.mar")
    first = told(server, "b")
    (mapped,) = first["mapped"]  # type: ignore[misc]
    assert f"{server.folder}/cache/archives/" in mapped
    assert told(server, "a")["mapped"] == [mapped]
    assert told(server, "b", b"write") == {"sum": 500_000.0, "mapped": [mapped], "file": 0.0}
    assert told(server, "a") == {"sum": 500_000.0, "mapped": [mapped], "file": 500_000.0}
    register(server, "c", "w.mar")
    assert told(server, "c") == {"sum": 500_000.0, "mapped": [mapped], "file": 500_000.0}


def test_an_unpacked_folder_is_worked_in_itself(server: Server) -> None:
    folder = server.store / "unpacked"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"modelName": "f", "handler": "h.py"}}')
    (folder / "h.py").write_text(HANDLER)
    (folder / "weights.part").write_text("abc")
    (folder / "labels.txt").write_text("cat")
    server.start()
    register(server, "f", "unpacked")
    assert told(server, "f", b"dog")["folder"] == str(folder.resolve())
    assert (folder / "labels.txt").read_text() == "dog"
    register(server, "g", "unpacked")
    assert told(server, "g")["labels"] == "dog"
    server.manage("DELETE", "/models/f")
    assert (folder / "weights.bin").read_text() == "abc"
