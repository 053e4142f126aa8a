"""A real server for the tests: started as a user starts it, in a folder of its own, asked over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from pyserve.server import pid_file
from tests.support.asking import JSON, LIMIT_S, Answer, Asking, AskingClient

__all__ = [
    "JSON", "LIMIT_S", "NAMES", "RAW", "ROOT", "SEED", "Answer", "Client", "Load", "Server", "at_once", "random_bytes",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
SEED = int(os.environ.get("PYSERVE_TEST_SEED", "11"))
RAW = {"Content-Type": "application/octet-stream"}
NAMES = ("inference", "management", "metrics")

T = TypeVar("T")


class Client(AskingClient):
    """One connection that is kept; certificates are not checked."""

    def __init__(self, address: tuple[str, int], *, is_tls: bool = False):
        self._connection = (
            http.client.HTTPSConnection(*address, timeout=LIMIT_S, context=ssl._create_unverified_context())
            if is_tls else http.client.HTTPConnection(*address, timeout=LIMIT_S)
        )  # fmt: skip

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        self._connection.request(method, path, body, headers or {})
        answer = self._connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def close(self) -> None:
        self._connection.close()


def _sanitizers_path() -> list[str]:
    """What makes servers load the engine that `make sanitize` built, under it."""
    return os.environ["PYTHONPATH"].split(os.pathsep) if "PYSERVE_SANITIZED_CORE" in os.environ else []


class Server(Asking):
    """One pyserve with its own folder, model store, cache, pid file and ports.

    As a context it is stopped at the end, and killed where that does not end it; whether it was started or not.
    """

    def __init__(self, folder: Path, store: Path | None = None, cache: Path | None = None):
        self.folder = folder
        self.store = store or folder / "store"
        self.store.mkdir(exist_ok=True)
        self.pid_path = folder / "pyserve.pid"
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *_sanitizers_path()]),
            "PYSERVE_CACHE": str(cache or folder / "cache"),
            "LOG_LOCATION": str(folder / "logs"),
            "TMPDIR": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
            "PYSERVE_DRAIN_DELAY_S": "0",  # no load balancer is there to notice
        }
        self.environment.pop("XDG_RUNTIME_DIR", None)
        self.environment.pop("TS_CONFIG_FILE", None)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.run("stop")
        self.kill()

    # --- the command line -----------------------------------------------------------------------------------------

    def arguments(self, command: str, *more: str) -> list[str]:
        arguments = [sys.executable, "-m", "pyserve", command, "--pid-file", str(self.pid_path)]
        if command == "start":
            if "--model-store" not in more:
                arguments += ["--model-store", str(self.store)]
            for name in NAMES:
                if f"--{name}-address" not in more:
                    arguments += [f"--{name}-address", "http://127.0.0.1:0"]
        if command in ("start", "dev"):
            if "--grpc" not in more:  # its default ports are for one server of the machine
                arguments += ["--grpc", "false"]
            elif "--grpc-inference-port" not in more:
                arguments += ["--grpc-inference-port", "0", "--grpc-management-port", "0"]
        return [*arguments, *more]

    def run(self, command: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command, *more), env=self.environment, cwd=self.folder,
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def start(self, *more: str) -> subprocess.CompletedProcess[str]:
        """Returns once it answers."""
        started = self.run("start", *more)
        assert started.returncode == 0, started.stderr + self.log()
        return started

    @contextmanager
    def foreground(self, *more: str) -> Iterator[subprocess.Popen[str]]:
        """Ready, with its output in the log file."""
        with (
            open(self.folder / "foreground.log", "w") as log,
            subprocess.Popen(
                self.arguments("start", "--foreground", *more), env=self.environment, cwd=self.folder,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            ) as popen,
        ):  # fmt: skip
            limit = threading.Timer(LIMIT_S, popen.kill)  # ends every wait for its output
            limit.start()
            try:
                assert popen.stdout is not None
                seen = ""
                for line in popen.stdout:
                    seen += line
                    if line == "Model server started.\n":
                        break
                else:
                    raise AssertionError(seen + (self.folder / "foreground.log").read_text())
                yield popen
            finally:
                limit.cancel()
                popen.kill()

    def log(self) -> str:
        path = self.folder / "logs/pyserve.log"
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, text: str, count: int = 1) -> None:
        """Returns once the log has it that often: a line may be written after the answer that it is about."""
        deadline = time.monotonic() + LIMIT_S
        while self.log().count(text) < count:
            assert time.monotonic() < deadline, f"not {count} times in the log: {text}\n{self.log()}"
            time.sleep(0.02)

    def kill(self) -> None:
        running = pid_file.read(self.pid_path)
        if running is not None:
            os.kill(running.pid, signal.SIGKILL)

    # --- its processes --------------------------------------------------------------------------------------------

    @property
    def running(self) -> pid_file.RunningServer:
        running = pid_file.read(self.pid_path)
        assert running is not None, "no server is running:\n" + self.log()
        return running

    @property
    def process(self) -> psutil.Process:
        """The server itself, the supervisor's only child but for front ends; between two of them the one that comes."""
        deadline = time.monotonic() + LIMIT_S
        while not (children := self._children("pyserve.server.main")):
            assert time.monotonic() < deadline, "waited in vain for a server process"
        (child,) = children
        return child

    @property
    def front_ends(self) -> list[psutil.Process]:
        """Its front-end processes that run."""
        return self._children("pyserve.server.front_end")

    def _children(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.running.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in child.cmdline():
                    found.append(child)
        return found

    def kill_server_process(self) -> None:
        """SIGKILL; returns when it is gone."""
        pid = self.process.pid
        process_fd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            assert select.select([process_fd], [], [], LIMIT_S)[0], "the process is still there"
        finally:
            os.close(process_fd)

    def key(self, scope: str = "management") -> dict[str, str]:
        """The header that calls need where keys are asked for."""
        keys = json.loads((self.folder / "key_file.json").read_text())
        return {"Authorization": f"Bearer {keys[scope]['key']}"}

    # --- over the network -----------------------------------------------------------------------------------------

    def url(self, name: str = "inference") -> str:
        return self.running.addresses[name].replace("0.0.0.0", "127.0.0.1")

    def address(self, name: str = "inference") -> tuple[str, int]:
        host, _, port = self.url(name).partition("://")[2].rpartition(":")
        return host, int(port)

    def grpc(self, name: str = "inference") -> str:
        """``host:port`` of a gRPC listener."""
        return self.running.addresses[f"grpc_{name}"]

    def client(self, name: str = "inference") -> Client:
        return Client(self.address(name), is_tls=self.url(name).startswith("https"))

    def connect(self, name: str = "inference") -> socket.socket:
        return socket.create_connection(self.address(name), timeout=LIMIT_S)


class Load:
    """Clients with kept connections that ask without pause and check each answer; a context.

    Attributes:
        answered: how many answers were right.
        wrong: what was wrong with the others.
    """

    def __init__(self, server: Server, model: str, network: torch.nn.Module, shape: Sequence[int], clients: int = 6):
        print(f"PYSERVE_TEST_SEED={SEED}")
        self.answered = 0
        self.wrong: list[str] = []
        self._server = server
        self._path = f"/predictions/{model}"
        self._network = network
        self._shape = shape
        self._stopped = False
        self._news = threading.Condition()
        self._threads = [threading.Thread(target=self._ask, args=(SEED + number,)) for number in range(clients)]

    def _ask(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with self._server.client() as client:
            while not self._stopped:
                item = torch.randn(*self._shape, generator=generator)
                try:
                    answer = client.ask("POST", self._path, item.numpy().tobytes(), RAW)
                    problem = "" if answer.status == 200 else f"{answer.status} {answer.body!r}"
                except OSError as error:
                    answer, problem = None, repr(error)
                if answer is not None and not problem:
                    with torch.inference_mode():
                        expected = self._network(item.unsqueeze(0))[0]
                    got = torch.frombuffer(bytearray(answer.body), dtype=torch.float32)
                    if not torch.allclose(got, expected, rtol=1e-5, atol=1e-5):
                        problem = f"expected {expected}, got {got}"
                with self._news:
                    if problem:
                        self.wrong.append(problem)
                        self._stopped = True
                    else:
                        self.answered += 1
                    self._news.notify_all()

    def wait_for_more(self, count: int) -> None:
        """Returns when ``count`` more requests were answered."""
        with self._news:
            target = self.answered + count
            assert self._news.wait_for(lambda: bool(self.wrong) or self.answered >= target, LIMIT_S), "no answers"
            assert not self.wrong, self.wrong

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join(LIMIT_S)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """All ``calls`` in threads that start together; their results in order."""
    barrier = threading.Barrier(len(calls))

    def call(each: Callable[[], T]) -> T:
        barrier.wait(LIMIT_S)
        return each()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def random_bytes(size: int, seed: int = SEED) -> bytes:
    return random.Random(seed).randbytes(size)
