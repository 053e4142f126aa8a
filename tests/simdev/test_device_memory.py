"""A device's memory runs out: whoever can be answered is, and the lane learns which size of batches fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.lane_bench import LaneBench

pytestmark = pytest.mark.accelerator

Make = Callable[..., LaneBench]


class Greedy(nn.Module):
    """Twice its input. Needs more memory than there is for an item that begins with a number above 100."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x[:, 0] > 100).any()):
            x = x + torch.zeros([1 << 31], device=x.device)[0]
        return x * 2


@pytest.fixture
def make(simdev: Any, tmp_path: Path) -> Iterator[Make]:
    """Makes a lane on the first device, with one worker; its allocations fail only once they are told to."""
    made = []

    def begin(batch: int = 8, size: int = 16) -> LaneBench:
        path = tmp_path / "model.pt"
        torch.jit.save(torch.jit.script(Greedy().eval()), str(path))
        made.append(LaneBench(path, [torch.zeros(1, size)], device="simdev:0", batch=batch))
        return made[-1]

    yield begin
    simdev.fault("fail_allocation at=-1")
    for lane in made:
        lane.close()


def ask(lane: LaneBench, first: list[float], size: int = 16) -> Counter[str]:
    """Submits an item for each number, which they are filled with, as one batch; looks at every answer."""
    lane.answers.clear()
    for index, number in enumerate(first):
        lane.submit(index, torch.full((1, size), number))
    lane.wait_for(len(first))
    for index, number in enumerate(first):
        answer = lane.answers[index]
        assert isinstance(answer, str) or bool((answer == 2 * number).all()), f"a wrong answer to {index}"
    return Counter(answer if isinstance(answer, str) else "ok" for answer in lane.answers.values())


@pytest.mark.parametrize("fault", ["fail_allocation at=1", "fail_launch at=2"])
def test_a_batch_for_which_memory_ran_out_is_run_in_halves_and_the_lane_remembers_the_size(
    simdev: Any, make: Make, fault: str
) -> None:
    lane = make(batch=8)
    lane.hold(8)
    assert lane.lane.ceiling == 0
    simdev.fault(f"{fault} count=1 device=0")
    assert ask(lane, [float(i) for i in range(8)]) == {"ok": 8}
    assert lane.lane.ceiling == 4 and lane.lane.stats()["retried_singly"] == 0
    lane.lane.forget_ceiling()
    assert ask(lane, [float(i) for i in range(8)]) == {"ok": 8} and lane.lane.ceiling == 0


def test_a_batch_of_which_not_even_one_fits_is_told_the_numbers(simdev: Any, make: Make) -> None:
    lane = make(batch=4)
    lane.hold(4)
    simdev.fault("fail_allocation at=0 count=1000000 device=0")
    assert ask(lane, [1.0, 2.0, 3.0, 4.0]) == {"out_of_memory": 4}
    text = next(each.message for each in lane.completions if each.code == "out_of_memory")
    assert "simdev:0 has" in text and "MiB free" in text
    assert lane.lane.ceiling == 0, "it is nothing that smaller batches would mend"
    simdev.fault("fail_allocation at=-1")
    assert ask(lane, [1.0, 2.0, 3.0, 4.0]) == {"ok": 4} and lane.states() == ["ready"]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_that_needs_too_much_fails_alone_and_costs_the_lane_nothing(make: Make, place: int) -> None:
    lane = make(batch=8)
    lane.hold(8)
    numbers = [float(i) for i in range(8)]
    numbers[place] = 1000.0
    assert ask(lane, numbers) == {"ok": 7, "out_of_memory": 1}
    assert lane.answers[place] == "out_of_memory" and lane.lane.ceiling == 0


def test_memory_that_ran_out_is_no_lost_device(simdev: Any, make: Make) -> None:
    from pyserve import _core

    lane = make(batch=4)
    simdev.fault("fail_launch at=0 count=3 device=0")
    ask(lane, [float(i) for i in range(4)])
    assert not _core.lost_devices() and _core.probe_device("simdev:0", 30.0) == ("well", "")
