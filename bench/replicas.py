"""A replica of Ray Serve, asked directly, through HAProxy and through Ray's proxy, beside a bare `@serve.batch`.

    python bench/replicas.py                                 # some three minutes a round
    python bench/replicas.py --rounds 3 --duration 8 --json run.json

One replica with one CPU and the model that costs nothing, requests of raw floats, in a closed loop by wrk; in each
round every side once, one after another. CPU per request is that of all processes of the side, Ray's own among them.
Needs `pip install '.[ray]' psutil` and wrk. HAProxy comes with ray[serve].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import psutil

from bench import wrk
from bench.grpc_cost import cpu_s
from bench.replica_site import KEY
from bench.servers import free_ports
from bench.workloads import Workload, free_model

SITE = Path(__file__).with_name("replica_site.py")
WAYS = {
    "direct": "pyserve, the replica's own port",
    "haproxy": "pyserve, through HAProxy",
    "proxy": "pyserve, through Ray's proxy",
    "batch haproxy": "@serve.batch, through HAProxy",
    "batch proxy": "@serve.batch, through Ray's proxy",
}
RAW = "application/octet-stream"


@contextmanager
def site(way: str, load: Workload) -> Iterator[tuple[int, int]]:
    """Its port and its process, which has answered one request."""
    [port] = free_ports(1)
    command = [sys.executable, str(SITE), way, str(port), str(load.archives["fp32"]), str(load.model)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as popen,
    ):
        assert popen.stdout is not None and popen.stdin is not None
        try:
            if not any(line == "ready\n" for line in popen.stdout):  # Ray prints there, too
                log.seek(0)
                raise RuntimeError(f"{way} did not start:\n{log.read()[-3000:]}")
            yield port, popen.pid
        finally:
            started = psutil.Process(popen.pid).children(recursive=True) if popen.poll() is None else []
            popen.stdin.close()
            try:
                popen.wait(90)
            except subprocess.TimeoutExpired:
                popen.kill()
            for left in psutil.wait_procs(started, timeout=10)[1]:
                left.kill()


def measure(way: str, load: Workload, clients: list[int], duration_s: float) -> Iterator[tuple[int, dict[str, float]]]:
    """For each number of clients requests per second, p50 in ms and CPU per request in us.

    Raises:
        RuntimeError: a request was not answered.
    """
    path = "/" if way.startswith("batch") else f"/predictions/{load.name}"
    headers = {"Content-Type": RAW, "Authorization": f"Bearer {KEY}"}
    with site(way, load) as (port, pid):
        for count in clients:
            found = []
            for seconds in (4.0, duration_s):  # the first is a warm-up
                began = cpu_s(pid)
                report = wrk.measure(f"http://127.0.0.1:{port}{path}", load.bodies, headers, clients=count,
                                     duration_s=seconds)  # fmt: skip
                found.append((report, cpu_s(pid) - began))
            report, used = found[-1]
            answered, failed = report["requests"]["ok"], report["requests"]["failed"]
            if failed or not answered:
                raise RuntimeError(f"{way}: {answered} requests were answered and {failed} were not")
            yield count, {"rate": report["rates"]["requests_per_s"], "p50_ms": report["latency_ms"]["p50"],
                          "cpu_us": used / answered * 1e6}  # fmt: skip


def print_table(results: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    print(f"\n{'':<36}{'clients':>8}{'requests/s':>12}{'p50 ms':>9}{'CPU us':>8}   per round")
    for way, by_clients in results.items():
        for clients, rounds in by_clients.items():
            middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            each = ", ".join(f"{one['rate']:,.0f}" for one in rounds)
            print(f"{WAYS[way]:<36}{clients:>8}{middle['rate']:>12,.0f}{middle['p50_ms']:>9.2f}{middle['cpu_us']:>8.0f}"
                  f"   {each}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--duration", type=float, default=6.0, help="s of each measurement")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not wrk.is_installed():
        sys.exit("wrk is not installed: apt-get install wrk")
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="pyserve-replicas-") as folder:
        load = free_model(Path(folder))
        for number in range(options.rounds):
            for way in options.ways:
                for clients, found in measure(way, load, options.clients, options.duration):
                    results.setdefault(way, {}).setdefault(str(clients), []).append(found)
                    print(f"round {number + 1}, {WAYS[way]}, {clients} clients: {found['rate']:,.0f}/s, "
                          f"{found['p50_ms']:.2f} ms, {found['cpu_us']:.0f} us; load {os.getloadavg()[0]:.1f}",
                          flush=True)  # fmt: skip
    print_table(results)
    if options.json:
        about: dict[str, Any] = {"duration_s": options.duration, "results": results}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
