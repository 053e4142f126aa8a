"""Each folder here is an archive, a call or a complaint as people have them, with what must happen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.differential import replay
from tests.differential.case import FIELD, Case, all_cases

CASES = all_cases(FIELD)


@pytest.fixture(scope="module")
def servers() -> Iterator[replay.Replay]:
    yield from replay.replays()


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), replay.in_order(CASES))
def test_what_must_happen_does(case: Case, mode: str, servers: replay.Replay) -> None:
    servers.check(case, mode)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_case_says_what_must_happen(case: Case) -> None:
    assert any(call.expect for call in case.calls)
