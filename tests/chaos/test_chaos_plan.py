"""The plan is a function of the seed, and the ledger excuses what a fault may cost and nothing else."""

from __future__ import annotations

import pytest

from tests.chaos import ledger
from tests.chaos.fault import SERVER_DOWN, worker_down
from tests.chaos.ledger import Cost, Expectations, Ledger, Record, Window
from tests.chaos.plan import make_plan

WEIGHTS = {"a": 1, "b": 5, "c": 20}


def record(outcome: str, sent_at: float = 1.0, ended_at: float = 2.0, **fields: object) -> Record:
    return Record("1-1", "echo", "echo", sent_at, ended_at, outcome, **fields)  # type: ignore[arg-type]


def test_a_seed_gives_the_same_plan_and_another_seed_another_one(seed: int) -> None:
    plans = [make_plan(each, requests=5000, faults=40, weights=WEIGHTS) for each in (seed, seed, seed + 1)]
    assert plans[0] == plans[1] != plans[2]


def test_steps_come_in_order_within_the_requests_and_every_class_comes(seed: int) -> None:
    plan = make_plan(seed, requests=5000, faults=40, weights=WEIGHTS)
    assert [step.number for step in plan] == list(range(1, 41))
    assert [step.at for step in plan] == sorted(step.at for step in plan)
    assert all(0 <= step.at <= 5000 and step.hold > 0 for step in plan)
    assert {step.fault for step in plan} == set(WEIGHTS)


def test_a_longer_campaign_of_the_same_seed_keeps_the_classes_weights(seed: int) -> None:
    plan = make_plan(seed, requests=100_000, faults=2000, weights=WEIGHTS)
    counts = [sum(step.fault == name for step in plan) for name in "abc"]
    assert counts == sorted(counts)


@pytest.mark.parametrize("outcome", sorted(ledger.NEVER))
def test_nothing_excuses_a_wrong_answer(outcome: str) -> None:
    window = Window(1, "any", (Cost(outcome),), 0.0, 10.0)
    assert not window.excuses(record(outcome))


def test_a_loss_is_excused_by_a_fault_that_may_cost_it_at_that_time_only() -> None:
    window = Window(1, "kill-server", SERVER_DOWN, begun_at=5.0, over_at=6.0)
    assert window.excuses(record(ledger.LOST, 4.0, 5.5))
    assert window.excuses(record(ledger.LOST, 5.9, 7.0))
    assert not window.excuses(record(ledger.LOST, 3.0, 4.9))
    assert not window.excuses(record(ledger.LOST, 6.1, 7.0))


def test_a_killed_worker_excuses_errors_of_its_model_and_no_loss() -> None:
    window = Window(1, "kill-worker", worker_down("echo"), 0.0, 10.0)
    assert window.excuses(record(ledger.REFUSED, status=500))
    assert not window.excuses(record(ledger.LOST))
    assert not window.excuses(record(ledger.REFUSED, status=404))
    assert not Window(1, "kill-worker", worker_down("adder"), 0.0, 10.0).excuses(record(ledger.REFUSED, status=500))


def test_the_ledger_names_what_no_window_excuses() -> None:
    kept = Ledger([Window(1, "kill-server", SERVER_DOWN, 5.0, 6.0)])
    kept.records = [record(ledger.LOST, 5.0, 5.5), record(ledger.LOST, 8.0, 9.0), record(ledger.WRONG, 5.0, 5.5)]
    assert kept.unexcused() == kept.records[1:]
    assert kept.counts() == {ledger.LOST: 2, ledger.WRONG: 1}


def test_a_wrong_answer_that_another_request_was_to_get_is_swapped() -> None:
    expectations = Expectations()
    expectations.remember("1-1", [b"one"])
    expectations.remember("1-2", [b"two"])
    assert expectations.name(b"two", "1-1") == ledger.SWAPPED
    assert expectations.name(b"three", "1-1") == ledger.WRONG
