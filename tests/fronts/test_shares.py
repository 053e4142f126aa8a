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
    assert shares.body_budget_size * (count + 1) <= Http1Limits().body_budget_size
    assert shares.connection_count_max * count <= config.connection_count_max
    assert shares.body_budget_size >= config.max_request_size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"front_ends": 2, "max_request_size": 90_000_000}, "89478485 each, which is less than max_request_size=9"),
        ({"front_ends": 64}, "less than max_request_size"),
        ({"front_ends": 3, "connection_count_max": 2}, "connection_count_max=2 cannot be divided"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_named(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Shares.of(Config(**settings))  # type: ignore[arg-type]
