"""What each front end has of the server's limits."""

from __future__ import annotations

import pytest

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.fronts.shares import Shares
from pyserve.http1.limits import Http1Limits


@pytest.mark.parametrize("count", [2, 3, 8, 38])
def test_all_together_have_no_more_than_one(count: int) -> None:
    config = Config(front_ends=count)
    shares = Shares.of(config)
    assert shares.body_budget_size == Http1Limits().body_budget_size
    budget = shares.new_budget()
    assert budget.size_max == shares.body_budget_size and budget.floor_size * (count + 1) <= budget.size_max // 16
    assert shares.connection_count_max * count <= config.connection_count_max
    assert shares.body_budget_size >= config.max_request_size


@pytest.mark.parametrize(
    "settings", [{"front_ends": 3, "connection_count_max": 2}, {"front_ends": 64, "connection_count_max": 63}]
)
def test_what_cannot_be_divided_is_named(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"connection_count_max={settings['connection_count_max']} cannot be divided"):
        Shares.of(Config(**settings))  # type: ignore[arg-type]


def test_a_request_of_the_size_that_is_allowed_is_never_one_too_many() -> None:
    assert Shares.of(Config(front_ends=8, max_request_size=400_000_000)).body_budget_size == 400_000_000
