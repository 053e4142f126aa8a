"""Where the CPU time of a raw request goes, outside of the model: microseconds per request and stage.

    python bench/stages.py --concurrency 64 --duration 5
    python bench/stages.py --varied                        # every head differs, as those of real clients do

The server runs inside of this process, with a model that costs nothing, and is asked by wrk, or by bench/latency.py
where that is not installed. The stages of
the event loop's thread are measured with that thread's own CPU clock around the calls that make them up; reading the
clock costs about as much as some stages do, so every number is shown less what the clock itself takes. The workers'
stages are the engine's own counters. What is left of the process's CPU time is the event loop itself, with the
system calls that it waits in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import uvloop

from bench import wrk
from bench.workloads import RAW_TYPE, Workload, free_model, varied_headers

BENCH = Path(__file__).parent
STAGES = ("parse", "route", "admit", "submit", "announce", "complete", "encode", "write")


class Stage:
    """CPU time of the calling thread inside of one kind of call, without what nested stages take."""

    running: list[Stage] = []
    calls = 0

    def __init__(self) -> None:
        self.total_ns = 0
        self.count = 0
        self._since = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        clock, running = time.thread_time_ns, Stage.running

        def measured(*args: Any, **kwargs: Any) -> Any:
            now = clock()
            if running:
                outer = running[-1]
                outer.total_ns += now - outer._since
            running.append(self)
            self.count += 1
            self._since = clock()
            try:
                return function(*args, **kwargs)
            finally:
                now = clock()
                self.total_ns += now - self._since
                running.pop()
                if running:
                    running[-1]._since = clock()

        return measured


def clock_cost_ns() -> float:
    """What one reading of the thread's clock adds to the stage it is read in."""
    clock = time.thread_time_ns
    count = 100_000
    began = clock()
    for _ in range(count):
        clock()
    return (clock() - began) / count


def instrument() -> dict[str, Stage]:
    """Puts a stage around the calls that belong to it. Of this process, for good."""
    from pyserve.api.routes import Router
    from pyserve.http1.answer import AnswerWriter
    from pyserve.http1.protocol import Http1Protocol
    from pyserve.lanes.engine_lane import EngineLane
    from pyserve.lanes.native import NativeLane

    stages = {name: Stage() for name in STAGES}
    for owner, method, name in (
        (Http1Protocol, "data_received", "parse"), (Router, "__call__", "route"), (EngineLane, "predict", "admit"),
        (NativeLane, "begin", "submit"), (NativeLane, "_announce", "announce"), (NativeLane, "complete", "complete"),
        (Http1Protocol, "_on_answer", "write"), (AnswerWriter, "encode", "encode"),
    ):  # fmt: skip
        setattr(owner, method, stages[name].around(getattr(owner, method)))
    return stages


