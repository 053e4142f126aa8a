"""What commands do on a cluster, as far as it is no matter what kind that is: another process stands for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pyserve.commands import cli, cluster
from pyserve.server import pid_file
from tests.support.handler_archives import write_handler

# Tells each order to a file, and answers with what lies beside it.
STAND_IN = """
import json, os, sys
from pathlib import Path
folder = Path(sys.argv[1])
order = json.loads(sys.stdin.readline())
(folder / "order.json").write_text(json.dumps(order))
out = os.fdopen(int(sys.argv[2]), "w")
print("noise of a library")
print("E1130 the cluster is gone", file=sys.stderr)
out.write((folder / "answers.jsonl").read_text())
"""
DEPLOYED = {"event": "done", "name": "m", "version": "2", "old": "1", "generation": 7, "committed": 0.012, "silent": {},
            "replicas": 3, "nodes": 2}  # fmt: skip
RUNNING = {
    "event": "done", "running": True, "status": "RUNNING", "message": "", "generation": 3,
    "deployments": {"pyserve": {"status": "HEALTHY", "message": "", "replicas": {"RUNNING": 2}}},
    "models": [{"model": "m", "version": "1", "default": True, "file": "m.mar", "durable": False}],
    "replicas": [{"id": "x1", "node": "10.0.0.1", "generation": 3, "heard": 0.1}],
}  # fmt: skip


class Cluster:
    """What stands for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pid_path = folder / "pyserve.pid"

    def answer(self, *events: dict[str, object]) -> None:
        (self.folder / "answers.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))

    @property
    def order(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / "order.json").read_text())
        return found

    def run(self, *arguments: str) -> int:
        return cli.main([*arguments, "--pid-file", str(self.pid_path)])


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(cluster, "COMMAND", [sys.executable, "-c", STAND_IN, str(tmp_path)])
    return Cluster(tmp_path)


def test_commands_mean_the_cluster_that_was_started_while_no_server_runs(
    there: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert there.run("status") == 3 and capsys.readouterr().out == "pyserve is not currently running.\n"
    path = write_handler(there.folder, "m", "def handle(data, context):\n    return data\n")
    there.answer(
        {"event": "progress", "text": "1 of 2 replicas are ready"}, {**RUNNING, "address": "http://127.0.0.1:8080"}
    )
    started = ["start", "--cluster", "10.0.0.1:6379", "--models", str(path), "--replicas", "2..4", "--num-cpus", "3"]
    assert there.run(*started) == 0
    assert there.order["models"] == [{"path": str(path), "name": None}]
    assert there.order["args"] == {"models": ["-"], "replicas": "2..4", "num_cpus": 3}
    said = capsys.readouterr()
    assert "pyserve is running on the cluster at 10.0.0.1:6379 (generation 3)" in said.out
    assert (
        "inference   http://127.0.0.1:8080" in said.out and "m.mar" in said.out and "noise" not in said.out + said.err
    )

    there.answer(RUNNING)
    assert there.run("status") == 0 and there.order["address"] == "10.0.0.1:6379"
    assert "http://127.0.0.1:8080" in capsys.readouterr().out
    there.answer(DEPLOYED)
    assert there.run("deploy", str(path)) == 0
    assert capsys.readouterr().out == (
        "m: default version 1 -> 2\ngeneration 7 is served by 3 replicas on 2 nodes, switched in 12 ms\n"
    )
    monkeypatch.setattr(pid_file, "read", lambda path: pid_file.RunningServer(1, 1))
    assert cluster.chosen_cluster(cli._parser_of("status").parse_args([]), there.pid_path) == ""
    monkeypatch.undo()
    monkeypatch.setattr(cluster, "COMMAND", [sys.executable, "-c", STAND_IN, str(there.folder)])
    there.answer({"event": "done", "running": True})
    assert there.run("stop", "--timeout", "7") == 0 and there.order["timeout_s"] == 7
    assert there.run("status") == 3


def test_what_each_replica_is_given_is_passed_on(there: Cluster) -> None:
    path = write_handler(there.folder, "m", "def handle(data, context):\n    return data\n")
    there.answer({**RUNNING, "address": "http://127.0.0.1:8080"})
    flags = ["--num-gpus", "0.5", "--resource", "fast=1", "--resource", "near = 0.25", "--replicas-per-node", "2",
             "--direct-port", "8090", "--target-wait-ms", "20", "--timeout", "9"]  # fmt: skip
    assert there.run("start", str(path), "--cluster", "auto", *flags) == 0
    assert there.order["args"] == {
        "models": ["-"], "num_gpus": 0.5, "resources": {"fast": 1.0, "near": 0.25}, "replicas_per_node": 2,
        "direct_port": 8090, "target_wait_ms": 20.0,
    }  # fmt: skip
    assert there.order["timeout_s"] == 9


def test_what_failed_is_told_with_each_nodes_reason(there: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    there.answer(
        {"event": "say", "text": "m 2: brought to the cluster (3 MB)"},
        {"event": "failed", "reason": "m 2 is served nowhere", "lines": ["one: no room", "two: it is broken"]},
    )
    assert there.run("deploy", "m.mar", "--cluster", "auto") == 1
    said = capsys.readouterr()
    assert said.out == "m 2: brought to the cluster (3 MB)\n"
    assert said.err == "one: no room\ntwo: it is broken\npyserve: error: m 2 is served nowhere\n"


def test_a_cluster_that_goes_away_is_told(there: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    there.answer({"event": "say", "text": "begun"})
    assert there.run("stop", "--cluster", "auto") == 1
    said = capsys.readouterr().err
    assert "the cluster at auto went away meanwhile (E1130 the cluster is gone)" in said
    assert "`pyserve status --cluster auto` says what is served" in said and len(said.splitlines()) == 1


def test_one_that_cannot_be_heard_of_is_named(there: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    there.answer({**DEPLOYED, "silent": {"one": "no answer within 20 s"}})
    assert there.run("deploy", "m.mar", "--cluster", "auto") == 0
    assert capsys.readouterr().err == "pyserve: warning: one has not confirmed it yet: no answer within 20 s\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["start", "m.pt", "--replicas", "3"], "--replicas is for --cluster"),
        (["start", "m.pt", "--resource", "fast=1"], "--resource is for --cluster"),
        (["start", "m.pt", "--timeout", "9"], "--timeout is for --cluster"),
        (["start", "m.mar", "--cluster", "auto", "--resource", "fast"], "write NAME=AMOUNT"),
        (["start", "m.mar", "--cluster", "auto", "--resource", "=1"], "write NAME=AMOUNT"),
        (["start", "m.mar", "--cluster", "auto", "--foreground"], "--foreground does not go with --cluster"),
        (["start", "m.mar", "--cluster", "auto", "--inference-address", "unix:/x"], "cannot be had from Ray Serve"),
        (["deploy", "m.mar", "--cluster", "auto", "--workers", "0"], "--workers must be 1 or more"),
        (["deploy", "m.mar", "--cluster", "auto", "--sample", "none"], "--sample none cannot be read"),
    ],
)
def test_what_cannot_be_is_told_before_anything_begins(
    there: Cluster, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(there.folder)
    write_handler(there.folder, "m", "def handle(data, context):\n    return data\n")
    (there.folder / "m.pt").write_bytes(b"x")
    assert there.run(*arguments) in (1, 2)
    assert text in capsys.readouterr().err
    assert not (there.folder / "order.json").exists()
