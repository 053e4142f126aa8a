"""Workers on CPUs take their part of what waits, so that none computes for many while another has nothing left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.held import Held, Hold, new_hold
from tests.support.lane_bench import LaneBench
from tests.support.networks import save_script

HELD = torch.full((1, 4), 666.0)
LONG_S = 0.005  # more than what a batch has to take to be shared


@pytest.fixture
def hold() -> Iterator[Hold]:
    hold = new_hold()
    yield hold
    hold.release()


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[LaneBench]:
    lane = LaneBench(save_script(Held(), tmp_path / "held.pt"), [torch.zeros(1, 4)], workers=2, batch=16)
    yield lane
    lane.close()


def sizes(lane: LaneBench) -> list[int]:
    return sorted(len(each.owners) for each in lane.completions)


def queue_behind_held(lane: LaneBench, hold: Hold, count: int) -> None:
    """Both workers are within an operator; ``count`` requests wait."""
    for owner in ("first", "second"):
        lane.submit(owner, [HELD])
        assert hold.begun.acquire(timeout=60)
    for number in range(count):
        lane.submit(number, [torch.full((1, 4), float(number))])


def test_what_takes_long_is_shared_by_all_workers(lane: LaneBench, hold: Hold) -> None:
    queue_behind_held(lane, hold, 10)
    time.sleep(LONG_S)
    hold.release()
    lane.wait_for(12)
    # Of twelve that wait or run, six; without a part of its own one worker would have taken all ten.
    assert sum(sizes(lane)) == 12 and sizes(lane)[-1] <= 6, sizes(lane)
    assert all(torch.equal(lane.answers[number], torch.full((4,), 2.0 * number)) for number in range(10))


def test_a_minimum_counts_for_a_part_too(lane: LaneBench, hold: Hold) -> None:
    queue_behind_held(lane, hold, 0)
    lane.limits(batch=16, least=8, delay_ns=3_600_000_000_000)
    for number in range(8):
        lane.submit(number, [torch.full((1, 4), float(number))])
    time.sleep(LONG_S)
    hold.release()
    lane.wait_for(10)
    assert sizes(lane) == [1, 1, 8]
