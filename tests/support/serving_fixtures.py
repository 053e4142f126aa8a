"""Fixtures of the tests that serve; a plug-in, so that one server is shared by several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import serving_models
from tests.support.browser import open_browser
from tests.support.serving import Server


@pytest.fixture(scope="session")
def session_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives that many tests serve; read only."""
    store = tmp_path_factory.mktemp("serving") / "store"
    serving_models.write_linear(store)
    serving_models.write_linear(store, version="2.0", seed=2, file="linear-2")
    serving_models.write_burn(store)
    serving_models.write_pictures(store)
    return store


@pytest.fixture(scope="session")
def site(session_store: Path) -> Iterator[Server]:
    """A running server with ``linear``, ``burn`` and ``pictures``; leave it as you found it."""
    server = Server(session_store.parent, session_store)
    server.start("--models", "linear.mar", "burn.mar", "pictures.mar")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(tmp_path: Path, session_store: Path) -> Iterator[Server]:
    """A server of the test's own, not started yet, with a model store of its own."""
    made = Server(tmp_path, cache=session_store.parent / "cache")
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")  # no longer: playwright runs an event loop meanwhile
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    yield from open_browser()
