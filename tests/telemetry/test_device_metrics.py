"""What /metrics says of accelerators, with models and devices that the test plays."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from pyserve.telemetry import device_metrics
from pyserve.telemetry.device_metrics import DeviceMemory, engine_families, loss_family, memory_family
from pyserve.telemetry.gpu_usage import usages_here
from pyserve.telemetry.load_gauges import LoadGauges
from pyserve.telemetry.metrics import Metrics
from pyserve.telemetry.nvml import Usage

LABELS = {"model": "m", "version": "1.0"}
STATS: dict[str, Any] = {
    "graph_replays": 7, "eager_runs": {"input_kind": 2, "off": 0}, "padded_rows": 3, "pageable_copies": 1,
    "overlapped": 4, "pinned_bytes": 4096, "slot_bytes": 2048, "graph_bytes": 1024, "batch_ceiling": 16,
    "h2d": ([0.1], [1, 2], 2.0), "compute": ([0.1], [9, 0], 0.5), "pinned_refused": 0, "slots_grown": 5,
}  # fmt: skip


def samples(stats: dict[str, Any]) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for key, value in sample.labels.items() if key not in LABELS)): sample.value
        for family in engine_families([(LABELS, stats)])
        for sample in family.samples
    }


def test_what_the_engine_counts_is_there() -> None:
    assert samples(STATS) == {
        ("pyserve_graph_replays_total",): 7, ("pyserve_eager_runs_total", "input_kind"): 2,
        ("pyserve_eager_runs_total", "off"): 0, ("pyserve_padded_rows_total",): 3,
        ("pyserve_pageable_copies_total",): 1, ("pyserve_batches_overlapped_total",): 4,
        ("pyserve_pinned_bytes",): 4096, ("pyserve_device_slot_bytes",): 2048, ("pyserve_graph_bytes",): 1024,
        ("pyserve_batch_ceiling",): 16, ("pyserve_pinned_refused_total",): 0, ("pyserve_slots_grown_total",): 5,
        ("pyserve_device_stage_duration_seconds_bucket", "h2d", "0.1"): 1,
        ("pyserve_device_stage_duration_seconds_bucket", "h2d", "+Inf"): 3,
        ("pyserve_device_stage_duration_seconds_count", "h2d"): 3,
        ("pyserve_device_stage_duration_seconds_sum", "h2d"): 2,
        ("pyserve_device_stage_duration_seconds_bucket", "compute", "0.1"): 9,
        ("pyserve_device_stage_duration_seconds_bucket", "compute", "+Inf"): 9,
        ("pyserve_device_stage_duration_seconds_count", "compute"): 9,
        ("pyserve_device_stage_duration_seconds_sum", "compute"): 0.5,
    }  # fmt: skip


def test_what_an_engine_does_not_count_is_left_out() -> None:
    assert samples({}) == {}
    assert samples({"graph_replays": 1}) == {("pyserve_graph_replays_total",): 1}


def test_memory_is_shown_by_device_and_kind() -> None:
    memory = DeviceMemory(lambda index: {"allocated": 10 + index, "free": 5})
    shown = memory.look(["simdev:1", "simdev:0", "simdev:1"])
    found = {tuple(sample.labels.values()): sample.value for sample in memory_family(shown).samples}
    assert found == {
        ("simdev:0", "allocated"): 10, ("simdev:0", "free"): 5, ("simdev:1", "allocated"): 11, ("simdev:1", "free"): 5,
    }  # fmt: skip
    assert memory.look([]) == {}


def test_a_device_that_hangs_holds_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    released, hangs = threading.Event(), False
    asked: list[int] = []

    def ask(index: int) -> dict[str, int]:
        asked.append(index)
        if hangs:
            released.wait(60)
        return {"free": len(asked)}

    monkeypatch.setattr(device_metrics, "WAITING_MAX_S", 60.0)
    memory = DeviceMemory(ask)
    assert memory.look(["cuda:0"]) == {"cuda:0": {"free": 1}}
    hangs = True
    monkeypatch.setattr(device_metrics, "WAITING_MAX_S", 0.01)
    for _ in range(3):
        assert memory.look(["cuda:0"]) == {"cuda:0": {"free": 1}}, "what was known before"
    assert asked == [0, 0], "one thread at most waits for it"
    released.set()


def test_losses_are_shown_by_device() -> None:
    assert [(sample.labels, sample.value) for sample in loss_family({"cuda:1": 2}).samples] == [
        ({"device": "cuda:1"}, 2)
    ]


class NativeModel:
    """On a CPU, or on a device."""

    name, version, lane, requests_in_flight = "m", "1.0", "native", 0

    def __init__(self, *devices: str):
        self.native_devices = devices

    def worker_rows(self) -> list[Any]:
        return []

    def worker_load_ms(self) -> dict[str, float]:
        return {}

    def stats(self) -> dict[str, Any]:
        return {**STATS, "staging": ([], [0], 0.0), "inference": ([], [0], 0.0), "batch_size": ([], [0], 0.0),
                "batches": 0, "running": 0, "queue_size": 0}  # fmt: skip

    def audit_report(self) -> None:
        return None


def test_a_model_on_the_cpu_has_none_of_them() -> None:
    def names(model: NativeModel) -> set[str]:
        families = Metrics(lambda: [model], hostname="h").collect()
        return {sample.name for family in families for sample in family.samples}

    own = {"pyserve_graph_replays_total", "pyserve_pinned_bytes", "pyserve_device_stage_duration_seconds_sum"}
    assert not own & names(NativeModel())
    assert own <= names(NativeModel("cuda:0"))


def test_two_batches_at_once_are_not_twice_as_busy() -> None:
    now = 0.0
    load = LoadGauges(lambda: now)
    stats = {"staging": ([], [], 0.0), "inference": ([], [], 0.0), "batch_size": ([], [], 0.0), "batches": 0,
             "running": 1, "queue_size": 0, "compute": ([], [], 0.0)}  # fmt: skip
    load.look(stats, 1)
    now = 10.0
    stats |= {"staging": ([], [], 8.0), "inference": ([], [], 9.0), "batches": 100, "compute": ([], [], 4.0)}
    assert load.look(stats, 1)[0] == pytest.approx(0.4)


def test_torch_says_what_a_device_has(accelerator: str) -> None:
    index = int(accelerator.partition(":")[2])
    before = DeviceMemory().look([accelerator])[accelerator]
    held = torch.empty(1 << 20, dtype=torch.uint8, device=accelerator)
    after = DeviceMemory().look([accelerator])[accelerator]
    assert after["allocated"] - before["allocated"] == held.nbytes
    assert after["reserved"] >= after["allocated"] and 0 < after["free"] <= before["free"]
    assert set(usages_here([index])) == {index}, "TorchServe's gauges have it too"
    usage = usages_here([index])[index]
    assert usage.busy is None and usage.total_size - usage.used_size == after["free"]


def test_a_device_that_this_process_does_not_use_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its free memory cannot be asked for without a context on it."""
    asked: list[int] = []

    def memory_info(index: int) -> tuple[int, int]:
        asked.append(index)
        return 1, 3

    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda index: 512 if index == 2 else 0)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", memory_info)
    assert usages_here([0, 1, 2]) == {2: Usage(2, 3)} and asked == [2]
