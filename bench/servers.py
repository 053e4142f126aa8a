"""Starts servers for a measurement, each on free ports with their own folders, and stops them again."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pyserve.models.later_layout import LATER

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.005


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Server:
    """A running server's ports and process.

    Attributes:
        started_at: ``time.perf_counter()`` just before its command was run.
        pid: of that command; 0 if it is not ours.
        grpc_port: of its inference over gRPC; 0 without.
        ended: why it does not run any more; ``""`` if it runs, or is not ours.
    """

    def __init__(
        self, inference_port: int, management_port: int, started_at: float, pid: int = 0, grpc_port: int = 0, *,
        ended: Callable[[], str] = str,
    ):  # fmt: skip
        self.inference_port = inference_port
        self.management_port = management_port
        self.started_at = started_at
        self.pid = pid
        self.grpc_port = grpc_port
        self.ended = ended

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.inference_port}{path}"

    def ask(
        self, method: str, port: int, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """(status, body); (0, b"") when nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def set(self, model: str, query: str) -> None:
        """``PUT /models/{model}?query`` and wait until it holds."""
        status, body = self.ask("PUT", self.management_port, f"/models/{model}?{query}&synchronous=true")
        if status != 200:
            raise RuntimeError(f"PUT {model}?{query}: {status} {body.decode(errors='replace')}")

    def describe(self, model: str) -> dict[str, Any]:
        """What ``GET /models/{model}`` says of its only version."""
        status, body = self.ask("GET", self.management_port, f"/models/{model}")
        if status != 200:
            raise RuntimeError(f"GET {model}: {status} {body.decode(errors='replace')}")
        [found] = json.loads(body)
        return dict(found)

    def chosen_backend(self, model: str, timeout_s: float = 600) -> str:
        """The backend that a model runs on once nothing more is made, tried or compared for it; "" for a server
        without any."""  # fmt: skip
        deadline = time.perf_counter() + timeout_s
        while time.perf_counter() < deadline:
            checks = self.describe(model).get("checks", {})
            told = checks.get("backend", {})
            if told.get("state", "settled") == "settled" and checks.get("optimization") != LATER:
                return str(told.get("chosen", ""))
            time.sleep(0.2)
        raise RuntimeError(f"{model}: its backend was not settled within {timeout_s} s: {told}")

    def first_answer_s(self, model: str, body: bytes, timeout_s: float = 300) -> float:
        """Seconds from the start of the command to the first 200 of a prediction."""
        while time.perf_counter() - self.started_at < timeout_s:
            if self.ask("POST", self.inference_port, f"/predictions/{model}", body)[0] == 200:
                return time.perf_counter() - self.started_at
            if ended := self.ended():
                raise RuntimeError(f"no 200 from {model}: {ended}")
            time.sleep(POLL_S)
        raise RuntimeError(f"no 200 from {model} within {timeout_s} s")


def resident_mb(command_part: str) -> float:
    """RSS of all processes whose command line holds ``command_part``, MB."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if command_part in (folder / "cmdline").read_text().replace("\0", " "):
                total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total / 1e6


def python_path() -> str:
    """The source first, then what this process was given."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


@contextmanager
def pyserve(
    folder: Path, models: list[Path], *flags: str, cache: Path | None = None, variables: dict[str, str] | None = None,
    with_grpc: bool = False,
) -> Iterator[Server]:  # fmt: skip
    """pyserve with ``models`` and further ``variables`` in its environment; not waited for: ask it."""
    inference, management, metrics, grpc_a, grpc_b = free_ports(5)
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pyserve", "start", "--foreground", "--pid-file", str(folder / "pid"),
        "--inference-address", f"http://127.0.0.1:{inference}", "--management-address",
        f"http://127.0.0.1:{management}", "--metrics-address", f"http://127.0.0.1:{metrics}",
        *(("--grpc-inference-port", str(grpc_a), "--grpc-management-port", str(grpc_b)) if with_grpc else ()),
        "--grpc", "true" if with_grpc else "false", "--models", *map(str, models), *flags,
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": python_path(), "PYSERVE_CACHE": str(cache or folder / "cache"),
        "LOG_LOCATION": str(folder / "logs"), **(variables or {}),
    }  # fmt: skip
    with open(folder / "pyserve.log", "ab") as log:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        ended = partial(how_ended, process, folder / "pyserve.log")
        yield Server(inference, management, started_at, process.pid, grpc_a if with_grpc else 0, ended=ended)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def how_ended(process: subprocess.Popen[bytes], log: Path) -> str:
    """Another process may have taken a port that was free, for one; ``""`` if it still runs."""
    if process.poll() is None:
        return ""
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return " ".join([f"the server ended with {process.returncode}", *(f"({line[:300]})" for line in last)])


@contextmanager
def torchserve(folder: Path, bin_folder: Path, archive: Path) -> Iterator[Server]:
    """TorchServe from the virtual environment ``bin_folder`` belongs to, with one archive and one worker."""
    inference, management, metrics, grpc_a, grpc_b = free_ports(5)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.properties").write_text(
        f"inference_address=http://127.0.0.1:{inference}\nmanagement_address=http://127.0.0.1:{management}\n"
        f"metrics_address=http://127.0.0.1:{metrics}\ngrpc_inference_port={grpc_a}\ngrpc_management_port={grpc_b}\n"
        "default_workers_per_model=1\n"
    )
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "TEMP": str(folder),
                   "LOG_LOCATION": str(folder / "logs"), "TMPDIR": str(folder)}  # fmt: skip
    command = [
        str(bin_folder / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth", "--model-store",
        str(archive.parent), "--models", archive.name, "--ts-config", str(folder / "config.properties"),
    ]  # fmt: skip
    with open(folder / "torchserve.log", "ab") as log:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        yield Server(inference, management, started_at, process.pid, grpc_a)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
