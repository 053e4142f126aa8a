"""The direct loops: networks x precisions x batch sizes x ways, the answers of each compared with eager torch."""

from __future__ import annotations

import gc

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.loops import SLOT_COUNT, WAYS, DirectLoop, Form, form_of, middle
from bench.gpu_steps.networks import build
from bench.gpu_steps.settings import Emit, Lacks, Row, Settings
from bench.gpu_steps.truth import Truth, truth_of

LEAST_S = 3.0  # for one more row


def run(settings: Settings, emit: Emit) -> None:
    """A row per loop. What no longer fits is named in a last row."""
    device = on_device.accelerator()
    torch.backends.cudnn.benchmark = True
    batches = [1, 4] if settings.tiny else [32, 128, 1, 8]
    left_out = []
    for name in ("resnet50", "resnet50_uint8", "bert"):
        network = build(name, tiny=settings.tiny)
        for precision in ["fp32"] if settings.tiny else ["fp16", "tf32"]:
            if settings.left_s < LEAST_S:
                left_out.append(f"{name} {precision}")
                continue
            truth = truth_of(network, precision, SLOT_COUNT * max(batches), device)
            with on_device.numbers_of(precision):
                form = form_of(network, precision, device)
                for batch in batches:
                    # The plain ways say nothing new about uint8.
                    for way in ["graph"] if name == "resnet50_uint8" else WAYS[::-1]:
                        if settings.left_s < LEAST_S:
                            left_out.append(f"{name} {precision} batch {batch} {way}")
                            continue
                        emit(row_of(form, truth, way, batch, tiny=settings.tiny))
            del form
    if left_out:
        emit({"left_out": left_out})


def row_of(form: Form, truth: Truth, way: str, batch: int, *, tiny: bool) -> Row:
    """One loop, measured in three windows."""
    row: Row = {"network": form.network.name, "precision": form.precision, "way": way, "batch": batch}
    gc.collect()
    on_device.forget_peak(form.device)
    try:
        loop = DirectLoop(form, truth, way, batch)
        row["error"] = loop.error()
        row["allowed"] = truth.allowed
        row["items_per_s"] = middle(loop.rates(0.02 if tiny else 0.25, 3), lambda rate: round(rate * batch, 1))
        row["alone_ms"] = round(1e3 * loop.alone_s(0.02 if tiny else 0.15), 4)
        row["error"] = max(row["error"], loop.error())
        row["memory"] = on_device.memory(form.device)
    except Lacks as lack:
        row["failed"] = f"lacks {lack}"
    except Exception as error:  # one loop that cannot be run is a row; the others are measured
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return row
