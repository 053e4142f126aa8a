"""The engine alone: precisions x batch sizes x workers x requests in flight, beside a direct loop in its process.

The direct graph loop is measured before and after each batch size, so that a clock that changes under load is unfair to
neither. What is compared comes first; if time runs out the rest is named in a last row.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.closed_loop import (
    EngineLoop,
    engine_loop,
    load,
    median_of,
    no_threads_for_the_host,
    percentile_ms,
    saved_file,
)
from bench.gpu_steps.loops import SLOT_COUNT, DirectLoop, form_of, middle
from bench.gpu_steps.networks import Network, build, saved
from bench.gpu_steps.settings import Emit, Lacks, Row, Settings
from bench.gpu_steps.truth import Truth, truth_of
from pyserve import _core

WINDOW_COUNT = 3
LEAST_S = 8.0  # for one more batch size: two anchors, workers that start, and some of the rows


@dataclass(frozen=True, slots=True)
class Case:
    """A network in a precision at a batch size, and the numbers of workers it is measured with."""

    network: str
    precision: str
    batch: int
    workers: tuple[int, ...]


FULL = (
    Case("resnet50", "fp16", 32, (1, 2, 4)), Case("resnet50", "fp16", 128, (1, 2, 4)),
    Case("resnet50", "fp16", 1, (1, 2, 4)), Case("resnet50_uint8", "fp16", 32, (1, 2)),
    Case("resnet50_uint8", "fp16", 128, (1, 2)), Case("resnet50_uint8", "fp16", 1, (1,)),
    Case("bert", "fp16", 32, (1, 2)), Case("bert", "fp16", 128, (1,)), Case("bert", "fp16", 1, (1,)),
    Case("resnet50", "tf32", 32, (1, 2)), Case("resnet50", "tf32", 128, (1,)), Case("resnet50", "tf32", 1, (1,)),
    Case("bert", "tf32", 32, (1,)), Case("resnet50", "fp16", 8, (1, 2, 4)), Case("bert", "fp16", 8, (1, 2)),
    Case("bert", "tf32", 128, (1,)), Case("bert", "tf32", 1, (1,)), Case("resnet50", "tf32", 8, (1,)),
)  # fmt: skip
TINY = (Case("resnet50", "fp32", 4, (1, 2)), Case("resnet50", "fp32", 1, (1,)), Case("resnet50_uint8", "fp32", 4, (1,)))


def run(settings: Settings, emit: Emit) -> None:
    """A row per loop, and an anchor's before and after each case."""
    device = on_device.accelerator()
    torch.backends.cudnn.benchmark = True
    no_threads_for_the_host()
    cases = TINY if settings.tiny else FULL
    parts: dict[tuple[str, str], Parts] = {}
    left_out = []
    for case in cases:
        if settings.left_s < LEAST_S:
            left_out.append(f"{case.network} {case.precision} batch {case.batch}")
            continue
        row: Row = {"network": case.network, "precision": case.precision, "batch": case.batch}
        try:
            key = (case.network, case.precision)
            if key not in parts:
                parts[key] = Parts(case, settings, device)
            for row in parts[key].rows(case, settings):
                emit(row)
        except Exception as error:  # the other cases are measured
            text = str(error).splitlines()
            emit({**row, "failed": f"{type(error).__name__}: {text[0][:200] if text else ''}"})
            parts.pop((case.network, case.precision), None)
        gc.collect()
    if left_out:
        emit({"left_out": left_out})


class Parts:
    """What all cases of a network in a precision share: both forms of the model, and the truth."""

    def __init__(self, case: Case, settings: Settings, device: torch.device):
        self._device = device
        self._network: Network = build(case.network, tiny=settings.tiny)
        largest = 4 if settings.tiny else 128
        self._truth: Truth = truth_of(self._network, case.precision, SLOT_COUNT * largest, device)
        with on_device.numbers_of(case.precision):
            self._form = form_of(self._network, case.precision, device)
        path = saved_file(settings.folder, self._network, saved(self._network))
        with on_device.numbers_of(case.precision):
            self._model: _core.TorchModel = load(self._network, path, case.precision, str(device))

    def rows(self, case: Case, settings: Settings) -> Iterator[Row]:
        """Direct, engine, direct."""
        seconds = 0.05 if settings.tiny else 0.25
        base: Row = {"network": case.network, "precision": case.precision, "batch": case.batch}
        yield {**base, **self._anchor(case, seconds), "when": "before"}
        with on_device.numbers_of(case.precision), engine_loop(self._model, self._truth, case.batch) as loop:
            for workers in case.workers:
                loop.set_workers(workers)
                error = loop.check(2 * case.batch * workers)
                yield {**base, "workers": workers, **loop.notes()}
                for clients in clients_of(case.batch, workers):
                    row = self._measured(loop, clients, seconds)
                    row["error"] = max(row["error"], error)
                    yield {**base, "workers": workers, **row}
        gc.collect()
        yield {**base, **self._anchor(case, seconds), "when": "after"}

    def _anchor(self, case: Case, seconds: float) -> Row:
        """The direct graph loop; where there are no graphs, the row says so, and ratios stay open."""
        row: Row = {"anchor": "graph"}
        try:
            with on_device.numbers_of(case.precision):
                loop = DirectLoop(self._form, self._truth, "graph", case.batch)
                row["error"], row["allowed"] = loop.error(), self._truth.allowed
                row["items_per_s"] = middle(loop.rates(seconds, 2), lambda rate: round(rate * case.batch, 1))
                row["alone_ms"] = round(1e3 * loop.alone_s(seconds), 4)
        except Lacks as lack:
            row["failed"] = f"lacks {lack}"
        return row

    def _measured(self, loop: EngineLoop, clients: int, seconds: float) -> Row:
        before = loop.counted()
        windows, error = loop.windows(clients, seconds, WINDOW_COUNT)
        counted = {name: count - before.get(name, 0) for name, count in loop.counted().items()}
        items = sum(len(window.latencies_ns) for window in windows)
        return {
            "clients": clients,
            "items_per_s": middle([window.items_per_s for window in windows], lambda rate: round(rate, 1)),
            "p50_ms": percentile_ms(windows, 0.5),
            "p99_ms": percentile_ms(windows, 0.99),
            "batch_mean": round(items / max(1, sum(window.batches for window in windows)), 1),
            "cpu_cores": round(median_of([window.cpu_share for window in windows]), 2),
            "counted": {name: n for name, n in counted.items() if n or name == "pageable_copies"},
            "error": error,
            "allowed": self._truth.allowed,
        }


def clients_of(batch: int, workers: int) -> list[int]:
    """4, 2 and 1 times the batch size, and a lone one; with more workers what shows that they do no harm."""
    if workers > 1:
        return [4 * batch, 2 * batch] if batch > 1 else [4, 2]
    return sorted({4 * batch, 2 * batch, batch, 1}, reverse=True)
