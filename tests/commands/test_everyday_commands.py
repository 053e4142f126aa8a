"""`predict`, `logs`, `init`, `completion` and `status --json`."""

from __future__ import annotations

import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pyserve.commands import cli
from pyserve.commands.logs import _following, _Wanted
from pyserve.commands.model_arguments import UsageError
from pyserve.commands.trial import _content
from tests.support.serving import Server
from tests.support.serving_models import write_linear

ROOT = Path(__file__).resolve().parents[2]

ENTRY = [sys.executable, "-m", "pyserve"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves the folder that `pyserve init` makes."""
    server = Server(tmp_path_factory.mktemp("served"))
    made = subprocess.run([sys.executable, "-m", "pyserve", "init", "sums"], cwd=server.folder, env=server.environment,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "pyserve dev sums" in made.stdout
    with server:
        server.start("sums", "--metrics-address", "http://127.0.0.1:0")
        yield server


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
def test_predict_shows_numbers_on_a_terminal_and_pipes_bytes(server: Server) -> None:
    write_linear(server.store)
    server.manage("POST", "/models?url=linear.mar&initial_workers=1&synchronous=true")
    (server.folder / "numbers.bin").write_bytes(struct.pack("<4f", 1, 2, 3, 4))
    arguments = server.arguments("predict", "linear", "-i", "numbers.bin")
    run = partial(subprocess.run, arguments, env=server.environment, cwd=server.folder, check=True, timeout=60)
    ours, theirs = pty.openpty()
    run(stdout=theirs)
    shown = json.loads(os.read(ours, 1 << 16))
    os.close(theirs)
    os.close(ours)
    piped = list(struct.unpack("<3f", run(stdout=subprocess.PIPE).stdout))
    server.manage("DELETE", "/models/linear")
    assert shown == piped


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
def test_output_that_has_no_room_is_an_error_in_one_line(server: Server) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run([*ENTRY, "config"], cwd=server.folder, env=server.environment, stdout=full, check=False,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert ran.returncode == 1 and "error: [Errno 28] No space left on device" in ran.stderr, ran.stderr
    assert "Exception" not in ran.stderr


@pytest.mark.server
def test_logs_of_no_model_say_so(server: Server) -> None:
    ran = server.run("logs", "smus")
    assert (ran.returncode, ran.stdout) == (0, "") and 'is of a model called "smus"' in ran.stderr
    refused = server.run("logs", "-n", "-1")
    assert refused.returncode == 2 and "'-1' is no whole number, 0 or more" in refused.stderr


@pytest.mark.server
@pytest.mark.parametrize("command", ["predict", "bench"])
def test_a_device_is_not_read_for_ever(server: Server, command: str) -> None:
    ran = server.run(command, "sums", "-i", "/dev/zero")
    assert ran.returncode in (1, 2) and "/dev/zero" in ran.stderr and "a device, not a file" in ran.stderr, ran
    with pytest.raises(UsageError, match="/dev/zero cannot be read: it is a device"):
        _content(Path("/dev/zero"))  # of `debug` and `check`
    assert _content(Path("/dev/null")) == b""


@pytest.mark.server
@pytest.mark.parametrize("command", ["inspect sums", "config", "status", "logs"])
def test_a_reader_that_has_gone_is_no_error_to_tell(server: Server, command: str) -> None:
    readable, writable = os.pipe()
    os.close(readable)
    name, *rest = command.split()
    arguments = server.arguments(name, *rest) if name in ("status", "logs") else [*ENTRY, name, *rest]
    ran = subprocess.run(arguments, cwd=server.folder, env=server.environment, stdout=writable, stderr=subprocess.PIPE,
                         text=True, check=False)  # fmt: skip
    os.close(writable)
    assert ran.returncode == 1 and "pipe" not in ran.stderr and "Exception" not in ran.stderr, ran.stderr


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


def test_what_init_says_to_type_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "my models/sums"]) == 0
    said = capsys.readouterr().out
    assert "pyserve dev 'my models/sums' " in said and "python 'my models/sums/client.py'\n" in said


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
    assert "%(" not in script


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    asked = (
        'COMP_WORDS=(pyserve st); COMP_CWORD=1; _pyserve; echo "${COMPREPLY[*]}"\n'
        'COMP_WORDS=(pyserve start --model-s); COMP_CWORD=2; _pyserve; echo "${COMPREPLY[*]}"\n'
    )
    done = subprocess.run(["bash", "-c", script + asked], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["start stop status", "--model-store"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", "fish"])
    (tmp_path / "pyserve.fish").write_text(capsys.readouterr().out)
    (tmp_path / "net.pt").touch()
    asked = ["pyserve st", "pyserve start --model-s", "pyserve start ne", "pyserve completion "]
    command = "source pyserve.fish; " + "; echo =; ".join(f"complete -C {each!r}" for each in asked)
    done = subprocess.run(["fish", "--no-config", "-c", command], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    words = [[line.split("\t")[0] for line in part.split("\n") if line] for part in done.stdout.split("=\n")]
    assert words == [["start", "status", "stop"], ["--model-store"], ["net.pt"], ["bash", "fish", "zsh"]]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [("pyserve top --onc", "--once"), ("pyserve start --stric", "--strict"), ("pyserve start ne", "net.pt"),
     ("pyserve completion zs", "zsh"), ("pyserve docto", "doctor")],
)  # fmt: skip
def test_zsh_completes(typed: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["completion", "zsh"])
    (tmp_path / "_pyserve").write_text(capsys.readouterr().out)
    (tmp_path / "net.pt").touch()
    # zsh completes where a person types: it has to have a terminal, which is a module of its own.
    script = f"""
        zmodload zsh/zpty
        zpty shell 'TERM=dumb zsh -f -i'
        zpty -w shell 'PS1=""; fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo rea""dy'
        zpty -r shell line '*ready*'
        zpty -w -n shell $'{typed}\\t'
        zpty -r -m shell line '*{shown}*'
        print -r -- "$line"
    """
    done = subprocess.run(["zsh", "-f", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          check=True, env={**os.environ, "HOME": str(tmp_path)})  # fmt: skip
    assert shown in done.stdout
