"""Two servers that take each other's place again and again, behind nginx, haproxy and a pool of kept connections.

    python -m tests.support.rolling_restart --requests 50000 --restarts 5

Each front has clients that ask in closed loops, some at once and some after a pause, so that connections of all ages
are there when a server goes. A request that was sent is never sent again, neither by the clients nor by a proxy. Prints
for each front how many were answered and what became of the others; there should be none.
"""

from __future__ import annotations

import argparse
import http.client
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import psutil

from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import LIMIT_S, Server
from tests.support.steady_load import ECHO, ClientThreads, has_ended

FRONTS = ("nginx", "haproxy", "pool")
PATH = "/predictions/echo"
CLIENTS_PER_FRONT = 6
# How long clients wait between two requests, s; each has one of these means.
PAUSES_S = (0.0, 0.0, 0.002, 0.01, 0.1, 0.6)
# Health checks of haproxy; the servers give it so long to see that one is not ready.
CHECK_MS = 200
DRAIN_DELAY_S = 1

_NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
    uwsgi_temp_path {folder}; scgi_temp_path {folder};
    upstream servers {{ server 127.0.0.1:{first} max_fails=0; server 127.0.0.1:{second} max_fails=0; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://servers; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""
_HAPROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch 1
frontend front
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    option httpchk GET /ready
    http-reuse always
    default-server check inter {check_ms}ms fall 1 rise 1
    server first 127.0.0.1:{first}
    server second 127.0.0.1:{second}
"""


class Front(Protocol):
    """What clients ask through."""

    def ask(self, body: bytes) -> tuple[int, bytes]:
        """Sends one request once; returns status and body. Raises OSError or HTTPException if there is no answer."""


class Pool:
    """Kept connections to whichever of ``ports`` answers, as libraries for clients have them.

    A connection is looked at before it is used again: one that the server has ended is dropped. One that cannot be made
    is made to the next port. Any thread.
    """

    def __init__(self, ports: Sequence[int]):
        self._ports = ports
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def ask(self, body: bytes) -> tuple[int, bytes]:
        connection = self._take() or self._connect()
        try:
            connection.request("POST", PATH, body, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            answer = response.status, response.read()
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:  # it was not said that it is closed
            with self._lock:
                self._idle.append(connection)
        return answer

    def _take(self) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not has_ended(connection):
                return connection
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        deadline = time.monotonic() + LIMIT_S
        while True:
            for port in self._ports:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    continue
                return connection
            assert time.monotonic() < deadline, "nobody listens"

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class Clients(ClientThreads):
    """The clients of one front; a context, at whose end they have stopped.

    Attributes:
        answered: requests that were answered right.
        lost: what became of the others.
    """

    def __init__(self, name: str, front: Front, seed: int):
        super().__init__()
        self.name = name
        self.answered = 0
        self.lost: Counter[str] = Counter()
        self._front = front
        self._threads = [
            threading.Thread(target=self._run, args=(f"{name} {i}", random.Random(f"{seed} {i}"), PAUSES_S[i]))
            for i in range(CLIENTS_PER_FRONT)
        ]

    def _run(self, name: str, chance: random.Random, pause_s: float) -> None:
        count = 0
        while not self._ends.is_set():
            body = f"{name} {count}".encode() + bytes(chance.randrange(2000))
            count += 1
            try:
                status, answer = self._front.ask(body)
                end = "" if (status, answer) == (200, body) else f"{status} {answer[:120]!r}"
            except (OSError, http.client.HTTPException) as error:
                end = f"{type(error).__name__}: {error}"
            with self._lock:
                self.answered += not end
                if end:
                    self.lost[end] += 1
            self._rest(pause_s, chance)


def missing(front: str) -> bool:
    """Whether the program behind ``front`` is not installed."""
    return front != "pool" and program(front) is None


def program(front: str) -> str | None:
    """Its path; distributions put it where users do not look."""
    return shutil.which(front, path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/bin")


@contextmanager
def opened(front: str, ports: Sequence[int], folder: Path) -> Iterator[Pool]:
    """A front to the servers on ``ports``, and a pool of connections to it."""
    if front == "pool":
        pool = Pool(ports)
        yield pool
        pool.close()
        return
    port, path = free_port(), folder / f"{front}.conf"
    text = {"nginx": _NGINX, "haproxy": _HAPROXY}[front]
    path.write_text(text.format(folder=folder, port=port, first=ports[0], second=ports[1], check_ms=CHECK_MS))
    flags = ["-p", str(folder), "-c", str(path)] if front == "nginx" else ["-f", str(path)]
    command = program(front)
    assert command is not None
    with (folder / f"{front}.out").open("w") as out:
        process = subprocess.Popen([command, *flags], stdout=out, stderr=out)
    try:
        pool = Pool([port])
        deadline = time.monotonic() + LIMIT_S
        while not _answers(pool):
            assert process.poll() is None, (folder / f"{front}.out").read_text()
            assert time.monotonic() < deadline, f"{front} does not answer"
            time.sleep(0.05)
        yield pool
        pool.close()
    finally:
        process.terminate()
        process.wait(LIMIT_S)


def _answers(pool: Pool) -> bool:
    try:
        return pool.ask(b"x") == (200, b"x")
    except (OSError, http.client.HTTPException):
        return False


class Pair:
    """Two servers on two ports, one of which runs at any time, and for a while both."""

    def __init__(self, folder: Path):
        self.ports = (free_port(), free_port())
        store = folder / "store"
        store.mkdir()
        write_handler(store, "echo", ECHO)
        self._servers = []
        for i in range(2):
            (folder / str(i)).mkdir()
            server = Server(folder / str(i), store=store, cache=folder / "cache")
            server.environment["PYSERVE_DRAIN_DELAY_S"] = str(DRAIN_DELAY_S)
            self._servers.append(server)
        self._running = 0
        self._start(0)

    def _start(self, number: int) -> None:
        address = f"http://127.0.0.1:{self.ports[number]}"
        self._servers[number].start("--inference-address", address, "--models", "echo.mar")

    def restart(self) -> None:
        """Starts the other server, and then stops the one that ran."""
        old, new = self._running, 1 - self._running
        self._start(new)
        time.sleep(3 * CHECK_MS / 1000)  # as whoever rolls out waits until the new one is in rotation
        supervisor = psutil.Process(self._servers[old].running.pid)
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(LIMIT_S)
        self._running = new

    def close(self) -> None:
        for server in self._servers:
            server.run("stop")
            server.kill()


def run(fronts: Sequence[str], requests: int, restarts: int, folder: Path, seed: int) -> list[Clients]:
    """Restarts until there were ``restarts`` and each front has answered ``requests``."""
    with ExitStack() as stack:
        pair = Pair(folder)
        stack.callback(pair.close)
        clients = [
            stack.enter_context(Clients(front, stack.enter_context(opened(front, pair.ports, folder)), seed))
            for front in fronts
        ]
        done = 0
        while done < restarts or min(each.answered for each in clients) < requests:
            pair.restart()
            done += 1
            counts = ", ".join(f"{each.name} {each.answered} answered, {each.lost.total()} lost" for each in clients)
            print(f"restart {done}: {counts}", flush=True)
    return clients


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000, help="of each front, at least")
    parser.add_argument("--restarts", type=int, default=5, help="at least")
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=[each for each in FRONTS if not missing(each)])
    parser.add_argument("--seed", type=int, default=1)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clients = run(parsed.fronts, parsed.requests, parsed.restarts, Path(folder), parsed.seed)
    for each in clients:
        print(f"{each.name}: {each.answered} answered, {each.lost.total()} lost {dict(each.lost)}")
    return int(any(each.lost for each in clients))


if __name__ == "__main__":
    sys.exit(main())
