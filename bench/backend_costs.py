"""What backends cost beside their speed, for `bench/compare.py`: memory, and the first start of an archive."""

from __future__ import annotations

import http.client
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.servers import Server, pyserve, resident_mb
from bench.workloads import backend_archives, pictures

if TYPE_CHECKING:
    from bench.compare import Run

CLIENTS = 8
LOAD_S = 8.0  # before memory is read
# They leave cores to what is made behind the requests, which has the lowest priority: beside a server that never rests
# it would take hours.
FIRST_START_CLIENTS = 2
FIRST_START_PAUSE_S = 0.5
SETTLED_TIMEOUT_S = 600.0


def measure_memory(run: Run, network: str = "densenet161") -> None:
    """Resident memory after load with 1 and 4 workers, of every backend, each in a server of its own."""
    load = pictures(network, run.folder, ("fp32",))
    rows = run.results.setdefault("memory", {})
    for _ in range(run.options.rounds):
        for backend, archive in backend_archives(load, run.folder).items():
            for workers in (1, 4):
                folder = run.folder / "memory"
                with pyserve(folder, [archive], cache=run.folder.parent / "cache") as server:
                    server.first_answer_s(archive.stem, load.bodies[0], SETTLED_TIMEOUT_S)
                    chosen = server.chosen_backend(archive.stem)
                    if chosen not in ("", backend):
                        run.failures.append(f"memory: {backend} is served as {chosen}")
                        break
                    server.set(archive.stem, f"min_worker={workers}&max_worker={workers}")
                    with Clients(server, archive.stem, load.bodies[0], CLIENTS):
                        time.sleep(min(LOAD_S, 2 * run.options.duration))
                    # The handover names the server process's part: same folder, torch loaded.
                    used = resident_mb("pyserve.server.main")
                label = f"{backend}, {workers} worker{'s' if workers > 1 else ''}"
                rows.setdefault(label, {}).setdefault("", {}).setdefault("mb", []).append(used)
                print(f"memory: {label}: {used:.0f} MB", file=sys.stderr)


def measure_first_start(run: Run, network: str = "densenet161") -> None:
    """An eager archive that was packed elsewhere: to its first 200, and under load until another backend serves it."""
    from pyserve.commands.example import write_example
    from pyserve.models.sample import write_sample_picture

    body = write_sample_picture(run.folder / "picture.jpg").read_bytes()
    archive = write_example(network, run.folder / "store")
    rows = run.results.setdefault("first_start", {})
    config = run.folder / "config.properties"
    config.write_text("default_backend=auto\n")
    for number in range(run.options.rounds):
        with pyserve(
            run.folder / "start", [archive], "--ts-config", str(config), cache=run.folder / f"cache-{number}"
        ) as server:
            note(rows, "first 200", s=server.first_answer_s(network, body))
            with Clients(server, network, body, FIRST_START_CLIENTS, FIRST_START_PAUSE_S) as clients:
                run.chosen["first_start"] = server.chosen_backend(network, SETTLED_TIMEOUT_S)
                settled_s = time.perf_counter() - server.started_at
            note(rows, "until it was exchanged", s=settled_s, **clients.told())
            with Clients(server, network, body, FIRST_START_CLIENTS) as clients:
                time.sleep(run.options.duration)
            note(rows, "after it", **clients.told())
            note(rows, "first 200 of a second start", s=second_start_s(run, archive, number, body))


def second_start_s(run: Run, archive: Path, number: int, body: bytes) -> float:
    """Seconds to the first 200 once everything is kept."""
    with pyserve(
        run.folder / "again",
        [archive],
        "--ts-config",
        str(run.folder / "config.properties"),
        cache=run.folder / f"cache-{number}",
    ) as server:
        return server.first_answer_s(archive.stem, body)


def note(rows: dict[str, dict[str, dict[str, list[float]]]], label: str, **measured: float) -> None:
    row = rows.setdefault(label, {}).setdefault("", {})
    for key, value in measured.items():
        row.setdefault(key, []).append(value)
    said = ", ".join(f"{key} {value:.3g}" for key, value in measured.items())
    print(f"first_start: {label}: {said}", file=sys.stderr)


class Clients:
    """Some clients that post one body, one request after the other, as long as the block runs.

    ``bench/latency.py`` has to know beforehand for how long; here that is found out meanwhile. Each rests ``pause_s``
    seconds after an answer.
    """

    def __init__(self, server: Server, model: str, body: bytes, count: int, pause_s: float = 0):
        self._server = server
        self._path = f"/predictions/{model}"
        self._body = body
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._post, daemon=True) for _ in range(count)]
        self._began = self._ended = 0.0
        self.ok = self.failed = 0

    def __enter__(self) -> Clients:
        self._began = time.perf_counter()
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over.set()
        for each in self._threads:
            each.join()
        self._ended = time.perf_counter()

    def _post(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._server.inference_port, timeout=120)
        while not self._is_over.is_set():
            try:
                connection.request("POST", self._path, self._body)
                response = connection.getresponse()
                response.read()
                is_ok = response.status == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                is_ok = False
            with self._lock:
                self.ok += is_ok
                self.failed += not is_ok
            self._is_over.wait(self._pause_s if is_ok else max(0.05, self._pause_s))
        connection.close()

    def told(self) -> dict[str, float]:
        """Rate of the answers, failures, and the share that was answered; once the block is over."""
        asked = self.ok + self.failed
        return {
            "rate": self.ok / (self._ended - self._began),
            "failed": self.failed,
            "share": self.ok / asked if asked else 0.0,
        }
