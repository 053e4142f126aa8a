"""Metrics of accelerators: of their memory, and of what the engine does there for each model. Loop thread only.

Nothing here makes a context: devices are asked that native models of this process run on, and no others.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.metrics_core import Metric

from pyserve.errors import JsonObject
from pyserve.telemetry.exposition import add_histogram

# A device that hangs may hold the locks that are needed for it; the loop has to notice that it hangs.
WAITING_MAX_S = 0.05
_MEMORY = ("pyserve_device_memory_bytes", "Memory of an accelerator: what tensors of this process take, what its "
           "allocator keeps for them, and what is free.")  # fmt: skip
_LOSSES = ("pyserve_device_losses", "How often in a row a device was lost; each time another server process took over.")
# Key of ``stats()`` -> (metric, what it says).
_COUNTERS = {
    "graph_replays": ("pyserve_graph_replays", "Batches that were run by replaying a graph."),
    "padded_rows": ("pyserve_padded_rows", "Rows that were added to batches, so that they have one of few sizes."),
    "overlapped": ("pyserve_batches_overlapped", "Batches that were launched while another was on the device."),
    "pageable_copies": ("pyserve_pageable_copies", "Copies to or from a device that did not use page-locked memory."),
    "pinned_refused": ("pyserve_pinned_refused", "Page-locked memory that could not be had."),
    "slots_grown": ("pyserve_slots_grown", "Buffers of batches that had to be replaced by larger ones."),
}
_GAUGES = {
    "pinned_bytes": ("pyserve_pinned_bytes", "Page-locked memory of the host that batches are copied through."),
    "slot_bytes": ("pyserve_device_slot_bytes", "Memory of devices that batches lie in."),
    "graph_bytes": ("pyserve_graph_bytes", "Memory of devices that graphs keep."),
    "batch_ceiling": ("pyserve_batch_ceiling", "Largest batch since a device had no memory left; 0 if that was never."),
}
_STAGES = ("pyserve_device_stage_duration_seconds", "Time that batches took on the device: h2d, compute and d2h, and "
           "the gap before one that was waiting. By the device's own clock, if it has one.")  # fmt: skip
STAGES = ("h2d", "compute", "d2h", "gap")
_EAGER = ("pyserve_eager_runs", "Batches of models with graphs that were run without one, by reason.")


def torch_memory(index: int) -> dict[str, int]:
    """Bytes by kind, of a device that this process uses; what torch or the backend does not count is left out."""
    import torch

    found = {}
    memory = torch.accelerator
    for kind, name in (("allocated", "memory_allocated"), ("reserved", "memory_reserved")):
        with contextlib.suppress(RuntimeError, AttributeError):
            found[kind] = int(getattr(memory, name)(index))
    with contextlib.suppress(RuntimeError, AttributeError):
        found["free"] = int(memory.get_memory_info(index)[0])
    return found


class DeviceMemory:
    """The memory of devices, asked in another thread: what was known before is shown if they do not answer.

    Args:
        ask: see `torch_memory`.
    """

    def __init__(self, ask: Callable[[int], dict[str, int]] = torch_memory):
        self._ask = ask
        self._last: dict[str, dict[str, int]] = {}
        self._thread: threading.Thread | None = None

    def look(self, devices: Iterable[str]) -> dict[str, dict[str, int]]:
        """Name of a device -> kind -> bytes.

        Args:
            devices: such as ``cuda:0``.
        """
        wanted = sorted(set(devices))
        if wanted and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, args=(wanted,), name="device-memory", daemon=True)
            self._thread.start()
            self._thread.join(WAITING_MAX_S)
        last = self._last
        return {name: last[name] for name in wanted if name in last}

    def _run(self, devices: Sequence[str]) -> None:
        self._last = {name: self._ask(int(name.partition(":")[2] or 0)) for name in devices}


def memory_family(memory: dict[str, dict[str, int]]) -> Metric:
    """What `DeviceMemory.look` says."""
    family = Metric(*_MEMORY, "gauge")
    for device, kinds in memory.items():
        for kind, size in kinds.items():
            family.add_sample(family.name, {"device": device, "kind": kind}, size)
    return family


def loss_family(counts: dict[str, int]) -> Metric:
    """How often in a row devices were lost, by name."""
    family = Metric(*_LOSSES, "gauge")
    for device, count in counts.items():
        family.add_sample(family.name, {"device": device}, count)
    return family


def engine_families(rows: Sequence[tuple[dict[str, str], JsonObject]]) -> Iterator[Metric]:
    """What the engine counts on devices.

    Args:
        rows: labels and ``stats()`` of each model on an accelerator.
    """
    for kind, suffix, table in (("counter", "_total", _COUNTERS), ("gauge", "", _GAUGES)):
        for key, (name, about) in table.items():
            family = Metric(name, about, kind)
            for labels, stats in rows:
                if key in stats:
                    family.add_sample(name + suffix, labels, stats[key])
            yield family
    stages, eager = Metric(*_STAGES, "histogram"), Metric(*_EAGER, "counter")
    for labels, stats in rows:
        for stage in STAGES:
            if stage in stats:
                add_histogram(stages, {**labels, "stage": stage}, *stats[stage])
        for reason, count in stats.get("eager_runs", {}).items():
            eager.add_sample(eager.name + "_total", {**labels, "reason": reason}, count)
    yield from (stages, eager)
