"""Sizes of batches for which an accelerator has no memory are left out while the model is loaded."""

from __future__ import annotations

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.device_bench import DeviceBench, numbers, saved


class Roomy(nn.Module):
    """Takes 400 KB per row on the way."""

    def forward(self, x):
        return x.repeat(1, 6400).reshape(x.size(0), 6400, 16).mean(1) + x


def test_the_largest_size_that_fits_is_the_lanes_and_the_model_is_ready(simdev: Any, tmp_path: Path) -> None:
    network = Roomy()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=64, workers=0)
    simdev.fault("memory bytes=24000000 device=0")
    lane.lane.set_workers(1)
    lane.wait(lambda: lane.states() in (["ready"], ["failed"]))
    assert lane.states() == ["ready"], lane.lane.workers()
    ceiling = lane.lane.ceiling
    assert ceiling in (1, 2, 4, 8, 12, 16, 24, 32, 48)
    items = numbers(3 * ceiling, 16)
    lane.limits(batch=ceiling)
    lane.ask(items)
    assert lane.wrong(network, items) == []
    assert max(lane.lane.stats()["buckets"]) <= ceiling
    lane.close()


def test_a_model_of_which_not_even_one_row_fits_fails_with_both_numbers(simdev: Any, tmp_path: Path) -> None:
    lane = DeviceBench(saved(Roomy(), tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4, workers=0)
    simdev.fault("memory bytes=300000 device=0")
    lane.lane.set_workers(1)
    lane.wait(lambda: lane.states() in (["ready"], ["failed"]))
    assert lane.states() == ["failed"]
    error = lane.lane.workers()[0]["error"]
    assert "not even one row has room on simdev:0" in error
    assert "MB are free" in error and "Tried to allocate" in error
    lane.close()
