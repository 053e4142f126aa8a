"""`predict`, `logs`, `init`, `completion` and `status --json`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.commands import cli
from pyserve.commands.logs import _following, _Wanted
from tests.support.serving import Server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the folder that `pyserve init` makes."""
    server = Server(tmp_path_factory.mktemp("served"))
    made = subprocess.run([sys.executable, "-m", "pyserve", "init", "sums"], cwd=server.folder, env=server.environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "pyserve dev sums" in made.stdout
    server.start("sums", "--metrics-address", "http://127.0.0.1:0")
    yield server
    server.run("stop")
    server.kill()


@pytest.mark.server
def test_predict_prints_the_answer_as_it_came(server: Server) -> None:
    done = server.run("predict", "sums", "-i", "sums/sample_input.json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sum": 12.0})
    piped = subprocess.run(server.arguments("predict", "sums/1.0", "-i", "-"), cwd=server.folder, input="[4, 5]",
                           env=server.environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert json.loads(piped.stdout) == {"sum": 18.0}, piped.stderr
    kept = server.run("predict", "sums", "--json-body", "[1]", "-o", "answer.json")
    assert kept.stdout == "" and json.loads((server.folder / "answer.json").read_text()) == {"sum": 2.0}


@pytest.mark.server
def test_predict_says_what_the_server_says(server: Server) -> None:
    for arguments, code, text in [
        (["sum", "--json-body", "1"], 1, "404 Model not found: sum"),
        (["sums", "--json-body", '{"a": 1}'], 1, "503 Prediction failed (TypeError"),
        (["sums", "--json-body", "{"], 2, "is not JSON"),
        (["sums"], 2, "give a file with -i FILE"),
        (["sums", "-i", "nowhere"], 2, "nowhere cannot be read: No such file"),
        (["sums", "--json-body", "1", "--url", "http://127.0.0.1:1"], 1, "does not answer"),
    ]:
        done = server.run("predict", *arguments)
        assert done.returncode == code and text in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.server
def test_logs_of_a_model_are_its_records(server: Server) -> None:
    everything = server.run("logs", "-n", "1000").stdout
    ours = server.run("logs", "sums", "-n", "1000").stdout
    assert "listening on" in everything and "listening on" not in ours and "sums" in ours
    assert server.run("logs", "-n", "2").stdout.count("\n") == 2


@pytest.mark.server
def test_status_as_json(server: Server) -> None:
    said = json.loads(server.run("status", "--json").stdout)
    assert said["running"] and said["pid"] > 0 and set(said["addresses"]) == {"inference", "management", "metrics"}
    assert [(row["model"], row["state"]) for row in said["models"]] == [("sums", "READY")]


def test_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOG_LOCATION", raising=False)
    assert cli.main(["status", "--json", "--pid-file", "pid"]) == 3
    assert json.loads(capsys.readouterr().out) == {"running": False}
    assert cli.main(["predict", "m", "--json-body", "1", "--pid-file", "pid"]) == 1
    assert "no server is running here" in capsys.readouterr().err
    assert cli.main(["logs", "--pid-file", "pid"]) == 1
    assert "there is no log" in capsys.readouterr().err


def test_init_refuses_what_is_there_and_what_no_model_can_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert cli.main(["init", "there"]) == 1 and cli.main(["init", "a b"]) == 1 and cli.main(["init", "there/.x"]) == 1
    assert sorted(os.listdir()) == ["there"] and not os.listdir("there")


def test_records_go_on_over_several_lines() -> None:
    lines = [
        "2026-01-01T00:00:00,000 [INFO ] W-9000-net_1.0-stdout MODEL_LOG - hello", "  more of it",
        "2026-01-01T00:00:00,000 [INFO ] x - network is up", "  more of that",
        '{"model": "net"}', "2026-01-01T00:00:00,000 [INFO ] x - my.net is another",
    ]  # fmt: skip
    assert list(filter(_Wanted("net"), lines)) == [*lines[:2], lines[4]]
    assert list(filter(_Wanted(None), lines)) == lines


def test_a_log_is_followed_into_the_file_that_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    following = _following(path)
    appended = os.open(path, os.O_WRONLY | os.O_APPEND)
    # The generator opens the file when it is first asked; a line that is there then is old.
    with open(path, "rb"):
        path.rename(tmp_path / "log.1")
        path.write_text("")
        os.close(appended)

    def write() -> None:
        with path.open("a") as file:
            file.write("new\n")

    threading.Timer(0.4, write).start()
    assert next(following) == "new"
    (tmp_path / "other").write_text("of another file\n")
    os.replace(tmp_path / "other", path)
    assert next(following) == "of another file"
    following.close()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_all_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in script
    assert ("model-store" if shell == "fish" else "--model-store") in script


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    asked = (
        'COMP_WORDS=(pyserve st); COMP_CWORD=1; _pyserve; echo "${COMPREPLY[*]}"\n'
        'COMP_WORDS=(pyserve start --model-s); COMP_CWORD=2; _pyserve; echo "${COMPREPLY[*]}"\n'
    )
    done = subprocess.run(["bash", "-c", script + asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["start stop status", "--model-store"]
