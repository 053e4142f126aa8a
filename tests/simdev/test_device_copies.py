"""One model on several devices: its weights once on each, one queue for all, every worker on its own device."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core, devices
from tests.support.lane_bench import LaneBench
from tests.support.networks import save_script

WIDTH = 512
EXAMPLE = [torch.zeros(1, WIDTH)]
WEIGHTS_SIZE = WIDTH * WIDTH * 4
MakeBench = Callable[..., LaneBench]


class Square(nn.Module):
    """[n, 512] -> [n, 512], with a megabyte of weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 16)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return torch.relu(x @ self.weight) + x


class Counting(nn.Module):
    """[n, 512] -> [n, 1]: how many calls there were."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):  # type: ignore[no-untyped-def]
        self.calls += 1
        return x[:, :1] * 0 + self.calls


@pytest.fixture
def spread(simdev: Any, tmp_path: Path) -> Iterator[MakeBench]:
    """Makes lanes on both devices."""
    made: list[LaneBench] = []

    def make(network: nn.Module, *, workers: int, **options: Any) -> LaneBench:
        path = save_script(network, tmp_path / f"{len(made)}.pt")
        lane = LaneBench(path, EXAMPLE, device="simdev:0", workers=0, **options)
        lane.lane.set_models([lane.model, lane.model.copy_on("simdev:1")])
        lane.lane.set_workers(workers)
        lane.wait(lambda: lane.states() == ["ready"] * workers)
        made.append(lane)
        return lane

    yield make
    simdev.reset()
    for each in made:
        each.close()


def devices_of(lane: LaneBench) -> Counter[str]:
    return Counter(row["device"] for row in lane.lane.workers())


def test_workers_take_turns_on_the_devices_and_all_answer_the_same(simdev: Any, spread: MakeBench) -> None:
    network = Square()
    lane = spread(network, workers=4, batch=4)
    assert [row["device"] for row in lane.lane.workers()] == ["simdev:0", "simdev:1"] * 2
    simdev.fault("random seed=4 max_us=2000")
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(1, WIDTH, generator=generator) for _ in range(300)]
    for index, x in enumerate(xs):
        lane.submit(index, x)
    lane.wait_for(len(xs))
    with torch.inference_mode():
        expected = network(torch.cat(xs))
    for index in range(len(xs)):
        torch.testing.assert_close(lane.answers[index], expected[index], atol=1e-4, rtol=1e-4)
    batches = {row["device"]: row["batches"] for row in lane.lane.workers()}
    assert all(batches.values()), f"one queue feeds both: {batches}"


def test_inputs_that_lie_on_one_device_are_fetched_by_the_workers_of_the_others(simdev: Any, spread: MakeBench) -> None:
    network = Square()
    lane = spread(network, workers=2, batch=4)
    simdev.fault("random seed=6 max_us=2000")
    generator = torch.Generator().manual_seed(7)
    xs = [torch.randn(1, WIDTH, generator=generator) for _ in range(60)]
    for index, x in enumerate(xs):
        place = ("cpu", "simdev:0", "simdev:1")[index % 3]
        lane.submit(index, x.to(place))
    lane.wait_for(len(xs))
    with torch.inference_mode():
        expected = network(torch.cat(xs))
    for index in range(len(xs)):
        torch.testing.assert_close(lane.answers[index], expected[index], atol=1e-4, rtol=1e-4)
    assert all(row["batches"] for row in lane.lane.workers())


def test_each_device_has_the_weights_once_however_many_workers_there_are(simdev: Any, spread: MakeBench) -> None:
    before = [simdev.counters(device)["in_use"] for device in range(2)]
    spread(Square(), workers=6, batch=1)
    gc.collect()
    grown = [simdev.counters(device)["in_use"] - before[device] for device in range(2)]
    assert all(WEIGHTS_SIZE <= each < 2 * WEIGHTS_SIZE for each in grown), grown


def test_devices_get_the_same_share_when_workers_go_and_come(spread: MakeBench) -> None:
    lane = spread(Square(), workers=4, batch=1)
    for count in (3, 1, 6, 2, 5):
        lane.lane.set_workers(count)
        lane.wait(lambda count=count: lane.states() == ["ready"] * count)  # type: ignore[misc]
        shares = devices_of(lane)
        assert abs(shares["simdev:0"] - shares["simdev:1"]) <= 1, f"{count} workers: {shares}"


def test_a_model_that_counts_its_calls_does_so_in_each_worker_on_its_own_device(spread: MakeBench) -> None:
    lane = spread(Counting(), workers=2, batch=1)
    assert lane.model.state
    for index in range(40):
        lane.submit(index, torch.zeros(1, WIDTH))
        lane.wait_for(index + 1)
    counts = Counter(int(lane.answers[index].item()) for index in range(40))
    assert max(counts.values()) <= 2, f"a count that was given three times: {counts}"
    batches = [row["batches"] for row in lane.lane.workers()]
    assert set(counts) == set(range(1, max(batches) + 1))


def used_lane(path: Path) -> Any:
    """A lane of the engine that had two devices, and was closed."""
    bench = LaneBench(path, EXAMPLE, device="simdev:0", workers=0, batch=4)
    bench.lane.set_models([bench.model, bench.model.copy_on("simdev:1")])
    bench.lane.set_workers(2)
    bench.wait(lambda: bench.states() == ["ready"] * 2)
    bench.submit(0, torch.zeros(1, WIDTH))
    bench.wait_for(1)
    bench.close()
    return bench.lane


def test_a_lane_that_is_gone_leaves_nothing_on_any_device(simdev: Any, tmp_path: Path) -> None:
    devices.give_back()
    before = [simdev.counters(device)["in_use"] for device in range(2)]
    core = used_lane(save_script(Square(), tmp_path / "m.pt"))  # whoever still has it has no weights
    gc.collect()
    devices.give_back()
    assert [simdev.counters(device)["in_use"] for device in range(2)] == before
    assert core.workers() == []


def test_a_copy_is_made_of_the_file_as_it_was(simdev: Any, tmp_path: Path) -> None:
    path = save_script(Square(), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), EXAMPLE, device="simdev:0")
    model.settle()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match="was overwritten since it was loaded"):
        model.copy_on("simdev:1")


def test_no_room_for_a_copy_is_known_by_its_type(simdev: Any, tmp_path: Path) -> None:
    path = save_script(Square(), tmp_path / "m.pt")
    model = _core.TorchModel.load(str(path), EXAMPLE, device="simdev:0")
    simdev.fault("fail_allocation at=1 count=1000")
    with pytest.raises(torch.OutOfMemoryError):
        model.copy_on("simdev:1")
