"""The same requests to a server by its socket and through Ray: the same answers."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from typing import Any

import pytest

from tests.embedding.test_asgi_differential import CONFIG, HANDLER, REQUESTS, shown
from tests.support.handler_archives import write_handler
from tests.support.raw_http import Raw, exchange
from tests.support.ray_nodes import RayNodes
from tests.support.serving import Server
from tests.support.serving_models import write_linear

pytest.importorskip("ray", reason='ray is missing, so that NOTHING of clusters is checked: pip install "ray[serve]"')
pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.slow]

# Of HTTP itself, which Ray's proxy reads: what it answers, it answers without us.
PROXYS = {
    "TRACE", "another method", "a host that is none", "no host", "two hosts", "two lengths", "a length and chunks",
    "a length that is none", "another coding", "an expectation", "many headers", "a long head", "a long line",
    "an id that is none",
}  # fmt: skip
# Headers of Ray's proxy, and what only a connection of one's own shows.
HEADERS = {"server", "x-request-id", "pyserve-generation", "date", "vary", "content-length"}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, RayNodes]]:
    folder = tmp_path_factory.mktemp("sockets")
    server = Server(folder)
    server.environment |= {f"PYSERVE_{key.upper()}": str(value).lower() for key, value in CONFIG.items()}
    server.environment["PYSERVE_CONSOLE"] = "false"
    write_linear(server.store)
    write_handler(server.store, "own", HANDLER)
    with server, RayNodes(tmp_path_factory.mktemp("ray")) as nodes:
        server.start("--models", "all")
        nodes.do("add_node", name="one", num_cpus=1)
        models = [str(server.store / name) for name in ("linear.mar", "own.mar")]
        args: dict[str, Any] = {"models": models, "config": CONFIG}
        nodes.do("run", args=args, name="parity", prefix="/")
        yield server, nodes


def through_ray(nodes: RayNodes, data: bytes) -> Raw:
    import socket

    with socket.create_connection(("127.0.0.1", nodes.port), timeout=60) as connection:
        connection.sendall(data)
        answer = http.client.HTTPResponse(connection, method=data.split(b" ", 1)[0].decode())
        answer.begin()
        return Raw("HTTP/1.1", answer.status, answer.reason, answer.getheaders(), answer.read(), False)


def compared(answer: Raw) -> tuple[int, dict[str, str], bytes]:
    headers = [(name, value) for name, value in answer.headers if name.lower() not in HEADERS]
    status, found, body = shown(answer._replace(headers=[*headers, ("X-Request-Id", "a"), ("Content-Length", "0")]))
    return status, {key: value for key, value in found.items() if key not in HEADERS}, body


@pytest.mark.parametrize("name", [name for name in REQUESTS if name not in PROXYS])
def test_it_is_answered_alike(sites: tuple[Server, RayNodes], name: str) -> None:
    server, nodes = sites
    if name == "ready":  # tells which generation of what the cluster serves this is, too
        assert b'"generation": 1' in through_ray(nodes, REQUESTS[name]).body
        return
    assert compared(through_ray(nodes, REQUESTS[name])) == compared(exchange(server, REQUESTS[name]))
