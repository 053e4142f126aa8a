"""Tests that speak to a `Wire` do so twice: to the protocol as it is, and to the one that has a native part in front.

The native part has no models here, so that it leaves every request alone; what it takes is told in
tests/fronts/test_fast_path.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pyserve.engine import load_core
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from tests.support import http1_wire


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if hasattr(metafunc.module, "Wire"):
        metafunc.parametrize("spoken", ["python", "native"], indirect=True)


@pytest.fixture(autouse=True)
def spoken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which protocol a `Wire` has."""
    if getattr(request, "param", "python") == "native":
        monkeypatch.setattr(http1_wire, "Http1Protocol", with_native_part)


def with_native_part(
    app: Callable[[Exchange], None], limits: Http1Limits, connections: Connections, loop: asyncio.AbstractEventLoop
) -> FastProtocol:
    core = load_core()
    path = core.FastPath(
        core.RowTable(), budget=connections.budget, call_soon=loop.call_soon, log=None, key_until=None,
        head_size_max=limits.head_size_max, line_size_max=limits.line_size_max,
        header_count_max=limits.header_count_max, body_size_max=limits.body_size_max, takes_ids=True,
        coded_size_min=1024, json_size_max=1024,
    )  # fmt: skip
    return FastProtocol(app, limits, connections, core.FastConnection(path), loop)
