"""When a worker is followed by another one, on a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from pyserve.lanes.restart_policy import (
    LOAD_TRIES,
    PAUSE_FIRST_S,
    PAUSE_MAX_S,
    SERVED_S,
    STARTS_MAX,
    WINDOW_S,
    RestartPolicy,
)


class NoJitter(random.Random):
    def random(self) -> float:
        return 0.0


@pytest.fixture
def policy() -> RestartPolicy:
    return RestartPolicy(NoJitter())


def test_an_error_that_would_recur_is_final(policy: RestartPolicy) -> None:
    assert not policy.failed_to_load(0.0, repeats=True).restarts


def test_the_first_crash_costs_no_pause_and_the_next_ones_growing_pauses(policy: RestartPolicy) -> None:
    pauses = [policy.died(100.0 * number).delay_s for number in range(8)]
    assert pauses == [0.0, *(min(PAUSE_MAX_S, PAUSE_FIRST_S * 2**power) for power in range(7))]


def test_a_worker_that_served_for_long_starts_the_count_anew(policy: RestartPolicy) -> None:
    for number in range(4):
        policy.died(float(number))
    policy.ready(10.0)
    assert policy.died(10.0 + SERVED_S - 0.1).delay_s > 0
    policy.ready(100.0)
    assert policy.died(100.0 + SERVED_S).delay_s == 0


def test_loading_is_tried_a_few_times(policy: RestartPolicy) -> None:
    decisions = [policy.failed_to_load(float(number), repeats=False) for number in range(LOAD_TRIES)]
    assert [each.restarts for each in decisions] == [True] * (LOAD_TRIES - 1) + [False]
    policy.ready(10.0)
    assert policy.failed_to_load(11.0, repeats=False).restarts


def test_a_crash_loop_opens_the_breaker_until_the_minute_is_over(policy: RestartPolicy) -> None:
    starts = 0
    now = 0.0
    while not policy.is_open(now):
        policy.ready(now - SERVED_S)  # no pauses: only the breaker stands in the way
        decision = policy.died(now)
        starts += 1
        now += 0.1
    assert starts == STARTS_MAX + 1
    assert decision.restarts and decision.delay_s == pytest.approx(WINDOW_S, abs=2)
    assert policy.retry_after_s(now) == pytest.approx(decision.delay_s, abs=0.2)
    assert not policy.is_open(now + decision.delay_s)


def test_asking_for_workers_forgets_what_was(policy: RestartPolicy) -> None:
    for number in range(2 * STARTS_MAX):
        policy.died(number / 10)
    assert policy.is_open(2.0)
    policy.reset()
    assert not policy.is_open(2.0) and policy.died(2.0).delay_s == 0


def test_pauses_are_spread_by_at_most_a_quarter() -> None:
    seed = 7
    print(f"seed={seed}")
    policy = RestartPolicy(random.Random(seed))
    policy.died(0.0)
    pauses = set()
    for _ in range(20):
        policy.reset()
        policy.died(0.0)
        pauses.add(policy.died(0.0).delay_s)
    assert len(pauses) > 10 and all(PAUSE_FIRST_S <= each <= 1.25 * PAUSE_FIRST_S for each in pauses)
