"""The ASGI application under real servers, and what docs/embedding.md shows: each in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.asgi_site import OWN
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import LIMIT_S, ROOT
from tests.support.serving_models import write_linear

pytestmark = [pytest.mark.server, pytest.mark.slow]

APP = """
import pyserve.asgi
app = pyserve.asgi.application(["linear.mar", "own.mar"], config={"max_request_size": 100_000})
"""
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "main:app", "--port", "{port}"],
    "uvicorn, h11 and asyncio": ["-m", "uvicorn", "main:app", "--port", "{port}", "--http", "h11", "--loop", "asyncio"],
    "hypercorn": ["-m", "hypercorn", "main:app", "--bind", "127.0.0.1:{port}"],
    "granian": ["-m", "granian", "main:app", "--interface", "asgi", "--port", "{port}"],
}


@contextlib.contextmanager
def running(folder: Path, arguments: list[str]) -> Iterator[int]:
    """The port of a server that answers; afterwards it was stopped, and none of its processes is left."""
    port = free_port()
    command = [sys.executable, *(part.format(port=port) for part in arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    with (
        open(folder / "log", "w+") as log,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True) as popen,
    ):
        try:
            deadline = time.monotonic() + LIMIT_S
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert popen.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            family = [psutil.Process(popen.pid), *psutil.Process(popen.pid).children(recursive=True)]
            yield port
            popen.send_signal(signal.SIGTERM)
            popen.wait(LIMIT_S)
            _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
            assert not alive, (folder / "log").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.mark.parametrize("name", SERVERS)
def test_it_runs_under(name: str, tmp_path: Path) -> None:
    write_linear(tmp_path)
    write_handler(tmp_path, "own", OWN)
    (tmp_path / "main.py").write_text(APP)
    json_type = {"Content-Type": "application/json"}
    with running(tmp_path, SERVERS[name]) as port:
        status, headers, body = ask(port, "GET", "/ping")
        assert (status, json.loads(body)) == (200, {"status": "Healthy"}) and headers["x-request-id"]
        assert len(json.loads(ask(port, "POST", "/predictions/linear", b"[1, 2, 3, 4]", json_type)[2])) == 3
        assert ask(port, "POST", "/predictions/own", b"x" * 100_000)[2] == b"100000"
        assert ask(port, "POST", "/predictions/own", iter([b"abc"] * 1000))[2] == b"3000"
        assert ask(port, "POST", "/predictions/own", b"x" * 100_001)[0] == 413
        assert ask(port, "GET", "/predictions/o%77n/1.0")[2] == b"0"
        assert ask(port, "HEAD", "/ping")[2] == b""
        order = json.dumps({"parts": ["one", "two"]}).encode()
        status, headers, body = ask(port, "POST", "/predictions/own", order, json_type)
        assert (status, body, headers["ts_stream_next"]) == (200, b"onetwoend", "true")
        broken = json.dumps({"parts": ["one", "raise"]}).encode()
        with pytest.raises((http.client.IncompleteRead, http.client.HTTPException, OSError)):
            ask(port, "POST", "/predictions/own", broken, json_type)
        assert b"Requests2XX" in ask(port, "GET", "/metrics")[2]
        assert ask(port, "GET", "/models")[0] == 404


DIGITS_INPUT = {"dtype": "float32", "shape": [1, 8, 8]}


class Sums(torch.nn.Module):
    """[n, 1, 8, 8] -> [n, 2]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/embedding.md").read_text(), re.DOTALL)


def digits(folder: Path) -> None:
    """The archive that the page serves, with a network that takes as much."""
    write_handler(folder, "digits", None, handler="tensor", network=Sums(), config={"input": DIGITS_INPUT})


def test_the_page_is_true_of_calls(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text(python_blocks()[0])
    ran = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["{'net': 1}", "404 Model not found: none (the models here are net)"]


@pytest.mark.parametrize(("block", "path"), [(1, ""), (2, "/models")])
def test_the_page_is_true_of_applications(tmp_path: Path, block: int, path: str) -> None:
    digits(tmp_path)
    (tmp_path / "main.py").write_text(python_blocks()[block])
    with running(tmp_path, SERVERS["uvicorn"]) as port:
        item = json.dumps([[[0.0] * 8] * 8]).encode()
        status, _, body = ask(port, "POST", f"{path}/predictions/digits", item, {"Content-Type": "application/json"})
        assert status == 200, body
        if path:
            assert json.loads(ask(port, "GET", "/mean")[2]) == {"answers": 2}
