"""A version in the place of another: under load without a wrong answer, and as it was when the new one is no good."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from handler_archives import write_handler
from serving import LIMIT_S, NAMES, RAW, Load, Server, at_once
from serving_models import LINEAR_INPUT, Linear, write_linear, write_torchscript

ITEM = torch.tensor([0.5, -1, 2, 0.25])
FAILS = """
class Handler:
    def initialize(self, context):
        raise RuntimeError("it cannot be warmed")

    def handle(self, data, context):
        return data
"""
REFUSES = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        raise ValueError("not this one")
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives that are not in any model store; read only."""
    folder = tmp_path_factory.mktemp("outside")
    write_linear(folder, version="1.0", seed=1, file="linear-1")
    write_linear(folder, version="2.0", seed=1, file="linear-2")  # the same answers, so that a load can check each
    write_linear(folder, version="3.0", seed=3, file="linear-3")
    write_handler(folder, "linear", FAILS, version="4.0", file="linear-4")
    write_handler(folder, "linear", REFUSES, version="5.0", file="linear-5")
    write_torchscript(folder, Linear(9), "fresh", config={"input": LINEAR_INPUT})
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, outside: Path) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("deploy"))
    shutil.copy(outside / "linear-1.mar", server.store)
    server.start("--models", "linear-1.mar")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The one server, with linear 1.0 and nothing else in its store."""
    yield running
    if not any(version == "1.0" for version in versions(running)):
        running.manage("POST", "/models?url=linear-1.mar&initial_workers=1")
    running.manage("PUT", "/models/linear/1.0/set-default")
    for version in versions(running):
        if version != "1.0":
            running.manage("DELETE", f"/models/linear/{version}")
    if running.ask("GET", "/models/fresh", port="management").status == 200:
        running.manage("DELETE", "/models/fresh")
    for path in running.store.iterdir():
        if path.name != "linear-1.mar":
            path.unlink()


def versions(server: Server, name: str = "linear") -> list[str]:
    return [row["modelVersion"] for row in server.manage("GET", f"/models/{name}/all")]


def deploy(server: Server, *arguments: str | Path) -> list[str]:
    """The lines of a deployment that succeeds."""
    done = server.run("deploy", *map(str, arguments))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def refused(server: Server, *arguments: str | Path) -> tuple[str, str]:
    """Output and error, which is one line, of one that fails."""
    done = server.run("deploy", *map(str, arguments))
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("pyserve: error: ") and done.stderr.count("\n") == 1
    return done.stdout, done.stderr


def predict(server: Server, version: str = "") -> torch.Tensor:
    answer = server.ask("POST", f"/predictions/linear/{version}", ITEM.numpy().tobytes(), RAW)
    assert answer.status == 200, answer.body
    return torch.frombuffer(bytearray(answer.body), dtype=torch.float32)


def test_versions_are_replaced_under_load_without_a_wrong_answer(server: Server, outside: Path) -> None:
    server.manage("PUT", "/models/linear?min_worker=2&synchronous=true")
    with Load(server, "linear", Linear(1), [4]) as load:
        load.wait_for_more(50)
        lines = deploy(server, outside / "linear-2.mar")
        load.wait_for_more(50)
        assert lines == [
            f"linear 2.0: copied to {server.store}/linear-2.mar",
            "linear 2.0: loaded and warm, 2 workers",
            "linear: default version 1.0 -> 2.0",
            "linear 1.0: drained and removed",
        ]
        assert versions(server) == ["2.0"]
        for round_ in range(3):  # and back, and forth, by hand
            old, new = ("2.0", "1.0") if round_ % 2 == 0 else ("1.0", "2.0")
            server.manage("POST", f"/models?url=linear-{new[0]}.mar&initial_workers=1")
            server.manage("PUT", f"/models/linear/{new}/set-default")
            load.wait_for_more(20)
            server.manage("DELETE", f"/models/linear/{old}")
            load.wait_for_more(20)
    assert load.wrong == []


def test_a_sample_is_tried_and_the_old_version_can_be_kept(server: Server, outside: Path, tmp_path: Path) -> None:
    sample = tmp_path / "item.json"
    sample.write_text("[0.5, -1, 2, 0.25]")
    lines = deploy(server, outside / "linear-3.mar", "--sample", sample, "--keep-old", "--workers", "1")
    assert lines[2].startswith("linear 3.0: answers the sample (")
    back = lines[-1].partition("back to it: ")[2]
    assert lines[-1].startswith("linear 1.0: kept; ") and back.startswith("curl -X PUT http://127.0.0.1:")
    assert sorted(versions(server)) == ["1.0", "3.0"]
    with torch.inference_mode():
        assert torch.allclose(predict(server), Linear(3)(ITEM.unsqueeze(0))[0], atol=1e-5)
        subprocess.run([*back.split(), "-fsS", "-o", str(tmp_path / "answer")], check=True)
        assert torch.allclose(predict(server), Linear(1)(ITEM.unsqueeze(0))[0], atol=1e-5)


def test_a_first_version_and_an_archive_that_lies_in_the_store_already(server: Server, outside: Path) -> None:
    shutil.copy(outside / "fresh.mar", server.store)
    assert deploy(server, server.store / "fresh.mar") == [
        "fresh 1.0: loaded and warm, 1 worker", "fresh 1.0: is the first version that is served",
    ]  # fmt: skip
    assert deploy(server, "linear-1.mar", "--name", "other", "--workers", "2") == [
        "other 1.0: loaded and warm, 2 workers", "other 1.0: is the first version that is served",
    ]  # fmt: skip
    server.manage("DELETE", "/models/other")


def test_another_file_of_that_name_in_the_store_is_left_alone(server: Server, outside: Path, tmp_path: Path) -> None:
    copy = tmp_path / "linear-1.mar"
    shutil.copy(outside / "linear-2.mar", copy)
    before = (server.store / "linear-1.mar").read_bytes()
    assert deploy(server, copy, "--keep-old")[0] == f"linear 2.0: copied to {server.store}/linear-1-2.0.mar"
    assert (server.store / "linear-1.mar").read_bytes() == before
    server.manage("PUT", "/models/linear/1.0/set-default")
    server.manage("DELETE", "/models/linear/2.0")
    assert "copied" not in deploy(server, copy, "--keep-old")[0]  # the same file is there by now


@pytest.mark.parametrize(
    "archive, arguments, reason",
    [
        ("linear-4.mar", [], "linear 4.0 was not loaded: 500 Failed to start workers for model linear"),
        ("linear-5.mar", ["--sample"], "linear 5.0 answers the sample with 503 Prediction failed (ValueError: not"),
        ("linear-1.mar", [], "linear 1.0 is served already; pack the new one with another --version"),
    ],
)
def test_a_version_that_is_no_good_leaves_everything_as_it_was(
    server: Server, outside: Path, archive: str, arguments: list[str], reason: str
) -> None:
    before, files = server.manage("GET", "/models/linear/all"), sorted(os.listdir(server.store))
    sample = [str(outside / "linear-1.mar")] if arguments else []
    with Load(server, "linear", Linear(1), [4], clients=2) as load:
        load.wait_for_more(10)
        output, error = refused(server, outside / archive, *arguments, *sample)
        load.wait_for_more(10)
    assert load.wrong == []
    assert reason in error
    assert ("nothing is changed: linear 1.0 is served as before" in output) == ("already" not in reason)
    after = server.manage("GET", "/models/linear/all")
    kept = ("modelVersion", "minWorkers", "maxWorkers", "batchSize", "state")
    assert [{key: row[key] for key in kept} for row in after] == [{key: row[key] for key in kept} for row in before]
    assert [[worker["id"] for worker in row["workers"]] for row in after] == [
        [worker["id"] for worker in row["workers"]] for row in before
    ]
    assert sorted(os.listdir(server.store)) == files


def test_of_two_deployments_at_once_one_wins(server: Server, outside: Path) -> None:
    runs: list[Any] = at_once([lambda: server.run("deploy", str(outside / "linear-2.mar"))] * 2)
    codes = sorted(run.returncode for run in runs)
    assert codes == [0, 1], [run.stdout + run.stderr for run in runs]
    assert versions(server) == ["2.0"] and len(predict(server)) == 3
    assert (server.store / "linear-2.mar").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["nowhere.mar"], "nowhere.mar is not a file here; give --name NAME"),
        (["nowhere.mar", "--name", "linear"], "404 Model not found at: nowhere.mar"),
        (["STORE/linear-1.mar", "--workers", "0"], "--workers must be 1 or more, not 0"),
        (["STORE/linear-1.mar", "--timeout", "0"], "--timeout must be more than 0 s"),
        (["STORE/linear-1.mar", "--sample", "none.json"], "--sample none.json cannot be read: No such file"),
        (["STORE/linear-1.mar", "--management", "127.0.0.1:1"], "--management 127.0.0.1:1: allowed are http"),
        (["STORE/linear-1.mar", "--management", "http://127.0.0.1:1"], ":1 does not answer: Connection refused"),
        (["STORE/linear-1.mar", "--name", "a b"], "a b"),
        (["STORE/linear-1.mar", "--model-store", "none"], "--model-store directory not found: none"),
        (["STORE"], "MANIFEST"),
    ],
)
def test_what_cannot_be_deployed_is_named(server: Server, arguments: list[str], reason: str) -> None:
    _, error = refused(server, *(each.replace("STORE", str(server.store)) for each in arguments))
    assert reason in error


def test_a_store_that_cannot_be_written_is_named(server: Server, outside: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    url = server.url("management")
    _, error = refused(server, outside / "linear-2.mar", "--management", url)
    assert "Model not found at: linear-2.mar" in error
    assert "put it there, or name that folder with --model-store" in error
    _, error = refused(server, outside / "linear-2.mar", "--management", url, "--model-store", "/proc")
    assert "linear-2.mar cannot be copied into the model store /proc: " in error
    lines = deploy(server, outside / "linear-2.mar", "--management", url, "--model-store", server.store)
    assert lines[-1] == "linear 1.0: drained and removed"


def test_without_a_server_it_says_so(tmp_path: Path, outside: Path) -> None:
    _, error = refused(Server(tmp_path), outside / "linear-2.mar")
    assert "pyserve is not currently running; start it, or name a server with --management" in error


STALLS = """
import os
import time

