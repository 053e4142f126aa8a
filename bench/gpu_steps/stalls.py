"""The first batch of each size after the warm-up, beside later ones of that size: the wait of a client."""

from __future__ import annotations

import statistics
import time

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.closed_loop import EngineLoop, engine_loop, load, no_threads_for_the_host, saved_file
from bench.gpu_steps.networks import build, saved
from bench.gpu_steps.settings import Emit, Settings
from bench.gpu_steps.truth import truth_of

AGAIN = 3


def run(settings: Settings, emit: Emit) -> None:
    """A row per network: the longest first time, and what the same size takes later."""
    device = on_device.accelerator()
    no_threads_for_the_host()
    torch.backends.cudnn.benchmark = True
    largest = 4 if settings.tiny else 32
    for name in ("resnet50", "bert"):
        network = build(name, tiny=settings.tiny)
        truth = truth_of(network, "fp32" if settings.tiny else "fp16", largest, device)
        path = saved_file(settings.folder, network, saved(network))
        model = load(network, path, "fp32" if settings.tiny else "fp16", str(device))
        with engine_loop(model, truth, largest) as loop:
            loop.set_workers(1)
            first, later = {}, {}
            for size in range(2, largest):
                times = [batch_ms(loop, size) for _ in range(1 + AGAIN)]
                first[size], later[size] = times[0], statistics.median(times[1:])
        stalls = {size: first[size] - later[size] for size in first}
        worst = max(stalls, key=lambda size: stalls[size])
        emit({
            "network": name, "sizes": len(first), "worst_stall_ms": round(stalls[worst], 3), "at_size": worst,
            "first_ms": round(first[worst], 3), "later_ms": round(later[worst], 3),
            "over_50_ms": sorted(size for size, ms in stalls.items() if ms > 50),
        })  # fmt: skip


def batch_ms(loop: EngineLoop, size: int) -> float:
    """One batch of exactly ``size``, from its submission to its compared answers."""
    loop.set_batch(size, least=size)
    began = time.perf_counter()
    loop.check(size)
    return 1e3 * (time.perf_counter() - began)
