"""pyserve beside other servers, all with the same TorchScript file, preprocessing and threads, in one run.

    python bench/compare.py                                   # everything; makes virtual environments for the peers
    python bench/compare.py nothing resnet18 --rounds 2 --duration 8
    python bench/compare.py nothing --peers mosec
    python bench/compare.py --all                             # beside PyTriton, Ray Serve, BentoML and MLServer, too
    python bench/compare.py resnet18 densenet161 bert memory first_start --peers --rounds 2 --duration 4

Each round starts every side in turn, every other round backwards, drives it with the same load generator, and stops
it; only one server runs at a time. Beside the servers stand two limits: the same work called directly in one process,
by each engine that is installed (bench/direct.py, bench/engines.py), and, for the model that costs nothing, a bare echo
(bench/echo.py). The method is in bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench import wrk
from bench.backend_costs import measure_first_start, measure_memory
from bench.direct_sides import DirectSides
from bench.engines import ENGINES
from bench.more_sides import MORE_SIDES
from bench.servers import Server, free_ports, pyserve
from bench.sides import (
    Side,
    binary_side,
    environment_of,
    litserve_side,
    mosec_side,
    pyserve_side,
    torchserve_archive_side,
    torchserve_side,
    versions_of,
)
from bench.verdict import Results, print_tables, save_plot
from bench.workloads import (
    BODIES,
    HEADS,
    JSON_TYPE,
    RAW_TYPE,
    SAME,
    WORKLOADS,
    Workload,
    test_pictures,
    varied_headers,
)
from pyserve.load_test.report import machine

BENCH = Path(__file__).parent
DEFAULT_PEERS = ("torchserve", "litserve", "mosec")
PEER_SIDES = {"torchserve": torchserve_side, "litserve": litserve_side, "mosec": mosec_side, **MORE_SIDES}
WORKERS = (1, 2)
MIX = {"nothing": "8", "resnet18": "4", "encoder": "8"}  # -> clients
COSTS = {"memory": measure_memory, "first_start": measure_first_start}
NAMES = (*WORKLOADS, "mix", *COSTS)
WARM_UP_S = 2.0
# Where a backend makes kernels for sizes that it meets, and is compiled anew beside the requests for another number of
# workers.
BACKEND_WARM_UP_S = 15.0
OPEN_LOOP_SHARES = (0.5, 0.8, 0.95)
# wrk begins without a request under way and leaves out those that are at the end: of every client one. Where that is
# more than one request of so many, the other generator measures, whose window opens and closes over a full pipe.
SHORT_REQUESTS = 200
# Answers come by batches. A window of only a few counts one more or less of them, by chance.
REQUESTS_MIN = 20  # of each client
WINDOW_MAX_S = 120.0


def request_s(report: dict[str, Any], duration_s: float) -> float:
    """The median of a run of ``duration_s``; as long as that if no answer came within it."""
    return report["latency_ms"]["p50"] / 1000 if report["requests"]["ok"] else duration_s


class Run:
    """Folder, peers and options of one run."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder = folder
        self.options = options
        self.cores = machine()["cores"]
        self.peers: dict[str, Path] = {}
        for name in peers_of(options):
            try:
                self.peers[name] = environment_of(options.environments, name, options.torch)
            except (RuntimeError, subprocess.SubprocessError) as error:
                print(f"{name} could not be installed and is left out: {error}", file=sys.stderr)
        self.results: Results = {}
        self.chosen: dict[str, str] = {}
        self.failures: list[str] = []
        self.generator = options.generator or ("wrk" if wrk.is_installed() else "python")

    def sides(self, load: Workload) -> list[Side]:
        if load.name == "megabyte":
            return [pyserve_side(self.folder, load, "fp32", 1), binary_side(self.folder, load)]
        if load.kind == "handler":
            return self.handler_sides(load)
        sides = [pyserve_side(self.folder, load, "fp32", workers) for workers in WORKERS]
        if load.kind == "floats":
            sides.append(pyserve_side(self.folder, load, "fp32", 1, wants_json=True))
        sides += [pyserve_side(self.folder, load, name, 2) for name in load.archives if name != "fp32"]
        if load.name == "bert":
            return sides  # it is measured beside engines
        for name, bin_folder in self.peers.items():
            if load.kind == "tokens" and name == "litserve":
                continue  # its numbers go as JSON, which is another comparison
            sides += [PEER_SIDES[name](self.folder, bin_folder, load, workers, self.cores) for workers in WORKERS]
        if load.kind == "floats" and "torchserve" in self.peers:  # as archives are, unless they say otherwise
            sides.append(torchserve_side(self.folder, self.peers["torchserve"], load, 1, self.cores, batch_size=1))
        return sides

    def handler_sides(self, load: Workload) -> list[Side]:
        """The same archives on both servers; no other server takes them."""
        sides = [pyserve_side(self.folder, load, name, 1) for name in load.archives]
        if "torchserve" in self.peers:
            bin_folder = self.peers["torchserve"]
            sides += [torchserve_archive_side(self.folder, bin_folder, load, name) for name in load.archives]
        return sides

    def measure(self, load: Workload) -> None:
        sides = self.sides(load)
        direct = None
        if load.network is not None:
            kept, only = self.options.out / "engines", tuple(self.options.engines)
            direct = DirectSides(
                load, self.folder, kept.absolute(), cores=self.cores, duration_s=self.options.duration, only=only
            )
        for number in range(self.options.rounds):
            for side in sides if number % 2 == 0 else list(reversed(sides)):
                try:
                    with side.start() as url:
                        for clients in self.clients(load):
                            self.drive_all(load, side, url, clients)
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    # The other sides' figures are not worth less for it.
                    print(f"{load.name}: {side.label} could not be measured: {error}", file=sys.stderr)
                    if side.name.startswith("pyserve"):
                        self.failures.append(f"{load.name}: {side.label}: {error}")
            if load.name == "megabyte":
                self.measure_copying(load)
            if load.kind == "floats":
                self.measure_echo(load)
            if direct is not None:
                self.measure_direct(load, direct)
        if load.kind == "picture":
            self.compare_classes(load)
        if load.name == "resnet18" and self.options.open_loop:
            self.open_loop(load)

    def clients(self, load: Workload) -> list[int]:
        """The numbers of clients to measure it with; all of its own if none of the wanted ones is among them."""
        return [each for each in load.clients if each in (self.options.clients or load.clients)] or list(load.clients)

    def drive_all(self, load: Workload, side: Side, url: str, clients: int) -> None:
        """Also with requests that differ, of the model that costs nothing; only wrk sends as many as there must be."""
        self.drive(load, side, url, clients)
        if load.name == "nothing" and side.name.startswith(("pyserve", "bare echo")) and self.generator == "wrk":
            for variant in (HEADS, BODIES):
                self.drive(load, side, url, clients, variant)

    def drive(self, load: Workload, side: Side, url: str, clients: int, variant: str = SAME) -> None:
        label = side.label_of(variant)
        bodies = load.varied_bodies(side.content_type == JSON_TYPE) if variant == BODIES else side.bodies
        report = self.closed_loop(side, url, clients, bodies, varied_headers() if variant else None)
        if side.chosen:
            self.chosen[f"{load.name}, {label}"] = side.chosen
        row = self.results.setdefault(load.name, {}).setdefault(label, {}).setdefault(str(clients), {})
        row.setdefault("rate", []).append(report["rates"]["requests_per_s"])
        row.setdefault("p50_ms", []).append(report["latency_ms"]["p50"])
        row.setdefault("p99_ms", []).append(report["latency_ms"]["p99"])
        row.setdefault("failed", []).append(report["requests"]["failed"])
        print(
            f"{load.name}: {label}, {clients} clients: {report['rates']['requests_per_s']:.2f}/s, "
            f"p50 {report['latency_ms']['p50']:.3f} ms, failed {report['requests']['failed']}",
            file=sys.stderr,
        )

    def closed_loop(
        self, side: Side, url: str, clients: int, bodies: list[bytes] | None = None,
        each: list[dict[str, str]] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Warmed up, then measured by wrk where it is installed and requests are short beside the measurement."""
        warm_up_s = WARM_UP_S if side.chosen in ("", "torchscript") else BACKEND_WARM_UP_S
        headers = dict(text.split(": ", 1) for text in side.flags[1::2])
        if side.content_type:
            headers["Content-Type"] = side.content_type
        if self.generator == "wrk":
            report = wrk.measure(url, bodies or side.bodies, headers, clients=clients, duration_s=warm_up_s, each=each)
            if request_s(report, warm_up_s) * SHORT_REQUESTS <= self.options.duration:
                return wrk.measure(
                    url, bodies or side.bodies, headers, clients=clients, duration_s=self.options.duration, each=each
                )
        flags = ("--concurrency", str(clients), *side.flags)
        report = self.latency(
            url, side.content_type, side.bodies, *flags, "--warmup", "0", "--duration", str(warm_up_s)
        )
        window_s = max(self.options.duration, min(WINDOW_MAX_S, REQUESTS_MIN * request_s(report, warm_up_s)))
        return self.latency(url, side.content_type, side.bodies, *flags, "--duration", str(window_s))

    def latency(self, url: str, content_type: str, bodies: list[bytes], *flags: str) -> dict[str, Any]:
        """One load test: its report."""
        return self.begin_latency(url, content_type, bodies, *flags)()

    def begin_latency(
        self, url: str, content_type: str, bodies: list[bytes], *flags: str
    ) -> Callable[[], dict[str, Any]]:
        """Starts a load test. What it returns waits for the report."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        out = folder / "latency.json"
        files = []
        for number, body in enumerate(bodies):
            path = folder / f"body-{number}"
            path.write_bytes(body)
            files += ["--data", str(path)]
        kind = ["--content-type", content_type] if content_type else []
        process = subprocess.Popen(
            [sys.executable, str(BENCH / "latency.py"), "--url", url, "--duration", str(self.options.duration),
             "--json", str(out), *files, *kind, *flags],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip

        def finish() -> dict[str, Any]:
            process.wait()
            report: dict[str, Any] = json.loads(out.read_text())
            return report

        return finish

    def measure_mix(self) -> None:
        """Three models in one server: each under load alone, then all at once."""
        loads = [WORKLOADS[name](self.folder) for name in MIX]
        config = self.folder / "config.properties"
        config.write_text("job_queue_size=2048\n")
        rows = self.results.setdefault("mix", {})
        with pyserve(
            self.folder / "mix", [load.archives["fp32"] for load in loads], "--ts-config", str(config),
            cache=self.folder.parent / "cache",
        ) as server:  # fmt: skip
            for load in loads:
                server.first_answer_s(load.name, load.bodies[0])
            for _ in range(self.options.rounds):
                for together in (False, True):
                    waiting = []
                    for load in loads:
                        kind = RAW_TYPE if load.kind != "picture" else ""
                        finish = self.begin_latency(server.url(f"/predictions/{load.name}"), kind, load.bodies,
                                                    "--concurrency", MIX[load.name], "--warmup", "2s")  # fmt: skip
                        waiting.append((load, finish))
                        if not together:
                            self.note_mix(rows, "alone", waiting)
                    self.note_mix(rows, "at once", waiting)

    @staticmethod
    def note_mix(rows: Any, how: str, waiting: list[tuple[Workload, Callable[[], dict[str, Any]]]]) -> None:
        while waiting:
            load, finish = waiting.pop()
            report = finish()
            row = rows.setdefault(f"{load.name}, {how}", {}).setdefault(MIX[load.name], {})
            row.setdefault("rate", []).append(report["rates"]["requests_per_s"])
            row.setdefault("p50_ms", []).append(report["latency_ms"]["p50"])
            row.setdefault("p99_ms", []).append(report["latency_ms"]["p99"])
            row.setdefault("failed", []).append(report["requests"]["failed"])
            print(f"mix: {load.name} {how}: {report['rates']['requests_per_s']:.2f}/s", file=sys.stderr)

    def measure_echo(self, load: Workload) -> None:
        side = Side("bare echo", 0, echo, "", load.bodies)
        with side.start() as url:
            for clients in self.clients(load):
                self.drive_all(load, side, url, clients)

    def measure_direct(self, load: Workload, direct: DirectSides) -> None:
        """The same work in one process, by every engine at its best split of the threads."""
        for label, rate, remark in direct.measure():
            row = self.results.setdefault(load.name, {}).setdefault(label, {}).setdefault(str(load.clients[0]), {})
            row.setdefault("rate", []).append(rate)
            print(f"{load.name}: {label}: {rate:.2f}/s ({remark})", file=sys.stderr)

    def measure_copying(self, load: Workload) -> None:
        """How many requests a core could copy: into the server, into a batch or an answer, and out of the server."""
        body = np.frombuffer(load.bodies[0], np.uint8)
        places = np.zeros((64, body.size), np.uint8)  # more than the caches hold
        began = time.perf_counter()
        for _ in range(20):
            for place in places:
                np.copyto(place, body)
        copy_s = (time.perf_counter() - began) / (20 * len(places))
        rates = {("three copies in memory", 1): 1 / (3 * copy_s)}
        for clients in self.clients(load):
            out = subprocess.run(
                [sys.executable, str(BENCH / "sockets.py"), "--size", str(body.size), "--clients", str(clients),
                 "--duration", str(self.options.duration)], check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            rates["the same bytes over bare sockets", clients] = float(out)
        for (label, clients), rate in rates.items():
            row = self.results[load.name].setdefault(label, {}).setdefault(str(clients), {})
            row.setdefault("rate", []).append(rate)
            print(f"{load.name}: {label}, {clients} clients: {rate:.2f}/s", file=sys.stderr)

    def compare_classes(self, load: Workload) -> None:
        """On how many pictures the most probable class is the same in each precision as in fp32."""
        found: dict[str, list[str]] = {}
        pictures = test_pictures(self.folder)
        for name in load.precisions:
            side = pyserve_side(self.folder, load, name, 1)
            try:
                with side.start() as url:
                    parts = urlsplit(url)
                    server = Server(parts.port or 80, 0, 0.0)
                    answers = [server.ask("POST", server.inference_port, parts.path, picture) for picture in pictures]
                    found[name] = [next(iter(json.loads(body))) for _, body in answers]
            except (RuntimeError, OSError) as error:
                self.failures.append(f"{load.name}: classes of {name}: {error}")
        for name in found.keys() - {"fp32"}:
            equal = sum(one == other for one, other in zip(found["fp32"], found[name], strict=True))
            rows = self.results.setdefault(f"{load.name}, classes", {})
            rows[f"{name} as fp32"] = {"": {"share": [equal / len(pictures)]}}
            print(
                f"{load.name}: the most probable class is the same in {name} on {equal} of {len(pictures)} pictures",
                file=sys.stderr,
            )

    def open_loop(self, load: Workload) -> None:
        """At shares of the peak that the closed loop has just measured."""
        side = pyserve_side(self.folder, load, "fp32", 2)
        peak = statistics.median(self.results[load.name][side.label][str(load.clients[0])]["rate"])
        rows = self.results.setdefault(f"{load.name}, open loop", {})
        with side.start() as url:
            for share in OPEN_LOOP_SHARES:
                report = self.latency(
                    url,
                    side.content_type,
                    side.bodies,
                    "--rate",
                    f"{peak * share:.3f}",
                    "--arrivals",
                    "poisson",
                    "--duration",
                    str(4 * self.options.duration),
                )
                rows[f"{share:.0%} of the peak"] = {
                    "open": {
                        **{f"{key}_ms": [report["latency_ms"][key]] for key in ("p50", "p99", "p99.9")},
                        "rate": [report["rates"]["requests_per_s"]],
                        "failed": [report["requests"]["failed"]],
                    }
                }


@contextmanager
def echo() -> Iterator[str]:
    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, str(BENCH / "echo.py"), "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def wait_for_port(port: int, limit_s: float = 60) -> None:
    """Returns once somebody accepts there. Raises OSError if nobody does within ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=limit_s).close()
            return
        except OSError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.05)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"any of {', '.join(NAMES)}; default: all")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(DEFAULT_PEERS),
        metavar="PEER",
        help=f"any of {', '.join(PEER_SIDES)}; default: {', '.join(DEFAULT_PEERS)}",
    )
    parser.add_argument("--all", action="store_true", help=f"these as well: {', '.join(MORE_SIDES)}")
    parser.add_argument(
        "--environments",
        type=Path,
        default=BENCH / "out" / "peers",
        metavar="DIR",
        help="where the peers' virtual environments are kept (default: %(default)s)",
    )
    parser.add_argument("--torch", default="torch==2.13.0", metavar="SPEC", help="the peers' (default: %(default)s)")
    parser.add_argument(
        "--engines", nargs="*", default=[], choices=ENGINES, metavar="ENGINE",
        help=f"called directly, any of {', '.join(ENGINES)}; default: all that are installed",
    )  # fmt: skip
    parser.add_argument(
        "--generator", choices=("wrk", "python"), help="of the closed loop; default: wrk where it is installed"
    )
    parser.add_argument(
        "--open-loop", action=argparse.BooleanOptionalAction, default=True, help="resnet18 at shares of its peak, too"
    )
    parser.add_argument("--clients", type=int, nargs="+", metavar="N", help="only these numbers of clients")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--duration", type=float, default=10, help="seconds of one load test (default: 10)")
    parser.add_argument(
        "--out",
        type=Path,
        default=BENCH / "out",
        metavar="DIR",
        help="for compare.json and compare.png (default: %(default)s)",
    )
    return parser


def peers_of(options: argparse.Namespace) -> list[str]:
    """Whom to measure beside pyserve, each once."""
    return list(dict.fromkeys([*options.peers, *(MORE_SIDES if options.all else ())]))


def main() -> int:
    parser = build_parser()
    options = parser.parse_args()
    for what, given, known in (("workload", options.workloads, NAMES), ("peer", options.peers, PEER_SIDES)):
        if unknown := set(given) - set(known):
            parser.error(f"no {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    told = {
        "machine": machine(),
        "load_average_before": os.getloadavg(),
        "rounds": options.rounds,
        "duration_s": options.duration,
        "at": time.strftime("%FT%TZ", time.gmtime()),
    }
    with tempfile.TemporaryDirectory(prefix="pyserve-compare-") as folder:
        run = Run(Path(folder), options)
        told["peers"] = {name: versions_of(bin_folder, name) for name, bin_folder in run.peers.items()}
        for name in options.workloads or NAMES:
            work = Path(folder) / name
            work.mkdir()
            run.folder = work
            if name == "mix":
                run.measure_mix()
            elif name in COSTS:
                try:
                    COSTS[name](run)
                except RuntimeError as error:
                    run.failures.append(f"{name}: {error}")
            else:
                run.measure(WORKLOADS[name](work))
    told |= {"generator": run.generator, "chosen": run.chosen, "failures": run.failures}
    print_tables(told, run.results)
    for failure in run.failures:
        print(f"\nfailed: {failure}", file=sys.stderr)
    (options.out / "compare.json").write_text(json.dumps({**told, "results": run.results}, indent=1) + "\n")
    save_plot(run.results, options.out / "compare.png")
    print(f"\nwritten: {options.out / 'compare.json'}, {options.out / 'compare.png'}", file=sys.stderr)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
