"""What the engine holds of the device: loaded, with more workers, with larger batches, and when all is gone."""

from __future__ import annotations

import gc
from typing import Any

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.closed_loop import engine_loop, load, no_threads_for_the_host, saved_file
from bench.gpu_steps.networks import build, saved
from bench.gpu_steps.settings import Emit, Row, Settings
from bench.gpu_steps.truth import truth_of


def run(settings: Settings, emit: Emit) -> None:
    """A row per moment; those with ``batch`` are compared with the direct loop, whose process holds as much else."""
    device = on_device.accelerator()
    no_threads_for_the_host()
    torch.backends.cudnn.benchmark = True
    precision = "fp32" if settings.tiny else "fp16"
    small, large = (1, 4) if settings.tiny else (8, 128)
    for name in ("resnet50", "bert"):
        network = build(name, tiny=settings.tiny)
        base: Row = {"network": name, "precision": precision}
        truth = truth_of(network, precision, 2 * large, device)
        path = saved_file(settings.folder, network, saved(network))
        gc.collect()
        on_device.forget_peak(device)
        emit({"moment": f"before {name}", **held(device)})
        model: Any = load(network, path, precision, str(device))
        emit({"moment": f"{name} loaded", "weights": model.weights_size, **held(device)})
        gc.collect()
        on_device.forget_peak(device)
        for batch in [large] if settings.tiny else [32, large]:
            with engine_loop(model, truth, batch) as loop:
                loop.set_workers(1)
                loop.windows(4 * batch, 0.05 if settings.tiny else 0.3, 1)
                emit({**base, "batch": batch, **held(device)})
            gc.collect()
            on_device.forget_peak(device)
        with engine_loop(model, truth, small) as loop:
            for workers in (1, 2, 4):
                loop.set_workers(workers)
                loop.check(2 * small)
                emit({"moment": f"{name}: {workers} workers, batches of {small}", **held(device)})
            loop.set_workers(1)
            for batch in (large, small):
                loop.set_batch(batch)
                loop.check(2 * batch)
                emit({"moment": f"{name}: 1 worker, then batches of {batch}", **held(device)})
        del loop, model
        gc.collect()
        on_device.forget_peak(device)
        emit({"moment": f"{name} unregistered", **held(device)})


def held(device: torch.device) -> Row:
    """torch's allocator, and what is left of the whole device."""
    on_device.synchronize(device)
    return {"memory": on_device.memory(device), "free": (on_device.whole_memory(device) or (None,))[0]}
