"""When a worker is followed by another one, on a clock of the test's own."""

from __future__ import annotations

import random

import pytest

from pyserve.lanes.restart_policy import (
    KILLED_PAUSE_MAX_S,
    LOAD_PAUSES_S,
    PAUSE_MAX_S,
    PAUSE_SLOW_S,
    PAUSES_S,
    SERVED_S,
    STARTS_MAX,
    TRIES,
    WAIT_MAX_S,
    WINDOW_S,
    Cause,
    RestartPolicy,
)


class NoJitter(random.Random):
    def random(self) -> float:
        return 0.0


@pytest.fixture
def policy() -> RestartPolicy:
    return RestartPolicy(jitter=NoJitter())


@pytest.fixture
def served(policy: RestartPolicy) -> RestartPolicy:
    policy.ready(-1000.0)
    return policy


def test_an_error_that_would_recur_is_final_for_a_model_that_never_had_a_worker(policy: RestartPolicy) -> None:
    decision = policy.failed_to_load(0.0, repeats=True)
    assert decision.is_hopeless and not decision.restarts


def test_the_first_crash_costs_no_pause_and_the_next_ones_growing_pauses(served: RestartPolicy) -> None:
    pauses = []
    for number in range(10):
        now = 100.0 * number
        served.ready(now - SERVED_S / 2)  # none serves for long
        pauses.append(served.died(now).delay_s)
    assert pauses == [*PAUSES_S, PAUSE_MAX_S, PAUSE_MAX_S]
    assert sorted(PAUSES_S) == list(PAUSES_S) and PAUSES_S[0] == 0


def test_workers_that_are_killed_from_outside_are_back_within_a_second_each_time(served: RestartPolicy) -> None:
    for number in range(10 * STARTS_MAX):
        served.ready(float(number))
        decision = served.died(number + 0.5, Cause.KILLED)
        assert decision.restarts and 1.25 * decision.delay_s < 1
    assert decision.delay_s == KILLED_PAUSE_MAX_S


def test_what_ends_with_its_zygote_is_no_failure_of_the_model(policy: RestartPolicy) -> None:
    for number in range(10 * STARTS_MAX):
        decision = policy.failed_to_load(float(number), cause=Cause.LOST)
        assert decision.restarts and not decision.is_hopeless and decision.delay_s == 0
        assert policy.died(float(number), Cause.LOST).delay_s == 0
    policy.ready(1000.0)
    assert policy.died(1001.0).delay_s == 0  # the first that counts


def test_a_worker_that_served_for_long_starts_the_count_anew(policy: RestartPolicy) -> None:
    for number in range(4):
        policy.died(float(number))
    policy.ready(10.0)
    assert policy.died(10.0 + SERVED_S - 0.1).delay_s > 0
    policy.ready(100.0)
    assert policy.died(100.0 + SERVED_S).delay_s == 0


@pytest.mark.parametrize("cause", [Cause.MODEL, Cause.MACHINE, Cause.KILLED])
def test_a_model_that_never_had_a_worker_is_tried_a_few_times(policy: RestartPolicy, cause: Cause) -> None:
    decisions = [policy.failed_to_load(20.0 * number, cause=cause) for number in range(TRIES[cause])]
    assert [each.restarts for each in decisions] == [True] * (TRIES[cause] - 1) + [False]
    assert [each.is_hopeless for each in decisions] == [False] * (TRIES[cause] - 1) + [True]


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("cause", [Cause.MODEL, Cause.MACHINE, Cause.KILLED])
def test_a_model_that_had_a_worker_is_never_given_up(served: RestartPolicy, cause: Cause, repeats: bool) -> None:
    now, pauses = 0.0, []
    while now < 3600:
        decision = served.failed_to_load(now, cause=cause, repeats=repeats)
        assert decision.restarts
        pauses.append(decision.delay_s)
        now += decision.delay_s
    quick = pauses[: len(LOAD_PAUSES_S)]
    assert quick == list(LOAD_PAUSES_S)
    assert PAUSE_MAX_S in pauses and pauses[-1] == PAUSE_SLOW_S
    assert max(pauses) <= WINDOW_S
    assert decision.is_hopeless  # nobody need wait for it
    served.ready(now)
    assert served.failed_to_load(now + 1).delay_s == 0


def test_loading_is_tried_quickly_for_as_long_as_the_model_says() -> None:
    policy = RestartPolicy(retry_s=5.0, jitter=NoJitter())
    policy.ready(0.0)
    assert policy.failed_to_load(10.0).delay_s == 0
    assert policy.failed_to_load(14.9).delay_s < WAIT_MAX_S
    assert policy.failed_to_load(15.0).delay_s == PAUSE_SLOW_S


def test_workers_that_fail_together_count_once(policy: RestartPolicy) -> None:
    for start in (0.0, 10.0):
        decisions = [policy.failed_to_load(start + 1 + each / 10, started_at=start) for each in range(4)]
        assert all(decision.restarts for decision in decisions)
    assert not policy.failed_to_load(21.0, started_at=20.0).restarts


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
    assert not policy.is_open(now + decision.delay_s)


@pytest.mark.parametrize("slots", [1, 4, 30])
def test_no_minute_has_more_starts_than_the_breaker_allows(served: RestartPolicy, slots: int) -> None:
    """All workers of a model crash a tenth of a second after each start, for an hour."""
    due = [0.0] * slots
    starts = []
    while min(due) < 3600:
        now = min(due)
        index = due.index(now)
        starts.append(now)
        due[index] = now + 0.1 + served.failed_to_load(now + 0.1, started_at=now).delay_s
    starts = starts[slots:]  # those that were asked for
    for first, start in zip(starts, starts[STARTS_MAX:], strict=False):
        assert start - first >= WINDOW_S - 0.2
    assert len(starts) >= 60


def test_asking_for_workers_forgets_what_was(policy: RestartPolicy) -> None:
    for number in range(2 * STARTS_MAX):
        policy.died(number / 10)
    assert policy.is_open(2.0)
    policy.reset()
    assert not policy.is_open(2.0) and policy.died(2.0).delay_s == 0


def test_pauses_are_spread_by_at_most_a_quarter() -> None:
    seed = 7
    print(f"seed={seed}")
    policy = RestartPolicy(jitter=random.Random(seed))
    pauses = set()
    for _ in range(20):
        policy.reset()
        policy.died(0.0)
        pauses.add(policy.died(0.0).delay_s)
    assert len(pauses) > 10 and all(PAUSES_S[1] <= each <= 1.25 * PAUSES_S[1] for each in pauses)


def test_a_death_in_a_second_run_is_no_further_sign_of_a_crash_loop() -> None:
    policy = RestartPolicy()
    assert policy.died(0.0).delay_s == 0
    for number in range(1, 4):  # of the requests of that batch
        assert policy.died(number / 10, is_known=True).delay_s == 0
    assert policy.died(1.0).delay_s > 0
    for number in range(10):
        decision = policy.died(2.0 + number, is_known=True)
    assert decision.is_hopeless and decision.delay_s > 30  # they count among the starts of a minute
