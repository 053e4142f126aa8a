"""What the workers of a model come to, all in all."""

from __future__ import annotations

import pytest

from pyserve.errors import ModelLoadError
from pyserve.lanes.restart_policy import WAIT_MAX_S, Decision
from pyserve.lanes.worker_slot import (
    COMING,
    DOWN,
    GIVEN_UP,
    IDLE,
    SERVING,
    Condition,
    Slot,
    condition_of,
    joined,
)

SOON = Decision(True, WAIT_MAX_S / 2, "")
LATE = Decision(True, 10 * WAIT_MAX_S, "", is_hopeless=True)
NEVER = Decision(False, 0.0, "", is_hopeless=True)
ERROR = ModelLoadError("boom", detail={"exception": "ValueError"})


def slot(*steps: Decision | str) -> Slot:
    """A slot that has gone through ``steps``: ends, or ``"begin"`` and ``"loaded"``."""
    made = Slot(0)
    for step in steps:
        if isinstance(step, str):
            getattr(made, step)()
        else:
            made.ended("boom", ERROR, step)
    return made


@pytest.mark.parametrize(
    "slots, state",
    [
        ([], IDLE),
        ([slot()], COMING),
        ([slot("loaded")], SERVING),
        ([slot("loaded", SOON)], COMING),
        ([slot("loaded", SOON, "begin")], COMING),
        ([slot("loaded", LATE)], DOWN),
        ([slot("loaded", LATE, "begin")], DOWN),  # until one is loaded, nobody is made to wait for it
        ([slot("loaded", LATE, "begin", SOON)], DOWN),
        ([slot("loaded", LATE, "begin", "loaded")], SERVING),
        ([slot("loaded", LATE, "begin", "loaded", SOON)], COMING),
        ([slot(NEVER)], GIVEN_UP),
        ([slot("loaded", LATE), slot("loaded", SOON)], COMING),
        ([slot("loaded", LATE), slot("loaded")], SERVING),
        ([slot(NEVER), slot("loaded", LATE)], DOWN),
    ],
)
def test_the_best_worker_decides(slots: list[Slot], state: str) -> None:
    condition = condition_of(slots, None)
    assert condition.state == state
    assert condition.may_take == (state in (SERVING, COMING))
    assert condition.recovers == (state in (COMING, DOWN))


def test_the_last_error_is_told_while_there_is_no_worker() -> None:
    down = slot("loaded", LATE)
    condition = condition_of([down], down)
    assert (condition.error, condition.failure) == ("boom", ERROR)
    assert 1 <= condition.retry_after_s <= 10 * WAIT_MAX_S
    assert condition_of([down, slot("loaded")], down) == Condition(SERVING)


def test_several_lanes_are_as_well_as_the_best_of_them() -> None:
    serving, idle = Condition(SERVING), Condition(IDLE)
    coming, down, lost = Condition(COMING, "a"), Condition(DOWN, "b", next_start_at=5.0), Condition(GIVEN_UP, "c")
    assert joined([down, serving, lost], down) == serving
    assert joined([lost, down, coming], down) == Condition(COMING, "b")
    assert joined([lost, down], lost) == Condition(DOWN, "c", next_start_at=5.0)
    assert joined([lost, idle], None).state == GIVEN_UP
    assert joined([], None) == idle


def test_whoever_waits_for_a_worker_is_told_when_there_is_no_hope() -> None:
    assert not slot().is_settled and not slot(SOON).is_settled
    assert slot("loaded").is_settled and slot(LATE).is_settled and slot(NEVER).is_settled
