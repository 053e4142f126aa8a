"""What a call of gRPC costs beside a request of HTTP, of pyserve and of TorchServe, with a model that costs nothing.

    python bench/grpc_cost.py                                    # needs h2load (apt-get install nghttp2-client) and wrk
    python bench/grpc_cost.py --torchserve --rounds 3 --duration 4
    python bench/grpc_cost.py --against ../pyserve-before        # another checkout of pyserve in the same run

Each round starts every side in turn, every other round backwards. h2load is C; it takes any answer that HTTP calls 200
for a good one, so a client of grpcio's asks before and behind it and compares. CPU is that of all the server's
processes, per call.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import psutil

from bench import servers, wrk
from bench.servers import Server
from bench.sides import QUEUE_SIZE, environment_of, settings_for, torchserve_archive_for, with_environment
from bench.workloads import RAW_TYPE, Workload, free_model
from pyserve.grpc_api.messages import INFERENCE, OPEN_INFERENCE, message
from pyserve.load_test.report import machine

PREDICTIONS = f"/{INFERENCE}.InferenceAPIsService/Predictions"
MODEL_INFER = f"/{OPEN_INFERENCE}.GRPCInferenceService/ModelInfer"
WARM_UP_S = 2
_RATE = re.compile(r"finished in [^,]+, ([0-9.]+) req/s")
_STATUSES = re.compile(r"status codes: ([0-9]+) 2xx, ([0-9]+) 3xx, ([0-9]+) 4xx, ([0-9]+) 5xx")


def messages(load: Workload) -> dict[str, bytes]:
    """What is sent, by the method's path."""
    body = load.bodies[0]
    infer = message(f"{OPEN_INFERENCE}.ModelInferRequest")(model_name=load.name, raw_input_contents=[body])
    infer.inputs.add(name="input0", datatype="FP32", shape=[1, len(body) // 4])
    predict = message(f"{INFERENCE}.PredictionsRequest")(model_name=load.name, input={"data": body})
    return {PREDICTIONS: predict.SerializeToString(), MODEL_INFER: infer.SerializeToString()}


def ask(port: int, path: str, sent: bytes) -> bytes:
    """One call by grpcio; grpc.RpcError if it is refused."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer: bytes = channel.unary_unary(path)(sent, timeout=60, wait_for_ready=True)
        return answer


def h2load(port: int, path: str, sent: bytes, *, clients: int, duration_s: int) -> float:
    """Calls a second of ``clients`` connections with one call each. RuntimeError if one was no 200."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"\0" + len(sent).to_bytes(4, "big") + sent)
        file.flush()
        done = subprocess.run(
            ["h2load", "-c", str(clients), "-m", "1", "-t", "1", "-D", str(duration_s),
             "--warm-up-time", str(WARM_UP_S), "-d", file.name, "-H", "content-type: application/grpc",
             "-H", "te: trailers", f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=False,
        )  # fmt: skip
    rate, statuses = _RATE.search(done.stdout), _STATUSES.search(done.stdout)
    if rate is None or statuses is None or int(statuses[1]) == 0 or any(map(int, statuses.groups()[1:])):
        raise RuntimeError(f"h2load: {(done.stdout + done.stderr)[-800:]}")
    return float(rate[1])


def cpu_s(pid: int) -> float:
    """Of a process and all that it has started."""
    total = 0.0
    for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            used = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += used.user + used.system
    return total


class Run:
    """One run: what was measured of each side, a figure a round."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder = folder
        self.options = options
        self.load = free_model(folder)
        self.sent = messages(self.load)
        self.rates: dict[str, list[float]] = {}
        self.costs: dict[str, list[float]] = {}

    def sides(self) -> list[tuple[str, Any]]:
        sides: list[tuple[str, Any]] = [("pyserve", lambda: self._pyserve(servers.ROOT))]
        if self.options.against:
            sides.append(("before", lambda: self._pyserve(self.options.against.resolve())))
        if self.options.torchserve:
            sides.append(("TorchServe", self._torchserve))
        return sides

    @contextmanager
    def _pyserve(self, root: Path) -> Iterator[Server]:
        config = self.folder / "config.properties"
        config.write_text(f"job_queue_size={QUEUE_SIZE}\n")
        before, servers.ROOT = servers.ROOT, root
        path, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH", ""), str(root)
        try:
            with servers.pyserve(
                self.folder / "pyserve", [self.load.archives["fp32"]], "--ts-config", str(config),
                cache=self.folder / f"cache-{root.name}", with_grpc=True,
            ) as server:  # fmt: skip
                server.first_answer_s(self.load.name, self.load.bodies[0])
                yield server
        finally:
            servers.ROOT, os.environ["PYTHONPATH"] = before, path

    @contextmanager
    def _torchserve(self) -> Iterator[Server]:
        bin_folder = environment_of(self.options.environments, "torchserve", self.options.torch)
        archive = torchserve_archive_for(self.folder, bin_folder, self.load, 1, self.load.batch_size)
        variables = settings_for(self.load, 1, os.cpu_count() or 1)
        folder = self.folder / "torchserve"
        with with_environment(variables), servers.torchserve(folder, bin_folder, archive) as server:
            server.first_answer_s(self.load.name, self.load.bodies[0])
            yield server

    def round(self, sides: list[tuple[str, Any]]) -> None:
        for name, start in sides:
            with start() as server:
                for path, sent in self.sent.items():
                    if name == "TorchServe" and path == MODEL_INFER:
                        continue  # which it knows for handlers of the protocol only
                    expected = ask(server.grpc_port, path, sent)
                    load = partial(h2load, server.grpc_port, path, sent, clients=self.options.clients,
                                   duration_s=self.options.duration)  # fmt: skip
                    self.note(f"{name}, {path.rpartition('/')[2]}", server, load, self.options.duration + WARM_UP_S)
                    if ask(server.grpc_port, path, sent) != expected:
                        raise RuntimeError(f"{name}: another answer behind the load than before it")
                self.note(f"{name}, HTTP, raw", server, partial(self._http, server), self.options.duration)

    def _http(self, server: Server) -> float:
        report = wrk.measure(
            server.url(f"/predictions/{self.load.name}"), self.load.bodies, {"Content-Type": RAW_TYPE},
            clients=self.options.clients, duration_s=self.options.duration,
        )  # fmt: skip
        return float(report["rates"]["requests_per_s"])

    def note(self, label: str, server: Server, measure: Any, duration_s: float) -> None:
        began = cpu_s(server.pid)
        rate = measure()
        cost_us = (cpu_s(server.pid) - began) / (rate * duration_s) * 1e6
        self.rates.setdefault(label, []).append(rate)
        self.costs.setdefault(label, []).append(cost_us)
        print(f"{label}: {rate:.0f}/s, {cost_us:.1f} us of CPU", file=sys.stderr)

    def show(self) -> None:
        about = machine()
        print(f"\n{about['cpu']}, {about['cores']} cores; {self.options.rounds} rounds of {self.options.duration} s, "
              f"{self.options.clients} clients, h2load and wrk; {about['versions']}\n")  # fmt: skip
        print("| | calls/s | us of CPU per call |\n|---|---|---|")
        for label, rates in self.rates.items():
            spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            print(f"| {label} | {spread} | {statistics.median(self.costs[label]):.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=int, default=4, help="seconds of one load test (default: 4)")
    parser.add_argument("--torchserve", action="store_true", help="beside TorchServe, which needs Java")
    parser.add_argument("--against", type=Path, metavar="DIR", help="beside another checkout of pyserve, a built one")
    parser.add_argument("--environments", type=Path, default=Path(__file__).parent / "out" / "peers", metavar="DIR")
    parser.add_argument("--torch", default="torch==2.13.0", metavar="SPEC", help="TorchServe's")
    options = parser.parse_args()
    for tool in ("h2load", "wrk"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed: apt-get install nghttp2-client wrk")
    with tempfile.TemporaryDirectory(prefix="pyserve-grpc-") as folder:
        run = Run(Path(folder), options)
        sides = run.sides()
        for number in range(options.rounds):
            run.round(sides if number % 2 == 0 else sides[::-1])
    run.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
