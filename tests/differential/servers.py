"""Starts TorchServe or pyserve for a setting: the same configuration, free ports, a folder of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.differential.archives import build
from tests.differential.case import APIS, Setting
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0
READY = "Model server started."
# Ports below those that the kernel hands out: TorchServe's workers bind nothing, but their names come from it.
FIRST_WORKER = 9000


@dataclass
class Running:
    """A server that answers.

    Attributes:
        name: ``torchserve``, ``default`` or ``strict``, the latter two being modes of pyserve.
        ports: of each API, and ``grpc_inference`` and ``grpc_management``.
        folder: where it runs, with its logs, its key file and, as ``store``, its model store.
    """

    name: str
    setting: Setting
    ports: dict[str, int]
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def is_tls(self) -> bool:
        return dict(self.setting.config).get("inference_address", "").startswith("https")

    def key(self, scope: str) -> str:
        """A token's text; "" where there is none."""
        path = self.folder / "key_file.json"
        return str(json.loads(path.read_text())[scope]["key"]) if path.exists() else ""


@contextmanager
def running(name: str, setting: Setting, bin_folder: Path | None = None) -> Iterator[Running]:
    """A server, ended with everything it started.

    Args:
        bin_folder: ``bin`` of the environment that TorchServe is installed in.

    Raises:
        RuntimeError: it does not start; the text is what it printed.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"pyserve-differential-{name}-"))
    (folder / "store").mkdir()
    names = [*APIS, "grpc_inference", "grpc_management"]
    ports = {api: free_port() for api in names}
    for api in APIS:  # which may share one
        shared = re.search(r"\{(\w+)\}", dict(setting.config).get(f"{api}_address", ""))
        ports[api] = ports[shared[1] if shared else api]
    server = Running(name, setting, ports, folder)
    for archive, spec in json.loads(setting.archives or "{}").items():
        build(server.store, archive, spec)
    (folder / "config.properties").write_text(_config(server))
    flags = ["--model-store", str(server.store), "--ts-config", str(folder / "config.properties"), *setting.flags]
    environment = {
        **os.environ, "TEMP": str(folder), "TMPDIR": str(folder), "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"), **dict(setting.environment),
    }  # fmt: skip
    environment.pop("TS_CONFIG_FILE", None)
    if name == "torchserve":
        assert bin_folder is not None
        command = [str(bin_folder / "torchserve"), "--start", "--foreground", "--ncs", *flags]
        environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
    else:
        command = [
            sys.executable, "-m", "pyserve", "start", "--foreground", "--ncs", "--pid-file", str(folder / "pid"), *flags
        ]  # fmt: skip
        environment |= {
            "PYTHONPATH": str(ROOT),
            "PYSERVE_CACHE": os.environ.get("PYSERVE_CACHE", str(folder / "cache")),
        }
    try:
        with _started(command, environment, folder):
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    with (
        open(folder / "errors.log", "w") as errors,
        subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True, errors="replace",
        ) as process,
    ):  # fmt: skip
        limit = threading.Timer(START_S, process.kill)  # ends the wait for its output
        limit.start()
        try:
            assert process.stdout is not None
            seen = ""
            for line in process.stdout:
                seen += line
                if READY in line:
                    break
            else:
                raise RuntimeError(seen + (folder / "errors.log").read_text())
            limit.cancel()
            reader = threading.Thread(target=_read_on, args=(process.stdout, folder / "output.log"), daemon=True)
            reader.start()
            yield
        finally:
            limit.cancel()
            _end(process)


def _read_on(output: object, path: Path) -> None:
    """TorchServe writes all its logs there; a full pipe would stop it."""
    with open(path, "w") as log:
        for line in output:  # type: ignore[attr-defined]
            log.write(line)
            log.flush()


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _config(server: Running) -> str:
    wanted = dict(server.setting.config)
    for api in APIS:
        wanted.setdefault(f"{api}_address", f"http://127.0.0.1:{{{api}}}")
    for api in ("grpc_inference", "grpc_management"):
        wanted.setdefault(f"{api}_port", f"{{{api}}}")
    if server.name == "strict":
        wanted["compat"] = "strict"
    text = "".join(f"{key}={value}\n" for key, value in wanted.items())
    for api, port in server.ports.items():
        text = text.replace("{" + api + "}", str(port))
    return (
        text.replace("{store}", str(server.store))
        .replace("{folder}", str(server.folder))
        .replace("{files}", str(Path(__file__).parent / "files"))
    )
