"""A replica's own port, without Ray: its lifespan opens and closes it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.embedding.application import application
from pyserve.embedding.engine import EmbeddedServer
from pyserve.replicas.direct import DirectApplication, free_socket
from pyserve.replicas.replica import Replica
from pyserve.serving import ServingError
from tests.support.ports import free_port
from tests.support.serving_models import write_linear

KEY = "k" * 32


def lifespan() -> tuple[asyncio.Queue[dict[str, Any]], asyncio.Queue[dict[str, Any]]]:
    return asyncio.Queue(), asyncio.Queue()


@contextlib.asynccontextmanager
async def living(app: Any) -> AsyncIterator[dict[str, Any]]:
    """The answer to its start; it is stopped at the end."""
    came, sent = lifespan()
    running = asyncio.ensure_future(app({"type": "lifespan"}, came.get, sent.put))
    await came.put({"type": "lifespan.startup"})
    yield await sent.get()
    await came.put({"type": "lifespan.shutdown"})
    await running


def asked(port: int, key: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request("POST", "/predictions/linear", "[1, 2, 3, 4]", headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def keys(folder: Path, *scopes: str) -> str:
    path = folder / "keys.json"
    path.write_text(json.dumps({scope: {"key": KEY} for scope in scopes}))
    return str(path)


def test_it_listens_while_the_replica_lives_and_asks_for_a_key(tmp_path: Path) -> None:
    write_linear(tmp_path)
    port = free_port()

    async def main() -> None:
        config = {"token_file": keys(tmp_path, "inference", "management")}
        app = Replica([str(tmp_path / "linear.mar")], config, 1, port).__serve_build_asgi_app__()
        assert isinstance(app, DirectApplication)
        async with living(app) as started:
            assert started["type"] == "lifespan.startup.complete"
            assert app.address == f"0.0.0.0:{port}"
            status, body = await asyncio.to_thread(asked, port)
            assert status == 401 and b"key" in body.lower()
            assert (await asyncio.to_thread(asked, port, KEY))[0] == 200
        assert app.address == ""
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(asked, port, KEY)

    asyncio.run(main())


def test_a_file_without_a_key_for_predictions_does_not_open_it(tmp_path: Path) -> None:
    write_linear(tmp_path)
    port = free_port()

    async def main() -> None:
        engine = EmbeddedServer([str(tmp_path / "linear.mar")], config={"token_file": keys(tmp_path, "management")})
        async with living(DirectApplication(application(engine), port)) as started:
            assert started["type"] == "lifespan.startup.failed" and "no key for inference" in started["message"]
            assert not engine.is_started
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(asked, port)

    asyncio.run(main())


def test_the_next_free_port_is_taken() -> None:
    port = free_port()
    with free_socket("127.0.0.1", port) as first, free_socket("127.0.0.1", port) as second:
        assert (first.getsockname()[1], second.getsockname()[1] > port) == (port, True)


def test_ports_that_are_all_taken_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.replicas.direct.PORTS_MAX", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServingError, match="all taken"):
        free_socket("127.0.0.1", taken.getsockname()[1])
