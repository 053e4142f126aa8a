"""What arrives beside what can be done."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.replicas.demand import Demand


class Lane:
    """Counters of a lane whose batches of one take 100 ms."""

    def __init__(self, workers: int = 1):
        self.now, self.workers, self.submitted, self.ended, self.refused, self.running = 0.0, workers, 0, 0, 0, 0
        self.demand = Demand(lambda: self.now)

    def look(self) -> float:
        stats: dict[str, Any] = {
            "staging": ([], [], 0.0), "inference": ([], [], self.ended * 0.1), "batches": self.ended,
            "batch_size": ([], [], float(self.ended)), "submitted": self.submitted, "running": self.running,
        }  # fmt: skip
        return self.demand.look(stats, self.workers, self.refused)

    def second(self, arrived: int, ended: int, refused: int = 0) -> float:
        self.now += 1
        self.submitted += arrived
        self.ended += ended
        self.refused += refused
        return self.look()


def test_it_is_the_share_of_the_workers_time_that_arrives() -> None:
    lane = Lane(workers=2)
    assert lane.look() == 0.0
    assert [lane.second(10, 10) for _ in range(8)] == pytest.approx([0.5] * 8)


def test_it_is_above_one_where_a_queue_grows_and_where_requests_are_refused() -> None:
    growing, refusing = Lane(), Lane()
    growing.look(), refusing.look()
    for _ in range(8):
        assert growing.second(30, 10) == pytest.approx(3.0)
        assert refusing.second(10, 10, refused=20) == pytest.approx(3.0)


def test_a_queue_that_is_worked_off_is_not_asked_for_again() -> None:
    lane = Lane()
    lane.look()
    for _ in range(8):
        lane.second(30, 10)
    loads = [lane.second(2, 10) for _ in range(6)]
    assert loads[-1] == pytest.approx(0.2), "the worker is busy all the time"


def test_batches_that_take_longer_than_is_looked_at_are_known_to_run() -> None:
    lane = Lane(workers=4)
    lane.look()
    lane.running = 2
    assert [lane.second(0, 0) for _ in range(20)] == [0.5] * 20
    lane.running = 0
    assert lane.second(0, 0) == 0.0


def test_another_lane_in_its_place_begins_anew() -> None:
    lane = Lane()
    lane.look()
    lane.second(50, 10)
    lane.submitted = lane.ended = 0
    assert lane.second(0, 0) == 0.0
    assert lane.second(5, 5) == pytest.approx(0.5)


class Batches(Lane):
    """Batches of up to 8 take 100 ms and 10 ms for each request."""

    def batch(self, size: int, count: int) -> float:
        self.now += 1
        self.submitted += size * count
        self.requests = getattr(self, "requests", 0) + size * count
        self.ended += count
        self.busy_s = getattr(self, "busy_s", 0.0) + count * (0.1 + size * 0.01)
        stats: dict[str, Any] = {
            "staging": ([], [], 0.0), "inference": ([], [], self.busy_s), "batches": self.ended,
            "batch_size": ([], [], float(self.requests)), "submitted": self.submitted, "running": 0,
        }  # fmt: skip
        return self.demand.look(stats, self.workers, 0, batch_max=8)


def test_room_in_batches_counts_as_soon_as_sizes_have_differed() -> None:
    lane = Batches()
    lane.batch(1, 0)
    assert [lane.batch(2, 8) for _ in range(6)] == pytest.approx([0.96] * 6), "nothing is known but that it is busy"
    for _ in range(6):
        lane.batch(4, 7)
    for _ in range(6):
        load = lane.batch(2, 8)
    assert load == pytest.approx(16 / (8 / 0.18)), "16 requests of the 44 that it can serve in a second"
    for _ in range(6):
        load = lane.batch(8, 5)
    assert load == pytest.approx(40 / (8 / 0.18))


def test_without_a_gain_by_batches_there_is_no_room() -> None:
    lane = Lane()
    lane.look()
    for number in range(20):
        lane.second(5 + number % 3, 5 + number % 3)
    assert lane.second(6, 6) == pytest.approx(0.6, abs=0.05)


def test_without_workers_nothing_is_known() -> None:
    lane = Lane(workers=0)
    lane.look()
    assert lane.second(10, 0) == 0.0