async def serve(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serves the model and drives it. Returns what was counted between two moments of the load."""
    from concurrent.futures import ThreadPoolExecutor

    from pyserve.api.coded_bodies import CodedBodies
    from pyserve.api.inference import Inference
    from pyserve.api.routes import Router
    from pyserve.archive.archive import open_archive
    from pyserve.config.config import Config
    from pyserve.config.model_source import ModelSource
    from pyserve.cpu_budget import cpu_budget
    from pyserve.engine import Engine
    from pyserve.http1.connections import Connections
    from pyserve.http1.limits import Http1Limits
    from pyserve.http1.protocol import Http1Protocol
    from pyserve.lanes.resources import Services
    from pyserve.lanes.spawner import Spawner
    from pyserve.models.registry import Registry
    from pyserve.request.body_budget import BodyBudget
    from pyserve.request.messages import ErrorFormat
    from pyserve.telemetry.metrics import Metrics

    load = free_model(folder)
    archive = str(load.archives["fp32"])
    loop = asyncio.get_running_loop()
    spawner = Spawner()
    engine = Engine(loop, cpu_budget())
    config = Config(job_queue_size=2048)
    services = Services(config, engine, Metrics(torch_version=""), ThreadPoolExecutor(1), spawner, ErrorFormat())
    registry = Registry(services)
    await registry.load_at_start([ModelSource(None, archive)], {archive: open_archive(archive)}, {})
    stages = instrument()
    limits = Http1Limits()
    budget = BodyBudget(limits.body_budget_size)
    bodies = CodedBodies(limits.body_size_max, budget, ThreadPoolExecutor(1))
    router = Router(Inference(registry, bodies).routes())
    connections = Connections(limits, budget)
    server = await loop.create_server(lambda: Http1Protocol(router, limits, connections), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    asked = asyncio.ensure_future(ask(f"http://127.0.0.1:{port}/predictions/nothing", folder, load, options))
    await asyncio.sleep(2.5)
    model = registry.get("nothing")
    before = snapshot(model, stages)
    await asyncio.sleep(options.duration)
    after = snapshot(model, stages)
    report = await asked
    server.close()
    await registry.drain()
    await spawner.close()
    engine.close()
    return {key: after[key] - before[key] for key in after} | {
        "requests_per_s": report["rates"]["requests_per_s"],
        "failed": report["requests"]["failed"],
    }


async def ask(url: str, folder: Path, load: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Drives the server for three seconds more than are counted: the generator's report."""
    duration_s = options.duration + 3
    if wrk.is_installed():
        return await asyncio.to_thread(
            wrk.measure, url, load.bodies, {"Content-Type": RAW_TYPE}, clients=options.concurrency,
            duration_s=duration_s, each=varied_headers() if options.varied else None,
        )  # fmt: skip
    body, out = folder / "body", folder / "report.json"
    body.write_bytes(load.bodies[0])
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(BENCH / "latency.py"), "--url", url, "--data", str(body), "--content-type", RAW_TYPE,
        "--concurrency", str(options.concurrency), "--duration", str(duration_s), "--warmup", "0", "--json", str(out),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    await process.wait()
    report: dict[str, Any] = json.loads(out.read_text())
    return report


def snapshot(model: Any, stages: dict[str, Stage]) -> dict[str, float]:
    """Counters that only grow."""
    counters = {f"{name} ns": float(stage.total_ns) for name, stage in stages.items()}
    counters |= {f"{name} calls": float(stage.count) for name, stage in stages.items()}
    stats = model.stats()
    used = psutil.Process().cpu_times()
    return counters | {
        "requests": float(stats["submitted"]), "batches": float(stats["batches"]),
        "staging s": stats["staging"][2], "inference s": stats["inference"][2],
        "process s": used.user + used.system, "loop s": time.thread_time(),
    }  # fmt: skip


def show(counted: dict[str, Any], cost_ns: float) -> None:
    requests = counted["requests"]
    print(
        f"{requests:.0f} requests in {counted['batches']:.0f} batches, {counted['requests_per_s']:.0f} requests/s "
        f"(slower than without the clocks), {counted['failed']} failed\n\n| stage | us per request |\n|---|---|"
    )
    known = 0.0
    for name in STAGES:
        net_ns = max(0.0, counted[f"{name} ns"] - counted[f"{name} calls"] * 2 * cost_ns)
        known += net_ns
        print(f"| {name} | {net_ns / requests / 1e3:.2f} |")
    clocks_ns = sum(counted[f"{name} calls"] for name in STAGES) * 4 * cost_ns
    rest_ns = max(0.0, counted["loop s"] * 1e9 - known - clocks_ns)
    print(f"| the loop itself: reading sockets, epoll, draining completions | {rest_ns / requests / 1e3:.2f} |")
    print(f"| worker: gather a batch | {counted['staging s'] / requests * 1e6:.2f} |")
    print(f"| worker: the model, which costs nothing | {counted['inference s'] / requests * 1e6:.2f} |")
    other = counted["process s"] - counted["loop s"] - counted["staging s"] - counted["inference s"]
    print(f"| worker: taking batches, waking up, handing over | {max(0.0, other) / requests * 1e6:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--duration", type=float, default=5.0, help="seconds that are counted (default: 5)")
    parser.add_argument("--varied", action="store_true", help="every head differs; needs wrk")
    options = parser.parse_args()
    if options.varied and not wrk.is_installed():
        parser.error("wrk is not installed, which alone sends heads that differ")
    with tempfile.TemporaryDirectory(prefix="pyserve-stages-") as folder:
        counted = uvloop.run(serve(Path(folder), options))
    show(counted, clock_cost_ns())
    return 0


if __name__ == "__main__":
    sys.exit(main())
