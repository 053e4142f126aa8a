"""The sweep over a lane's requests and the clients' own limits, with a lane that only notes what it is asked."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from pyserve.errors import ServeError
from pyserve.lanes.limits import Sweep, expired_error, start_client_limit
from pyserve.lanes.pending import OVER, PREPARING, SUBMITTED, Pending
from pyserve.lanes.settings import ModelSettings
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request

S = 1_000_000_000
WAITING, ENDED = 0, -1


class Core:
    """``began``: ticket -> when it began to run, ns; WAITING or ENDED."""

    def __init__(self) -> None:
        self.began: dict[int, int] = {}
        self.cancelled: list[int] = []

    def started_at(self, ticket: int) -> int:
        return self.began[ticket]

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)


class Lane:
    """Notes what becomes of its requests. ``looks``: how often workers are still looked after without a request."""

    def __init__(self, *, is_strict: bool = False, looks: int = 0, **settings: Any):
        self.core = Core()
        self.is_strict = is_strict
        self.settings = ModelSettings(**settings)
        self.in_flight: dict[Pending, None] = {}
        self.expired: list[Pending] = []
        self.errors: dict[Pending, ServeError] = {}
        self.looks = looks
        self.left: list[Pending] = []

    def add(self, age_s: float, began: int | None, *, limit_ms: int = 0, kind: type[Pending] = Pending) -> Pending:
        """A request of that age. ``began``: as in `Core`; None for one that is not submitted."""
        headers = [("x-request-timeout-ms", str(limit_ms))] if limit_ms else []
        request = Request(
            "POST", "/predictions/m", headers=headers, id="r", arrived_at=time.monotonic_ns() - int(age_s * S),
            has_timing=bool(limit_ms),
        )  # fmt: skip
        pending = kind(self, Exchange(request, lambda exchange: None), "1.0", "default")
        if began is not None:
            pending.ticket, pending.stage = len(self.in_flight), SUBMITTED
            self.core.began[pending.ticket] = began
        self.in_flight[pending] = None
        return pending

    def _end(self, pending: Pending) -> None:
        pending.stage = OVER
        self.in_flight.pop(pending, None)

    def expire(self, pending: Pending) -> None:
        self._end(pending)
        self.expired.append(pending)

    def answer_error(self, pending: Pending, error: ServeError) -> None:
        self._end(pending)
        self.errors[pending] = error

    def leaves_overrun(self, pending: Pending) -> bool:
        return pending in self.left

    @property
    def in_flight_count(self) -> int:
        return len(self.in_flight)

    def take_over_late(self, now: int) -> None:
        """It has none that only the engine knows."""

    def look_after_workers(self, now: int) -> bool:
        self.looks -= 1
        return self.looks >= 0


def swept(lane: Lane, is_done: Callable[[], bool]) -> None:
    async def sweep() -> None:
        sweep = Sweep()
        sweep.start(lane)
        while not is_done():  # noqa: ASYNC110 - a timer is waited for, which nothing reports
            await asyncio.sleep(0.01)
        sweep.stop()

    asyncio.run(asyncio.wait_for(sweep(), 60))


def test_what_no_worker_took_in_time_expires_and_never_runs() -> None:
    lane = Lane(client_timeout_ms=3_600_000, response_timeout_s=3600)  # so that the young one stays young
    preparing, queued = lane.add(9000, None), lane.add(9000, WAITING)
    running, ended, young = lane.add(9000, time.monotonic_ns()), lane.add(9000, ENDED), lane.add(0, WAITING)
    swept(lane, lambda: len(lane.expired) == 2)
    assert lane.expired == [preparing, queued] and lane.core.cancelled == [queued.ticket]
    assert list(lane.in_flight) == [running, ended, young] and not lane.errors


@pytest.mark.parametrize(("is_strict", "status"), [(False, 504), (True, 500)])
def test_what_runs_over_its_time_is_answered_and_not_used(is_strict: bool, status: int) -> None:
    lane = Lane(is_strict=is_strict, response_timeout_s=2)
    late, stream = lane.add(10, WAITING), lane.add(10, WAITING)
    began = late.exchange.request.arrived_at + S
    lane.core.began = dict.fromkeys(lane.core.began, began)
    stream.progress_at = time.monotonic_ns() + 3600 * S  # a part has just come
    swept(lane, lambda: bool(lane.errors))
    error = lane.errors[late]
    assert (list(lane.errors), error.status, late.started_at) == ([late], status, began)
    assert lane.core.cancelled == [late.ticket]
    if not is_strict:
        ran = re.search(r"queued 1\.000 s, ran ([0-9.]+) s", error.message)
        assert ran is not None and float(ran[1]) >= 9 and "response_timeout=2 s" in error.message


def test_what_is_left_to_the_end_of_its_batch_is_not_answered() -> None:
    lane = Lane(response_timeout_s=2, client_timeout_ms=100_000)
    began = time.monotonic_ns() - 9 * S
    left, late = lane.add(10, began), lane.add(10, began)
    lane.left.append(left)
    swept(lane, lambda: bool(lane.errors))
    assert list(lane.errors) == [late] and list(lane.in_flight) == [left] and lane.core.cancelled == [late.ticket]


def test_requests_that_are_young_are_not_looked_at_one_by_one() -> None:
    lane = Lane(client_timeout_ms=3_600_000, response_timeout_s=3600)
    lane.add(0, WAITING)
    behind = lane.add(9000, WAITING)  # never older than those before it; this one shows that the scan has ended
    lane.looks = 2
    swept(lane, lambda: lane.looks <= 0)
    assert behind in lane.in_flight


class Whole(Pending):
    """One whose rows have the limits."""

    @property
    def is_swept(self) -> bool:
        return False


def test_requests_without_the_lanes_limits_are_passed_over() -> None:
    lane = Lane(client_timeout_ms=5_000)
    whole, behind = lane.add(60, WAITING, kind=Whole), lane.add(60, WAITING)
    swept(lane, lambda: bool(lane.expired))
    assert lane.expired == [behind] and whole in lane.in_flight


def test_a_sweep_continues_while_a_worker_is_to_be_looked_after() -> None:
    lane = Lane(looks=3)

    async def sweep() -> int:
        sweep = Sweep()
        sweep.start(lane)
        while sweep.timer is not None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        return lane.looks

    assert asyncio.run(asyncio.wait_for(sweep(), 60)) == -1


@pytest.mark.parametrize(
    ("began", "status"), [(None, 0), (WAITING, 0), (time.monotonic_ns(), 504)], ids=["preparing", "queued", "running"]
)
def test_a_client_that_waits_no_longer_is_answered(began: int | None, status: int) -> None:
    async def test() -> None:
        lane = Lane()
        pending = lane.add(0, began, limit_ms=20)
        start_client_limit(pending)
        while lane.in_flight:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
        assert time.monotonic_ns() >= pending.client_deadline
        assert lane.core.cancelled == ([] if began is None else [pending.ticket])
        if status:
            assert (lane.errors[pending].status, lane.errors[pending].detail["reason"]) == (504, "x-request-timeout-ms")
        else:
            assert lane.expired == [pending]
            assert expired_error("m", lane.settings, pending).detail["limit"] == "x-request-timeout-ms=20"

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("stage", [SUBMITTED, OVER])
def test_a_limit_leaves_alone_what_has_come_to_its_end(stage: int) -> None:
    async def test() -> None:
        lane = Lane()
        pending = lane.add(0, ENDED, limit_ms=1)
        pending.stage = stage
        start_client_limit(pending)
        while pending.limit_timer is not None:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.005)
        assert not (lane.expired or lane.errors or lane.core.cancelled)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_request_handed_to_another_lane_has_one_limit() -> None:
    async def test() -> None:
        lane = Lane()
        pending = lane.add(0, None, limit_ms=60_000)
        start_client_limit(pending)
        first = pending.limit_timer
        start_client_limit(pending)
        assert first is not None and first.cancelled() and pending.limit_timer is not first
        assert pending.stage == PREPARING

    asyncio.run(test())
