"""Models whose calls are not one stream's work: parts in other threads, inputs that they reshape, marks in tensors."""

from __future__ import annotations

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.device_bench import DeviceBench, numbers, saved


class Forks(nn.Module):
    """A part of it runs in a thread of torch's, where no stream is current but the default one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        before = x + 1.0
        product = torch.jit.fork(torch.mm, before, self.weight)
        return torch.jit.wait(product) + x


class ForksWithoutWeights(nn.Module):
    def forward(self, x):
        before = x + 1.0
        square = torch.jit.fork(torch.mul, before, before)
        return torch.jit.wait(square) + x


class Reshapes(nn.Module):
    """Writes to the shape of its input, not only to its numbers."""

    def forward(self, x):
        x.unsqueeze_(1)
        return x.squeeze(1) * 2.0


class Doubles(nn.Module):
    def forward(self, x):
        return x * 2.0


@pytest.mark.parametrize("network", [Forks(), ForksWithoutWeights()], ids=lambda each: type(each).__name__)
def test_parts_in_other_threads_wait_for_the_batch_and_are_waited_for(
    simdev: Any, tmp_path: Path, network: nn.Module
) -> None:
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:1", batch=8, workers=2)
    simdev.fault("delay kind=h2d us=3000")
    simdev.fault("delay kind=op us=500")
    items = numbers(60, 16)
    lane.ask(items, wave=11)
    assert lane.wrong(network, items) == []
    assert lane.lane.stats()["graph_replays"] == 0
    lane.close()


@pytest.mark.parametrize("batching", [{}, {"no_graphs": "not wanted here"}], ids=["graphs", "calls"])
def test_a_model_that_reshapes_its_input_is_given_the_same_shape_each_time(
    simdev: Any, tmp_path: Path, batching: dict[str, Any]
) -> None:
    path = saved(Reshapes(), tmp_path)
    lane = DeviceBench(path, [torch.zeros(1, 16)], device="simdev:0", batch=8, batching=batching)
    for count in (5, 3, 8, 6):
        items = numbers(count, 16, seed=count)
        lane.ask_batch([each.clone() for each in items])
        assert lane.wrong(Doubles(), items) == []
    assert lane.lane.stats()["padded_rows"] > 0
    lane.close()


@pytest.mark.parametrize("device", ["cpu", "simdev:0"])
@pytest.mark.parametrize("count", [1, 5])
def test_numbers_that_are_conjugated_or_negated_by_a_mark_are_taken_as_they_are(
    simdev: Any, tmp_path: Path, device: str, count: int
) -> None:
    complex_items = [torch.complex(each, each + 1).conj() for each in numbers(count, 16)]
    negated_items = [torch._neg_view(each) for each in numbers(count, 16)]
    for items in (complex_items, negated_items):
        example = torch.zeros(1, 16, dtype=items[0].dtype)
        lane = DeviceBench(saved(Doubles(), tmp_path), [example], device=device, batch=8)
        lane.hold(count)
        lane.ask_batch(items)
        for owner, item in enumerate(items):
            assert torch.equal(lane.answers[owner], (item * 2.0)[0].resolve_conj().resolve_neg())
        lane.close()
