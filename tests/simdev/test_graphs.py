"""Graphs of a model on an accelerator: recorded once, replayed with other numbers, left out where they would change
an answer."""

from __future__ import annotations

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.device_bench import DeviceBench, numbers, saved
from tests.support.networks import Affine, Identity, InPlace

pytestmark = pytest.mark.skipif(
    not hasattr(torch.accelerator, "Graph"), reason="this torch has no graphs that name no kind of device"
)


class Deep(nn.Module):
    """Several operators in a row, and an answer per row that no other row has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x)))) + x


class Waits(nn.Module):
    """Asks the device for a number."""

    def forward(self, x):
        return x * float(x.abs().max().item() * 0 + 2)


class Branches(nn.Module):
    """Takes another way for other numbers."""

    def forward(self, x):
        if bool((x > 1e6).any()):
            return x * 0
        return x + 1


class CountsByData(nn.Module):
    """How many numbers there are on the way depends on the numbers."""

    def forward(self, x):
        return x + x.nonzero().size(0) * 0


class Random(nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, training=True)


class Remembers(nn.Module):
    """Calls leave something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count += 1
        return x + 0 * self.count


class TellsSize(nn.Module):
    """A part of the answer is no tensor."""

    def forward(self, x):
        return x + 1, x.size(0)


def stats_of(lane: DeviceBench) -> dict[str, Any]:
    return lane.lane.stats()


def test_a_batch_is_one_launch_and_has_the_answers_of_its_own_numbers(simdev: Any, tmp_path: Path) -> None:
    network = Deep()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8)
    assert stats_of(lane)["graph_note"] == ""
    assert stats_of(lane)["buckets"] == [1, 2, 4, 8]
    before, replayed = simdev.counters(), stats_of(lane)["graph_replays"]
    items = numbers(40, 16)
    for _ in range(3):
        lane.ask(items, wave=8)
        assert lane.wrong(network, items) == []
    after, stats = simdev.counters(), stats_of(lane)
    batches = stats["graph_replays"] - replayed
    assert batches > 0
    assert after["replays"] - before["replays"] == batches
    assert sum(stats["eager_runs"].values()) == 0
    lane.close()


def test_replays_are_right_under_random_delays(simdev: Any, tmp_path: Path, seed: int) -> None:
    network = Deep()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8, workers=2)
    simdev.fault(f"random seed={seed} max_us=2000")
    items = numbers(400, 16)
    lane.ask(items, wave=37)
    assert lane.wrong(network, items) == []
    assert stats_of(lane)["graph_replays"] > 0
    assert sum(stats_of(lane)["eager_runs"].values()) == 0
    lane.close()


@pytest.mark.parametrize("network", [Identity(), InPlace()], ids=lambda network: type(network).__name__)
def test_answers_do_not_lie_in_memory_that_the_next_replay_writes(
    simdev: Any, tmp_path: Path, network: nn.Module
) -> None:
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4)
    simdev.fault("delay kind=d2h us=3000")
    items = numbers(64, 16)
    lane.ask(items)
    assert lane.wrong(network, items) == []
    assert stats_of(lane)["graph_replays"] > 0
    lane.close()


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Waits(), "cannot be recorded"),
        (Branches(), "cannot be recorded"),
        (CountsByData(), "cannot be recorded"),
        (Random(), "differ from call to call"),
        (Remembers(), "leave traces"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_that_no_graph_can_stand_for_is_called(
    simdev: Any, tmp_path: Path, network: nn.Module, reason: str
) -> None:
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4)
    items = numbers(20, 16)
    lane.ask(items)
    if not isinstance(network, Random):
        assert lane.wrong(network, items) == []
    stats = stats_of(lane)
    assert reason in stats["graph_note"]
    assert stats["graph_replays"] == 0
    assert stats["eager_runs"]["off"] > 0
    assert {completion.code for completion in lane.completions} == {"ok"}
    lane.close()


def test_what_is_no_tensor_in_an_answer_is_not_repeated_for_ever(simdev: Any, tmp_path: Path) -> None:
    lane = DeviceBench(saved(TellsSize(), tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4)
    assert "no tensor" in stats_of(lane)["graph_note"]
    lane.close()


def test_inputs_unlike_the_example_are_run_by_the_model(simdev: Any, tmp_path: Path) -> None:
    network = Identity()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4)
    items = numbers(8, 24)
    lane.ask(items)
    assert lane.wrong(network, items) == []
    assert stats_of(lane)["eager_runs"]["input_kind"] > 0
    assert stats_of(lane)["graph_replays"] == 0
    lane.close()


def test_graphs_can_be_switched_off(simdev: Any, tmp_path: Path) -> None:
    network = Affine()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4,
                       batching={"no_graphs": "switched off"})  # fmt: skip
    items = numbers(20, 16)
    lane.ask(items)
    assert lane.wrong(network, items) == []
    assert stats_of(lane)["graph_note"] == "switched off"
    assert stats_of(lane)["graph_replays"] == 0
    lane.close()


def test_a_graph_without_room_leaves_the_model_to_be_called(simdev: Any, tmp_path: Path) -> None:
    network = Deep()
    path = saved(network, tmp_path)
    lane = DeviceBench(path, [torch.zeros(1, 16)], device="simdev:0", batch=4, workers=0)
    # Another allocation fails in each try: sometimes one within a recording.
    notes = set()
    for at in range(0, 200, 3):
        simdev.fault(f"fail_allocation at={at}")
        lane.lane.set_workers(1)
        lane.wait(lambda: lane.states() in (["ready"], ["failed"]))
        assert lane.states() == ["ready"], lane.lane.workers()
        notes.add(stats_of(lane)["graph_note"])
        simdev.reset()
        items = numbers(9, 16)
        lane.ask(items)
        assert lane.wrong(network, items) == []
        lane.lane.set_workers(0)
        lane.wait(lambda: lane.states() == [])
    assert any(note.startswith("no room for a graph") for note in notes)
    lane.close()


def test_on_the_cpu_there_are_no_graphs_and_no_buckets(tmp_path: Path) -> None:
    network = Deep()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="cpu", batch=8)
    items = numbers(20, 16)
    lane.ask(items)
    assert lane.wrong(network, items) == []
    stats = stats_of(lane)
    assert (stats["graph_replays"], stats["padded_rows"], stats["buckets"]) == (0, 0, [])
    assert set(stats["eager_runs"].values()) == {0}
    assert stats["graph_note"] == stats["padding_note"] == ""
    lane.close()
