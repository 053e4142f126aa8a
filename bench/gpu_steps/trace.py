"""A trace of the device while the engine is under load: how long it idles, and whether copies lie under kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.closed_loop import engine_loop, load, no_threads_for_the_host, saved_file
from bench.gpu_steps.networks import build, saved
from bench.gpu_steps.settings import Emit, Lacks, Settings
from bench.gpu_steps.spans import Span, summary
from bench.gpu_steps.truth import truth_of

KINDS = {"h2d": "up", "d2h": "down", "op": "kernel"}  # of the simulated device


def run(settings: Settings, emit: Emit) -> None:
    """A row per batch size and number of requests in flight."""
    device = on_device.accelerator()
    no_threads_for_the_host()
    torch.backends.cudnn.benchmark = True
    precision = "fp32" if settings.tiny else "fp16"
    batches = [4] if settings.tiny else [32, 128]
    network = build("resnet50", tiny=settings.tiny)
    truth = truth_of(network, precision, 2 * max(batches), device)
    path = saved_file(settings.folder, network, saved(network))
    model = load(network, path, precision, str(device))
    for batch in batches:
        with engine_loop(model, truth, batch) as loop:
            loop.set_workers(1)
            loop.check(2 * batch)
            for times in (4, 2):
                spans: list[Span] = []
                seconds = 0.05 if settings.tiny else 0.4
                with traced(device, settings.folder / "trace.json", spans):
                    windows, _ = loop.windows(times * batch, seconds, 1)
                # The warm-up of half a window is in the trace too.
                count = round(windows[0].batches * 1.5)
                emit({"network": network.name, "precision": precision, "batch": batch, "clients": times * batch,
                      **summary(spans, count)})  # fmt: skip


@contextmanager
def traced(device: torch.device, path: Path, spans: list[Span]) -> Iterator[None]:
    """Fills ``spans`` with what the device ran meanwhile."""
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            yield
            on_device.synchronize(device)
        profile.export_chrome_trace(str(path))
        spans += spans_of_chrome(json.loads(path.read_text())["traceEvents"])
        return
    # Imported by its name: the simulated device is no part of what is measured.
    try:
        module: Any = __import__(device.type)
        module.trace(True)
    except (ImportError, AttributeError):
        raise Lacks(f"a trace of {device.type}") from None
    yield
    on_device.synchronize(device)
    module.trace(False)
    spans += spans_of_simulation(module.take_spans())


def spans_of_chrome(events: list[dict[str, Any]]) -> list[Span]:
    """Of torch's profiler: kernels and copies of the device."""
    spans = []
    for event in events:
        kind = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "other"}.get(str(event.get("cat")), "")
        if event.get("ph") != "X" or not kind:
            continue
        if kind == "copy":
            name = str(event.get("name"))
            kind = "up" if "HtoD" in name else "down" if "DtoH" in name else "other"
        began = float(event["ts"])
        stream = str(event.get("args", {}).get("stream", "?"))
        spans.append(Span(stream, kind, began, began + float(event["dur"])))
    return spans


def spans_of_simulation(rows: list[Any]) -> list[Span]:
    """Of the simulated device: (device, stream, kind, name, begin and end in ns, ...)."""
    return [
        Span(str(stream), KINDS.get(kind, "other"), began / 1e3, ended / 1e3)
        for _device, stream, kind, _name, began, ended, *_ in rows
    ]  # fmt: skip
