"""Servers that take each other's place lose no request, whatever stands before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import rolling_restart

pytestmark = pytest.mark.server


def test_no_request_is_lost_by_rolling_restarts(tmp_path: Path, seed: int) -> None:
    missing = [front for front in rolling_restart.FRONTS if rolling_restart.missing(front)]
    fronts = [front for front in rolling_restart.FRONTS if front not in missing]
    clients = rolling_restart.run(fronts, requests=300, restarts=2, folder=tmp_path, seed=seed)
    assert {each.name: dict(each.lost) for each in clients if each.lost} == {}
    if missing:
        pytest.skip(f"{' and '.join(missing)}: not installed; without them nothing was lost")