class Handler:
    def initialize(self, context):
        open({seen!r}, "w").close()
        time.sleep(600)

    def handle(self, data, context):
        return data
"""


def test_ctrl_c_undoes_what_was_begun(server: Server, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    write_handler(tmp_path, "linear", STALLS.format(seen=str(seen)), version="6.0", file="linear-6")
    with subprocess.Popen(
        server.arguments("deploy", str(tmp_path / "linear-6.mar")), env=server.environment, cwd=server.folder,
        stdout=subprocess.PIPE, text=True,
    ) as popen:  # fmt: skip
        server.wait_for(seen.exists, "the worker to be loading")
        popen.send_signal(signal.SIGINT)
        output = popen.communicate(timeout=LIMIT_S)[0]
        assert popen.returncode == 130
    assert output.splitlines()[-1] == "nothing is changed: linear 1.0 is served as before"
    assert versions(server) == ["1.0"] and sorted(os.listdir(server.store)) == ["linear-1.mar"]


def test_keys_and_certificates_are_minded(tmp_path: Path, outside: Path) -> None:
    server = Server(tmp_path)
    shutil.copy(outside / "linear-1.mar", server.store)
    (tmp_path / "config.properties").write_text("disable_token_authorization=false\n")
    https = [part for name in NAMES for part in (f"--{name}-address", "https://127.0.0.1:0")]
    server.start("--models", "linear-1.mar", "--ts-config", str(tmp_path / "config.properties"), *https)
    try:
        sample = tmp_path / "item.json"
        sample.write_text("[0.5, -1, 2, 0.25]")
        lines = deploy(server, outside / "linear-2.mar", "--sample", sample)  # all from the pid file
        assert lines[-1] == "linear 1.0: drained and removed" and "answers the sample" in lines[2]

        url = server.running.addresses["management"]
        again = [outside / "linear-3.mar", "--management", url, "--model-store", server.store]
        assert "certificate" in refused(server, *again)[1].lower()
        assert "401" in refused(server, *again, "-k")[1]
        assert "401" in refused(server, *again, "-k", "--token", "wrong")[1]
        key = json.loads(Path(server.running.key_file).read_text())["management"]["key"]
        server.environment["PYSERVE_TOKEN"] = key
        assert deploy(server, *again, "-k")[-1] == "linear 2.0: drained and removed"
    finally:
        server.kill()
