"""A model store of a test's own, and a model in it that runs when the test lets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.networks import Gate, Gated
from tests.support.packing import pack
from tests.support.two_ways import either, front_end  # noqa: F401 - fixtures


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def gate(store: Path, tmp_path: Path) -> Gate:
    """Of the model m."""
    gate = Gate(tmp_path / "gate")
    pack(store, network=Gated(str(gate.path)))
    return gate
