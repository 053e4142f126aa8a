"""The same over HTTP: raw float32, raw uint8 and JPEG, from one client to many, on one server and one worker each."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from bench.gpu_steps import archives
from bench.gpu_steps import device as on_device
from bench.gpu_steps.networks import build
from bench.gpu_steps.settings import Emit, Row, Settings
from bench.gpu_steps.truth import Truth, truth_of
from bench.servers import Server, pyserve
from pyserve.models.sample import write_sample_picture

ROOT = Path(__file__).resolve().parents[2]
BODIES = 16  # different ones, sent in turn
LEAST_S = 5.0
START_S = 40.0


def run(settings: Settings, emit: Emit) -> None:
    """A row per model and number of clients; the first answers are compared with eager torch."""
    device = on_device.accelerator()
    precision, batch = ("fp32", 4) if settings.tiny else ("fp16", 32)
    folder = settings.folder
    networks = [build(name, tiny=settings.tiny) for name in ("resnet50_uint8", "resnet50")]
    truths = {network.name: truth_of(network, precision, BODIES, device) for network in networks}
    models = [archives.tensors(folder, network, precision, batch) for network in networks]
    models.append(archives.pictures(folder, networks[1], precision, batch))
    if device.type == "cuda" and importlib.util.find_spec("torchvision") is not None:
        models.append(archives.pictures(folder, networks[1], precision, batch, on_device=True))
    bodies = {name: bodies_of(folder, name, truth.items) for name, truth in truths.items()}
    for path in models[2:]:
        bodies[path.stem] = [write_sample_picture(folder / "picture.jpg")]
    on_device.forget_peak(device)
    left_out = []
    with pyserve(folder / "server", models) as server:
        for name, paths in list(bodies.items()):
            row = started(server, name, paths, truths)
            emit({"model": name, **row})
            if "failed" in row:
                del bodies[name]
        for clients in (64, 1, 256) if not settings.tiny else (4, 1):
            for name, paths in bodies.items():
                if settings.left_s < LEAST_S:
                    left_out.append(f"{name}, {clients} clients")
                    continue
                emit({"model": name, "clients": clients, **loaded(settings, server, name, paths, clients)})
    if left_out:
        emit({"left_out": left_out})


def bodies_of(folder: Path, name: str, items: torch.Tensor) -> list[Path]:
    paths = []
    for number, item in enumerate(items):
        path = folder / f"{name}{number}.bin"
        path.write_bytes(item.numpy().tobytes())
        paths.append(path)
    return paths


def started(server: Server, name: str, paths: list[Path], truths: dict[str, Truth]) -> Row:
    """Waits for the first answer, and looks whether it is right and where it came from."""
    try:
        seconds = server.first_answer_s(name, paths[0].read_bytes(), START_S)
        row = {"first_answer_s": round(seconds, 2), **compared(server, name, paths, truths)}
        if not all(worker["gpu"] for worker in server.describe(name)["workers"]):
            row["failed"] = "it is served on the CPU"
    except Exception as error:  # the other models are measured
        row = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return row


def compared(server: Server, name: str, paths: list[Path], truths: dict[str, Truth]) -> Row:
    """Every body once; only raw answers hold numbers to compare."""
    truth = truths.get(name)
    if truth is None:
        return {}
    rows = []
    for path in paths:
        status, body = server.ask(
            "POST", server.inference_port, f"/predictions/{name}", path.read_bytes(),
            {"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        if status != 200:
            return {"failed": f"{status}: {body[:200].decode(errors='replace')}"}
        # In the model's precision, or as float32.
        dtype = torch.float32 if len(body) == 4 * truth.wanted.shape[1] else torch.float16
        rows.append(torch.frombuffer(bytearray(body), dtype=dtype))
    return {"error": truth.check(torch.stack(rows), list(range(len(rows)))), "allowed": truth.allowed}


def loaded(settings: Settings, server: Server, name: str, paths: list[Path], clients: int) -> Row:
    """One run of the load generator beside which the server's CPU time is counted."""
    result = settings.folder / "load.json"
    result.unlink(missing_ok=True)
    kind = "image/jpeg" if paths[0].suffix == ".jpg" else "application/octet-stream"
    command = [
        sys.executable, str(ROOT / "bench" / "latency.py"), "--url", server.url(f"/predictions/{name}"),
        "--content-type", kind, "--concurrency", str(clients), "--duration", "0.2" if settings.tiny else "2",
        "--warmup", "0.1s" if settings.tiny else "0.5s", "--processes", str(min(clients, generators(settings.tiny))),
        "--json", str(result), *(part for path in paths for part in ("--data", str(path))),
    ]  # fmt: skip
    before = cpu_s(server)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(settings.left_s, 1))
    used = cpu_s(server) - before
    if not result.exists():
        return {"failed": (done.stderr.strip().splitlines() or ["no result"])[-1][:200]}
    report = json.loads(result.read_text())
    row = {
        "items_per_s": round(report["rates"]["requests_per_s"], 1),
        "p50_ms": report["latency_ms"].get("p50"),
        "p99_ms": report["latency_ms"].get("p99"),
        "server_cpu_s": round(used, 2),
        "generator_cpu": round(report["generator_cpu_share"], 2),
    }
    if report["requests"]["failed"]:
        row["failed"] = f"{report['requests']['failed']} of {report['requests']['counted']}: {report['error_samples']}"[
            :200
        ]
    return row


def generators(tiny: bool) -> int:
    return 1 if tiny else max(1, (os.cpu_count() or 4) // 4)


def cpu_s(server: Server) -> float:
    """CPU seconds of the server's processes that live."""
    total = 0.0
    try:
        parent = psutil.Process(server.pid)
        for process in [parent, *parent.children(recursive=True)]:
            times = process.cpu_times()
            total += times.user + times.system
    except psutil.NoSuchProcess:
        pass
    return total
