"""Plays cases within a test, each on a server that is kept for the cases after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from tests.differential import golden
from tests.differential.case import MODES, Case
from tests.differential.compare import differences
from tests.differential.run import Servers


class Replay:
    """The last server of each mode; `check` plays a case on it."""

    def __init__(self, stack: ExitStack):
        self._servers = {mode: stack.enter_context(Servers(mode)) for mode in MODES}

    def check(self, case: Case, mode: str) -> None:
        """Fails with every difference that the case does not name."""
        recorded = golden.read(case.name)
        assert recorded is not None, f"nothing is recorded of TorchServe for {case.name}: make compat"
        for other in set(MODES) - {mode}:
            self._servers[other].close()
        found = differences(case, recorded, self._servers[mode].play(case), mode)
        if found:
            pytest.fail("\n".join(found), pytrace=False)


def in_order(cases: Sequence[Case]) -> list[Any]:
    """Parameters ``case`` and ``mode`` of a test, so that those which share a server follow each other."""
    return [pytest.param(case, mode, id=f"{mode}-{case}") for mode in MODES for case in cases]


def replays() -> Iterator[Replay]:
    """For a fixture with the scope of a module."""
    with ExitStack() as stack:
        yield Replay(stack)
