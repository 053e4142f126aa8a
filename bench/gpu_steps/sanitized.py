"""The run of the engine that `sanitizer` watches: some hundred requests, every answer compared."""

from __future__ import annotations

from bench.gpu_steps import device as on_device
from bench.gpu_steps.closed_loop import engine_loop, load, saved_file
from bench.gpu_steps.networks import build, saved
from bench.gpu_steps.settings import Emit, Settings
from bench.gpu_steps.truth import truth_of


def run(settings: Settings, emit: Emit) -> None:
    """200 requests through two workers."""
    device = on_device.accelerator()
    network = build("resnet50", tiny=True)
    truth = truth_of(network, "fp32", 20, device)
    model = load(network, saved_file(settings.folder, network, saved(network)), "fp32", str(device))
    with engine_loop(model, truth, 8) as loop:
        loop.set_workers(2)
        emit({"requests": 200, "error": max(loop.check(50) for _ in range(4))})
