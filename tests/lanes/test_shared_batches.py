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


def batch_behind_held(lane: LaneBench, count: int, took_s: float) -> list[int]:
    """Sizes of the batches that ``count`` requests are run in, which came while the only worker was within an operator;
    the first batch takes ``took_s`` seconds."""  # fmt: skip
    before = len(lane.answers)
    done = len(lane.completions)
    first = new_hold()
    lane.submit(before, [HELD])
    assert first.begun.acquire(timeout=60)
    for number in range(1, count + 1):
        lane.submit(before + number, [HELD if number == 1 else torch.zeros(1, 4)])
    second = new_hold()
    time.sleep(0.05)  # a row alone costs more than any here in a batch
    first.release()
    assert second.begun.acquire(timeout=60)
    time.sleep(took_s)
    second.release()
    lane.wait_for(before + 1 + count)
    return [len(each.owners) for each in lane.completions[done + 1 :]]


def test_a_part_is_left_where_batches_of_half_as_many_have_cost_less(tmp_path: Path) -> None:
    lane = LaneBench(save_script(Held(), tmp_path / "held.pt"), [torch.zeros(1, 4)], workers=1, batch=8)
    try:
        # One batch in 32 is taken the other way: of eight of each kind, at most one.
        assert sum(batch_behind_held(lane, 8, 0.2) == [8] for _ in range(8)) >= 7  # 25 ms a row
        assert (
            sum(batch_behind_held(lane, 4, 0.006) == [4] for _ in range(8)) >= 7
        )  # 1.5 ms a row, on a busy machine a few
        assert sum(batch_behind_held(lane, 8, 0.2) == [4, 4] for _ in range(3)) >= 2
    finally:
        lane.close()
