"""How long a request may wait and run, and what it is answered when that is over.

    queue limit      until a worker takes it     503, Lane.expire        the engine drops it, or the sweep does
    response_timeout from then on                504                     the sweep
    client's limit   from its arrival            503 or 504              a timer of its own

Loop thread only.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from pyserve.errors import DeadlineError, ExpiredError, ServeError
from pyserve.lanes.pending import OVER, Pending
from pyserve.lanes.refusals import retry_after, worker_died_error
from pyserve.lanes.reruns import RERUN
from pyserve.lanes.settings import ModelSettings
from pyserve.request.messages import TIMEOUT_HEADER

# Slack of the time limits: how often a lane looks for requests that are over them.
SWEEP_INTERVAL_S = 0.1


class SweptLane(Protocol):
    """What a sweep needs of its lane."""

    is_strict: bool
    settings: ModelSettings
    in_flight: dict[Pending, None]

    @property
    def in_flight_count(self) -> int:
        """Requests admitted and not answered."""

    def expire(self, pending: Pending) -> None:
        """Answers a request that no worker took in time."""

    def answer_error(self, pending: Pending, error: ServeError) -> None:
        """Answers a request."""

    def leaves_overrun(self, pending: Pending) -> bool:
        """Whether a request that has run for too long is left to the end of its batch, to be run again by itself."""

    def take_over_late(self, now: int) -> None:
        """Has among ``in_flight`` what only the engine knows so far and is over its time, in front."""

    def look_after_workers(self, now: int) -> bool:
        """Called with each sweep; returns whether another one is wanted although no request waits for an answer."""


class Sweep:
    """Looks at a lane's requests every SWEEP_INTERVAL_S, as long as there are any, and answers what is over its time.

    Attributes:
        timer: of the next look; None while there is none to come.
    """

    def __init__(self) -> None:
        self.timer: asyncio.TimerHandle | None = None

    def start(self, lane: SweptLane) -> None:
        """Looks soon, and from then on; does nothing if it does already."""
        # The lane is kept by the timer alone: of two that know each other the model's weights would come back only with
        # a garbage collection.
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._look, lane)

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _look(self, lane: SweptLane) -> None:
        """Nothing younger than the shorter limit can be over its time, so the scan is short."""
        self.timer = None
        settings = lane.settings
        queue_limit_s, run_limit_s = settings.queue_limit_s, float(settings.response_timeout_s)
        now = time.monotonic_ns()
        lane.take_over_late(now)
        for pending in list(lane.in_flight):
            if not pending.is_swept:
                continue
            age_s = (now - pending.arrived_at) / 1e9
            if age_s < min(queue_limit_s, run_limit_s):
                break
            started_at = pending.began_at()
            # A stream is over its time when it has stood still for as long.
            running_since = max(started_at, pending.progress_at)
            if started_at > 0 and (now - running_since) / 1e9 >= run_limit_s:
                if lane.leaves_overrun(pending):
                    continue
                pending.drop()
                pending.started_at = started_at
                lane.answer_error(pending, overrun_error(settings, pending, is_strict=lane.is_strict))
            elif started_at == 0 and age_s >= queue_limit_s:
                pending.drop()
                lane.expire(pending)
        if lane.look_after_workers(now) or lane.in_flight_count:
            self.start(lane)


def start_client_limit(pending: Pending) -> None:
    """Sees to it that the client has an answer when it stops waiting."""
    if pending.limit_timer is not None:  # it was another lane's
        pending.limit_timer.cancel()
    remaining_s = (pending.client_deadline - time.monotonic_ns()) / 1e9
    loop = asyncio.get_running_loop()
    pending.limit_timer = loop.call_later(max(0.0, remaining_s), _reach_client_limit, pending)


def _reach_client_limit(pending: Pending) -> None:
    """Its client waits no longer: what has not begun never runs, and what runs is not used."""
    pending.limit_timer = None
    if pending.stage == OVER:
        return
    if time.monotonic_ns() < pending.client_deadline:  # the loop's timers are coarser
        start_client_limit(pending)
        return
    started_at = pending.began_at()
    if started_at < 0:
        return  # it has just come to its end; its answer is on the way here
    pending.drop()
    if started_at == 0:
        pending.lane.expire(pending)
        return
    pending.started_at = started_at
    pending.lane.answer_error(pending, _client_limit_error(pending))


def expired_error(name: str, settings: ModelSettings, pending: Pending) -> ExpiredError:
    """For a request that no worker of the model ``name`` took in time."""
    age_s, limit_ms = pending.age_s(), pending.client_limit_ms()
    again = {"text": "it ran with others until their worker ended; no time was left to run it again"}
    limit = f"{settings.queue_limit_source}={settings.queue_limit_s:g} s"
    if limit_ms and age_s * 1e3 >= limit_ms and limit_ms < settings.queue_limit_s * 1e3:
        limit = f"{TIMEOUT_HEADER}={limit_ms}"
    return ExpiredError(
        f'Model "{name}" did not come to this request in time',
        detail={"reason": "expired", "queued_s": round(age_s, 3), "limit": limit}
        | (again if pending.flags & RERUN else {}),
        headers={"Retry-After": retry_after()},
    )


def _client_limit_error(pending: Pending) -> DeadlineError:
    queued_s, ran_s = pending.queue_s(), (time.monotonic_ns() - pending.started_at) / 1e9
    return DeadlineError(
        f"the model did not answer in the client's time: queued {queued_s:.3f} s, ran {ran_s:.3f} s, limit "
        f"{TIMEOUT_HEADER}={pending.client_limit_ms()}",
        detail={"reason": TIMEOUT_HEADER, "queued_s": round(queued_s, 3), "ran_s": round(ran_s, 3)},
    )


def overrun_error(settings: ModelSettings, pending: Pending, *, is_strict: bool) -> ServeError:
    """For a request that ran too long; its ``started_at`` is known."""
    if is_strict:
        return worker_died_error()
    queued_s, ran_s = pending.queue_s(), (time.monotonic_ns() - pending.started_at) / 1e9
    return DeadlineError(
        f"the model did not answer in time: queued {queued_s:.3f} s, ran {ran_s:.3f} s, limit "
        f"response_timeout={settings.response_timeout_s} s",
        detail={"reason": "response_timeout"},
    )


def handler_overrun(stage: str, settings: ModelSettings) -> DeadlineError:
    """For a request whose handler did not come to an end in ``stage``."""
    return DeadlineError(
        f"{stage} did not come to an end in time: limit response_timeout={settings.response_timeout_s} s",
        detail={"reason": "response_timeout", "where": stage},
    )
