"""The planted bugs still have their places in the code, and the page says which tests find them: see mutants.py."""

from __future__ import annotations

import pytest

from tests.simdev import mutants
from tests.simdev.planted import BUGS, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    assert mutants.mutated(bug) != (mutants.ROOT / "csrc" / bug.file).read_text()


def test_a_bug_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times"):
        mutants.mutated(BUGS[0]._replace(edits=[("no such line", "")]))


def test_the_page_names_every_bug() -> None:
    page = mutants.TABLE.read_text()
    assert [bug.name for bug in BUGS if f"| {bug.what} |" not in page] == [], "run `make mutants`"
