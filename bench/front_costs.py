"""CPU time for each request of a model that costs nothing, of the engine process and of the front ends, with wrk.

    python bench/front_costs.py --rounds 3 --duration 2

Requests/s depend on what else the machine does, the CPU time of a process much less. Each round drives a server with
one front end, which is the engine process, and one with two, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil

from bench import wrk
from bench.servers import Server, pyserve

CLIENTS = 64
FLOATS = 16
HEAD_COUNT = 2048
US_PER_S = 1e6


def write_model(folder: Path) -> Path:
    """An archive whose network answers its input."""
    import torch

    from pyserve.archive.packing import ArchiverConfig, write_archive

    weights, yaml = folder / "nothing.pt", folder / "nothing.yaml"
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1, FLOATS)), str(weights))
    yaml.write_text(f"input: {{dtype: float32, shape: [{FLOATS}]}}\nbatchSize: 64\nmaxBatchDelay: 0\n")
    write_archive(ArchiverConfig(
        model_name="nothing", version="1.0", handler="tensor", serialized_file=str(weights), config_file=str(yaml),
        export_path=str(folder), force=True,
    ))  # fmt: skip
    return folder / "nothing.mar"


def loads() -> dict[str, tuple[str, bytes, dict[str, str], list[dict[str, str]]]]:
    """Name -> path, body, headers, further headers in turn."""
    numbers = np.random.default_rng(0).random(FLOATS, dtype=np.float32)
    raw, json_body = numbers.tobytes(), json.dumps([round(float(each), 4) for each in numbers]).encode()
    varied = [{"x-request-id": f"{n:08x}-0000", "traceparent": f"00-{n:032x}-{n:016x}-01"} for n in range(HEAD_COUNT)]
    entry = {"name": "x", "shape": [1, FLOATS], "datatype": "FP32", "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    octets, predictions = {"Content-Type": "application/octet-stream"}, "/predictions/nothing"
    as_json = {"Content-Type": "application/json"}
    in_json = b'{"inputs":[{"name":"x","shape":[1,%d],"datatype":"FP32","data":%b}]}' % (FLOATS, json_body)
    return {
        "raw": (predictions, raw, octets, [{}]),
        "raw, varied heads": (predictions, raw, octets, varied),
        "raw, with a time limit": (predictions, raw, {**octets, "x-request-timeout-ms": "60000"}, [{}]),
        "JSON": (predictions, json_body, as_json, [{}]),
        'JSON {"data": ...}': (predictions, b'{"data": %b}' % json_body, as_json, [{}]),
        'JSON {"instances": [...]}': ("/v1/models/nothing:predict", b'{"instances": [%b]}' % json_body, as_json, [{}]),
        "v2 JSON": ("/v2/models/nothing/infer", in_json, as_json, [{}]),
        "v2 binary": (
            "/v2/models/nothing/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}, [{}]
        ),
    }  # fmt: skip


def cpu_s(server: Server) -> dict[str, float]:
    """CPU seconds so far, of the engine process and of all front ends."""
    found = {"engine": 0.0, "front ends": 0.0}
    for process in psutil.Process(server.pid).children(recursive=True):
        command = " ".join(process.cmdline())
        name = "front ends" if "server.front_end" in command else "engine" if "server.main" in command else ""
        if name:
            times = process.cpu_times()
            found[name] += times.user + times.system
    return found


def measure(server: Server, duration_s: float, chosen: list[str]) -> dict[str, dict[str, float]]:
    """Load -> requests/s, and microseconds of CPU for each request of both kinds of processes."""
    results = {}
    for name, (path, body, headers, each) in loads().items():
        if chosen and name not in chosen:
            continue
        wrk.measure(server.url(path), [body], headers, clients=CLIENTS, duration_s=1, each=each)
        before = cpu_s(server)
        told = wrk.measure(server.url(path), [body], headers, clients=CLIENTS, duration_s=duration_s,
                           each=each)  # fmt: skip
        after = cpu_s(server)
        if told["requests"]["failed"]:
            raise RuntimeError(f"{name}: {told['requests']['failed']} requests failed")
        count = told["requests"]["ok"]
        results[name] = {key: (after[key] - before[key]) / count * US_PER_S for key in before}
        results[name]["requests/s"] = told["rates"]["requests_per_s"]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duration", type=float, default=2, help="s")
    parser.add_argument("--front-ends", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loads", nargs="+", default=[], metavar="LOAD", help="some of the rows of the table, by name")
    options = parser.parse_args()
    numbers: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="pyserve-front-costs-") as name:
        folder = Path(name)
        model = write_model(folder)
        for each_round in range(options.rounds):
            for count in options.front_ends if each_round % 2 == 0 else reversed(options.front_ends):
                with pyserve(folder / f"fronts{count}", [model], "--front-ends", str(count)) as server:
                    server.first_answer_s("nothing", np.zeros(FLOATS, np.float32).tobytes())
                    for load, found in measure(server, options.duration, options.loads).items():
                        numbers[load, count].append(found)
    show(numbers)
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    return 0


def show(numbers: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """A Markdown table of medians."""
    columns = ("engine", "front ends", "requests/s")
    print("| load | front_ends | engine, us of CPU | front ends, us of CPU | requests/s |\n|---|---|---|---|---|")
    for (load, count), found in sorted(numbers.items()):
        values: list[Any] = [statistics.median(each[column] for each in found) for column in columns]
        print(f"| {load} | {count} | {values[0]:.1f} | {values[1]:.1f} | {values[2]:,.0f} |")


if __name__ == "__main__":
    sys.exit(main())
