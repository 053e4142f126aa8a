"""`pyserve status` while workers are being added, and the console of `pyserve dev`."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.serving import LIMIT_S, Server

# Its first worker starts at once; others wait for a file.
HANDLER = """
import os, time
class Slow:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        with open(os.path.join(folder, "started"), "a") as file:
            first = file.tell() == 0
            file.write("x")
        while not first and not os.path.exists(os.path.join(folder, "go")):
            time.sleep(0.01)
    def handle(self, data, context):
        return [1] * len(data)
"""


def states(server: Server) -> tuple[str, str]:
    _, state, workers = server.run("status").stdout.splitlines()[-1].split()[1:4]
    return state, workers


@pytest.mark.server
def test_workers_that_are_being_added_are_no_sign_of_trouble(tmp_path: Path) -> None:
    server = Server(tmp_path)
    folder = tmp_path / "slow"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)
    try:
        server.start("slow", "--disable-token-auth", "--access-log", "false")
        assert states(server) == ("READY", "1/1")
        with server.client("management") as management:
            assert management.ask("PUT", "/models/slow?min_worker=2").status == 202
            deadline = time.monotonic() + LIMIT_S
            while states(server)[1] == "1/1":  # it begins behind its answer
                assert time.monotonic() < deadline
            assert states(server) == ("SCALING", "1/2")
            (folder / "go").touch()
            assert management.ask("PUT", "/models/slow?min_worker=2&synchronous=true").status == 200
        assert states(server) == ("READY", "2/2")
        assert not (tmp_path / "logs" / "access_log.log").exists()
    finally:
        server.run("stop")
        server.kill()


@pytest.mark.server
def test_dev_shows_a_line_for_each_request(tmp_path: Path) -> None:
    server = Server(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "handler.py").write_text("def handle(data, context):\n    return [1] * len(data or [])\n")
    addresses = [word for name in ("inference", "management", "metrics")
                 for word in (f"--{name}-address", "http://127.0.0.1:0")]  # fmt: skip
    with (
        open(tmp_path / "console.log", "w") as console,
        subprocess.Popen(server.arguments("dev", "m", *addresses), env=server.environment, cwd=tmp_path,
                         stdout=subprocess.PIPE, stderr=console, text=True) as popen,
    ):  # fmt: skip
        try:
            assert popen.stdout is not None
            assert any(line == "Model server started.\n" for line in popen.stdout)
            assert server.run("predict", "m", "--json-body", "1").returncode == 0
            assert server.run("predict", "x", "--json-body", "1").returncode == 1
        finally:
            popen.terminate()
            popen.wait(LIMIT_S)
    lines = [line for line in (tmp_path / "console.log").read_text().splitlines() if "pyserve.requests" in line]
    assert re.search(r"POST /predictions/m 200 in [0-9.]+ ms \(.*\), [0-9a-f]{8}$", lines[0])
    assert re.search(r"POST /predictions/x 404 in [0-9.]+ ms, [0-9a-f]{8}$", lines[1])
