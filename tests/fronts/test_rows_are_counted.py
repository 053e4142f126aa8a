"""What the engine answered by itself is counted, whatever becomes of the other requests of its batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pyserve.engine import Engine


class Lane:
    """Stands in for a lane that takes rows."""

    def __init__(self, fails: bool = False):
        self.counted: list[Any] = []
        self._fails = fails

    def rows_answered(self, completion: Any) -> None:
        self.counted.append(completion)
        if self._fails:
            raise RuntimeError("planted")


class Owner:
    """A request whose lane cannot be told that it expired."""

    lane = property(lambda self: (_ for _ in ()).throw(RuntimeError("planted")))


def completion(lane: Lane, *expired: object) -> Any:
    return SimpleNamespace(expired=list(expired), owners=[], row_lane=lane)


def drained(*completions: Any) -> Engine:
    engine = Engine.__new__(Engine)
    engine._engine = cast(Any, SimpleNamespace(drain=lambda: list(completions), signals=0))
    engine._signals, engine.has_rows = 0, True
    engine._memory_at_rest = cast(Any, SimpleNamespace(note_batch=lambda: None))
    return engine


def test_they_are_though_delivering_the_others_fails(caplog: pytest.LogCaptureFixture) -> None:
    first, second = completion(Lane(), Owner()), completion(Lane())
    drained(first, second)._on_readable()
    assert first.row_lane.counted == [first] and second.row_lane.counted == [second]
    assert "delivering a batch failed" in caplog.text


def test_one_lane_that_fails_leaves_the_others_their_answers(caplog: pytest.LogCaptureFixture) -> None:
    first, second = completion(Lane(fails=True)), completion(Lane())
    drained(first, second)._on_readable()
    assert second.row_lane.counted == [second] and "counting a batch failed" in caplog.text
