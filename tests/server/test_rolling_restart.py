"""Servers that take each other's place lose no request, whatever stands before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import rolling_restart

pytestmark = pytest.mark.server


def test_no_request_is_lost_by_rolling_restarts(tmp_path: Path, seed: int) -> None:
    fronts = [front for front in rolling_restart.FRONTS if not rolling_restart.missing(front)]
    clients = rolling_restart.run(fronts, requests=300, restarts=2, folder=tmp_path, seed=seed)
    assert {each.name: dict(each.lost) for each in clients} == dict.fromkeys(fronts, {})


@pytest.mark.parametrize("front", ["nginx", "haproxy"])
def test_proxies_are_there(front: str) -> None:
    if rolling_restart.missing(front):
        pytest.skip(f"{front} is not installed: rolling restarts were not tried behind it")
