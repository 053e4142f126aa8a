"""`pyserve bench`: what it sends, what it counts, and what it says where that cannot be."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.commands import cli
from tests.support.serving import Server

# Every third request fails.
HANDLER = """
calls = []
def handle(data, context):
    if data is None:
        return None
    calls.append(1)
    if len(calls) % 3 == 0:
        raise ValueError("every third one")
    return [1] * len(data)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    for name, code in (
        ("thirds", HANDLER),
        ("packed", "def handle(data, context):\n    return [1] * len(data or [])\n"),
    ):
        (server.folder / name).mkdir()
        (server.folder / name / "handler.py").write_text(code)
    (server.folder / "packed" / "sample_input.json").write_text("[1, 2]")
    server.start("thirds", "packed", "--inference-address", f"unix:{server.folder}/socket")
    yield server
    server.run("stop")
    server.kill()


@pytest.mark.server
def test_failures_are_counted_by_status(server: Server) -> None:
    body = server.folder / "body.json"
    body.write_text("1")
    done = server.run("bench", "thirds", "-i", str(body), "-n", "30", "--warmup", "0", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["requests"]["counted"] == 30
    assert result["statuses"] == {"200": 20, "503": 10} and "every third one" in result["error_samples"]["503"]
    assert result["latency_ms"]["min"] <= result["latency_ms"]["p50"] <= result["latency_ms"]["p99.9"]
    shown = server.run("bench", "thirds", "-i", str(body), "-c", "2", "-n", "30", "--warmup", "0").stdout
    assert "2 clients" in shown and "status 503" in shown and "generator" in shown and "share the" in shown


@pytest.mark.server
def test_without_a_file_the_archives_own_sample_is_sent(server: Server) -> None:
    result = json.loads(server.run("bench", "packed", "-n", "5", "--warmup", "0", "--json").stdout)
    assert result["settings"]["data"] == [{"name": "sample_input.json", "size": 6}]
    assert result["statuses"] == {"200": 5} and "Authorization" not in json.dumps(result["settings"])


@pytest.mark.server
def test_on_a_terminal_the_line_of_progress_moves_the_cursor(server: Server) -> None:
    ours, theirs = pty.openpty()
    arguments = server.arguments("bench", "packed", "-n", "5", "--warmup", "0")
    subprocess.run(
        arguments, env=server.environment, cwd=server.folder, stdout=subprocess.DEVNULL, stderr=theirs, timeout=60,
        check=True,
    )  # fmt: skip
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert "\r\x1b[K" in shown and "\\x" not in shown


@pytest.mark.server
def test_what_fails_at_once_is_said_in_the_servers_words(server: Server) -> None:
    for arguments, text in [
        (["third"], "404 Model not found: third"),
        (["thirds"], "it does not say its inputs: give a file with -i FILE"),
        (["thirds/1 0"], "404 Model version: 1 0 does not exist"),
        (["thirds", "-i", "nowhere"], "cannot read --input nowhere: No such file"),
        (["thirds", "-n", "1", "-d", "1"], "give --requests or --duration, not both"),
        (["thirds", "-c", "0"], "--concurrency must be above 0"),
    ]:
        done = server.run("bench", *arguments)
        assert done.returncode == 1 and text.lower() in done.stderr.lower() and done.stderr.count("\n") == 1, (
            done.stderr
        )


@pytest.mark.parametrize("command", [["bench", "m"], ["predict", "m", "--json-body", "1"]])
@pytest.mark.parametrize("flag", ["--token", "--content-type"])
@pytest.mark.parametrize("text", ["a\nb", "a\u20ac"])
def test_what_no_header_can_carry_is_named(
    command: list[str], flag: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command, "--url", "http://127.0.0.1:1", flag, text]) != 0
    assert f"{flag} has characters that a header cannot carry" in capsys.readouterr().err


def test_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "m", "--pid-file", str(tmp_path / "pid")]) == 1
    assert "no server is running here" in capsys.readouterr().err
    assert cli.main(["bench", "m", "--url", "http://127.0.0.1:1"]) == 1
    error = capsys.readouterr().err
    assert "cannot reach http://127.0.0.1:1/predictions/m: Connection refused" in error
