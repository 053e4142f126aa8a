"""What the engine counts on a device reaches /metrics under its names, and is true of what ran."""

from __future__ import annotations

from pathlib import Path

import torch

from pyserve.telemetry.device_metrics import engine_families
from tests.support.lane_bench import LaneBench
from tests.support.networks import Identity, save_script

LABELS = {"model": "m"}


def test_the_engines_counts_are_shown_and_true(tmp_path: Path, accelerator: str) -> None:
    example = [torch.zeros(1, 4)]
    bench = LaneBench(save_script(Identity(), tmp_path / "m.pt"), example, batch=4, device=accelerator)
    try:
        for number in range(12):
            bench.submit(number, torch.full((1, 4), float(number)))
        bench.lane.announce()
        bench.wait_for(12)
        stats = bench.lane.stats()
        shown = {
            (sample.name, *sample.labels.values()): sample.value
            for family in engine_families([(LABELS, stats)]) for sample in family.samples
        }  # fmt: skip
    finally:
        bench.close()
    batches = stats["batches"]
    assert {bench.answers[number][0].item() for number in range(12)} == {*map(float, range(12))}
    for stage in ("h2d", "compute", "d2h"):
        assert shown["pyserve_device_stage_duration_seconds_count", "m", stage] == batches
    assert shown["pyserve_pageable_copies_total", "m"] == 0
    assert shown["pyserve_pinned_bytes", "m"] > 0 and shown["pyserve_device_slot_bytes", "m"] > 0
