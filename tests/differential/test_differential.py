"""pyserve answers what TorchServe was observed to answer, call by call, but for what DEVIATIONS.md lists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.differential import golden, replay
from tests.differential.case import CASES, FIELD, Case, all_cases, shared_archives
from tests.differential.compare import RULES, is_row

CASES_HERE = all_cases(CASES)


@pytest.fixture(scope="module")
def servers() -> Iterator[replay.Replay]:
    yield from replay.replays()


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize(("case", "mode"), replay.in_order(CASES_HERE))
def test_answers_as_torchserve_does(case: Case, mode: str, servers: replay.Replay) -> None:
    servers.check(case, mode)


def test_every_difference_names_a_row_of_the_table() -> None:
    unknown = {
        f"{case.name}: {each['row']}"
        for case in [*CASES_HERE, *all_cases(FIELD)]
        for call in case.calls
        for each in call.differs.values()
        if not is_row(each["row"])
    }
    assert not unknown, "\n".join(sorted(unknown))


def test_what_differs_in_every_answer_is_in_the_table() -> None:
    assert all(is_row(rule.row) for rule in RULES)


def test_what_is_recorded_belongs_to_a_case() -> None:
    names = {case.name for case in [*CASES_HERE, *all_cases(FIELD)]}
    recorded = {name for path in golden.GOLDEN.glob("*.json") for name in golden.names(path)}
    assert recorded == names


def test_there_are_as_many_cases_as_are_claimed() -> None:
    cases = [*CASES_HERE, *all_cases(FIELD)]
    assert sum(len(case.calls) for case in cases) >= 400
    inline = {id(spec) for case in cases for spec in case.archives.values()} - {*map(id, shared_archives().values())}
    assert len(inline) + len(shared_archives()) >= 80
