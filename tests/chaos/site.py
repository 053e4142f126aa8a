"""The server of a campaign: its folders, its processes, and the init system that starts it again when it ends."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from pyserve.server import pid_file
from tests.chaos import namespaces
from tests.chaos.traffic import Target
from tests.support.certificates import self_signed
from tests.support.ports import free_port
from tests.support.serving import Server

START_LIMIT_S = 120.0
_DEATH_LIMIT_S = 10.0
DISKS = ("tmp", "state", "logs", "cache")
"""Folders with a disk of their own, where the kernel allows."""
MODELS = ("linear", "pictures", "echo", "streamer", "adder")


class Site(Server):
    """A pyserve that is started, and started again, as an init system would.

    Args:
        folder: where all of its folders are made.

    Attributes:
        has_disks: whether DISKS are small disks that may be filled up.
        init: the process that was started last.
        shown_pids: of all workers, by the last `rows`.
        environment: of the server; faults that work from within add to it before the start.
    """

    def __init__(self, folder: Path, *, is_tls: bool):
        self.has_disks = namespaces.are_ours()
        for name in (*DISKS, "run", "home"):
            (folder / name).mkdir()
            if name in DISKS and self.has_disks:
                namespaces.mount_disk(folder / name)
        super().__init__(folder, cache=folder / "cache/pyserve")
        (folder / "run").chmod(0o700)
        self.environment |= {
            "TMPDIR": str(folder / "tmp"),
            "LOG_LOCATION": str(folder / "logs"),
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
            "HOME": str(folder / "home"),
        }
        self.is_tls = is_tls
        self.init: subprocess.Popen[bytes] | None = None
        self._ports = [free_port() for _ in range(5)]
        self._is_first = True
        self.shown_pids: set[int] = set()
        self._write_config()

    def _write_config(self) -> None:
        scheme = "https" if self.is_tls else "http"
        inference, management, metrics, grpc, grpc_management = self._ports
        lines = [
            f"inference_address={scheme}://127.0.0.1:{inference}",
            f"management_address={scheme}://127.0.0.1:{management}",
            f"metrics_address=http://127.0.0.1:{metrics}",
            f"grpc_inference_port={grpc}",
            f"grpc_management_port={grpc_management}",
            f"model_store={self.store}",
            "enable_model_api=true",
            "disable_token_authorization=true",
        ]
        if self.is_tls:
            pair = self_signed(self.folder)
            lines += [f"private_key_file={pair.key}", f"certificate_file={pair.certificate}"]
        self._config = self.folder / "chaos.properties"
        self._config.write_text("\n".join(lines) + "\n")

    # --- the init system ------------------------------------------------------------------------------------------

    def start_again(self) -> None:
        """Starts the server; returns at once. The first time with all archives, then with what was served last."""
        what = ["--models", *(f"{name}.mar" for name in MODELS)] if self._is_first else ["--restore"]
        self._is_first = False
        command = [*self.arguments("dry")[:3], "start", "--foreground", "--pid-file", str(self.pid_path),
                   "--ts-config", str(self._config), "--grpc", "true", *what]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self.init = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def keep(self) -> bool:
        """Starts it again if it has ended; returns whether it had."""
        if self.init is None or self.init.poll() is None:
            return False
        self.start_again()
        return True

    def start_over(self) -> None:
        """Ends it and starts it as the first time."""
        self.end()
        self._is_first = True
        self.start_again()

    def end(self) -> None:
        """Stops it as an init system does, the hard way last."""
        if self.init is None:
            return
        tree = self.tree()
        self.init.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.init.wait(40)
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.init.wait()

    # --- its processes --------------------------------------------------------------------------------------------

    @property
    def supervisor(self) -> psutil.Process:
        assert self.init is not None
        return psutil.Process(self.init.pid)

    @property
    def zygote(self) -> psutil.Process:
        """Raises `LookupError` while there is none."""
        for child in self.process.children():
            if any("zygote" in word for word in child.cmdline()):
                return child
        raise LookupError("there is no zygote")

    @property
    def process(self) -> psutil.Process:
        """The server itself; raises `LookupError` while there is none."""
        for child in self.supervisor.children():
            if child.status() != psutil.STATUS_ZOMBIE:
                return child
        raise LookupError("there is no server process")

    def workers(self) -> list[psutil.Process]:
        return sorted(self.zygote.children(), key=lambda each: each.pid)

    def worker_pids(self, model: str) -> list[int]:
        """Of the workers that the management API shows as ready."""
        return [row["pid"] for row in self.describe(model)["workers"] if row["pid"] > 0 and row["status"] == "READY"]

    def tree(self) -> list[psutil.Process]:
        """All its processes, those of it that are left over too."""
        found: list[psutil.Process] = []
        marker = f"TMPDIR={self.folder}/tmp".encode()
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if marker in Path(f"/proc/{process.pid}/environ").read_bytes() and process.pid != os.getpid():
                    found.append(process)
        return found

    # --- what it is asked -----------------------------------------------------------------------------------------

    @property
    def running(self) -> pid_file.RunningServer:
        inference, management, metrics, grpc, _ = self._ports
        scheme = "https" if self.is_tls else "http"
        addresses = {
            "inference": f"{scheme}://127.0.0.1:{inference}",
            "management": f"{scheme}://127.0.0.1:{management}",
            "metrics": f"http://127.0.0.1:{metrics}",
            "grpc_inference": f"127.0.0.1:{grpc}",
        }
        return pid_file.RunningServer(self.init.pid if self.init else 0, 0, addresses)

    @property
    def target(self) -> Target:
        return Target(self.address(), self.grpc(), self.is_tls)

    def rows(self) -> dict[str, Any]:
        """What is served: name to version, limits and number of ready workers."""
        listed = self.manage("GET", "/models?limit=100")["models"]
        rows: dict[str, Any] = {}
        shown: set[int] = set()
        for name in sorted({each["modelName"] for each in listed}):
            for row in self.manage("GET", f"/models/{name}/all"):
                ready = sum(worker["status"] == "READY" for worker in row["workers"])
                shown |= {worker["pid"] for worker in row["workers"]}
                limits = {key: row[key] for key in ("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay")}
                rows[f"{name} {row['modelVersion']}"] = {**limits, "ready": ready}
        self.shown_pids = shown
        return rows

    def log_tail(self, lines: int = 25) -> list[str]:
        path = self.folder / "server.log"
        return path.read_text(errors="replace").splitlines()[-lines:] if path.exists() else []


@contextlib.contextmanager
def serving(folder: Path, *, is_tls: bool, prepare: Callable[[Site], None]) -> Iterator[Site]:
    """A running site in ``folder``, which is emptied in the end."""
    site = Site(folder, is_tls=is_tls)
    prepare(site)
    site.start_again()
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not _answers(site):
            assert site.init is not None and site.init.poll() is None, "\n".join(site.log_tail())
            assert time.monotonic() < deadline, "\n".join(site.log_tail())
            time.sleep(0.05)
        yield site
    finally:
        site.end()


def _answers(site: Site) -> bool:
    try:
        return site.ask("GET", "/ready").status == 200
    except OSError:
        return False


def send(process: psutil.Process | int, number: signal.Signals) -> None:
    """Sends a signal to a process that may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process if isinstance(process, int) else process.pid, number)


def kill(*pids: int) -> None:
    """Sends SIGKILL to all and returns when they have ended, which for a large process takes a while."""
    ends = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ends.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
    for end in ends:
        select.select([end], [], [], _DEATH_LIMIT_S)
        os.close(end)


def clear(folder: Path) -> None:
    """Empties a folder that stays."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
