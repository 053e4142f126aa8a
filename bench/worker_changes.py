"""Answers while a model's workers are changed: how many a second before, during and after, in steps of half a second.

    python bench/worker_changes.py                                   # resnet18 on OpenVINO, 1 -> 4 -> 2 -> 1 workers
    python bench/worker_changes.py --backend torchscript --workers 1 4 1

8 clients post a picture, one request after the other. For another number of workers OpenVINO's model is compiled anew
beside the requests, which takes of the CPUs what it takes. So each step says how many cores the server used as well:
where these are fewer than before the change, requests waited for something else, or other processes had the CPUs.
Answers per core second can be compared then, as far as nothing is compiled. The longest wait is between two answers,
whoever got them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from bench.backend_costs import SETTLED_TIMEOUT_S, Clients
from bench.servers import Server, pyserve
from bench.worker_memory import CLIENTS, archive_of
from pyserve.models.sample import write_sample_picture

STEP_S = 0.5
LOOK_S = 0.005


def main() -> int:
    """Prints a table for each change. Returns 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="as `pyserve example` names them")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4, 2, 1])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="before each change, and after its beginning")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "cache")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = archive_of(folder, options.backend, options.network, options.batch_size)
        body = write_sample_picture(folder / "picture.jpg").read_bytes()
        with pyserve(folder / "server", [archive], cache=options.cache.absolute()) as server:
            server.first_answer_s(archive.stem, body, SETTLED_TIMEOUT_S)
            if (chosen := server.chosen_backend(archive.stem)) != options.backend:
                print(f"it is served on {chosen}", file=sys.stderr)
                return 1
            server.set(archive.stem, f"min_worker={options.workers[0]}&max_worker={options.workers[0]}")
            with Clients(server, archive.stem, body, CLIENTS) as clients:
                time.sleep(options.seconds)  # what the first number of workers is compiled for
                for before, after in zip(options.workers, options.workers[1:], strict=False):
                    print(f"\n{before} -> {after} workers")
                    change(server, clients, archive.stem, after, options.seconds)
            print(f"\n{clients.ok} answered, {clients.failed} failed")
            return 1 if clients.failed else 0


@dataclass
class Steps:
    """What was seen of the clients, step by step.

    Attributes:
        rows: of each step its seconds, its answers, the core seconds that the server used, and the longest wait for an
            answer that ended or went on in it, in seconds.
    """

    server: Server
    clients: Clients
    rows: list[tuple[float, int, float, float]] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)

    def look(self, count: int) -> None:
        """Looks on for ``count`` steps."""
        for _ in range(count):
            began, ok, used = time.perf_counter(), self.clients.ok, cpu_s(self.server)
            seen, longest = ok, 0.0
            while (now := time.perf_counter()) - began < STEP_S:
                longest = max(longest, now - self._last)
                if self.clients.ok != seen:
                    self._last, seen = now, self.clients.ok
                time.sleep(LOOK_S)
            self.rows.append((now - began, seen - ok, cpu_s(self.server) - used, longest))


def change(server: Server, clients: Clients, model: str, workers: int, seconds: float) -> None:
    """Prints the steps before and after ``min_worker`` is set."""
    count = int(seconds / STEP_S)
    before, after = Steps(server, clients), Steps(server, clients)
    before.look(count)
    setting = threading.Thread(target=server.set, args=(model, f"min_worker={workers}&max_worker={workers}"))
    after._last = before._last
    setting.start()
    after.look(2 * count)
    setting.join()
    rate = rate_of(before.rows)
    print(
        "| s | answers/s | of before | cores | answers per core second | longest wait, ms |\n|---|---|---|---|---|---|"
    )
    print(row("before", before.rows, rate))
    print(row(f"the {2 * seconds:g} s after", after.rows, rate))
    for number, each in enumerate(after.rows):
        print(row(f"{number * STEP_S:.1f}", [each], rate))


def rate_of(rows: list[tuple[float, int, float, float]]) -> float:
    """Answers per second."""
    return sum(each[1] for each in rows) / sum(each[0] for each in rows)


def row(label: str, rows: list[tuple[float, int, float, float]], before: float) -> str:
    """A line of the table, of some steps together."""
    seconds, answers, used = (sum(each[place] for each in rows) for place in range(3))
    share = f"{answers / seconds / before:.2f}" if before else ""
    return (f"| {label} | {answers / seconds:.1f} | {share} | {used / seconds:.2f} | {answers / max(used, 1e-3):.1f} "
            f"| {max(each[3] for each in rows) * 1e3:.0f} |")  # fmt: skip


def cpu_s(server: Server) -> float:
    """Of all processes of the server, seconds of one core."""
    root = psutil.Process(server.pid)
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue  # it has ended
        total += times.user + times.system
    return total


if __name__ == "__main__":
    sys.exit(main())
