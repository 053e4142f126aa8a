"""Front ends that decode for those who show the key, and for nobody else: also while keys are replaced."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.serving import LIMIT_S, RAW, Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

BODY = struct.pack("<4f", 1, 2, 3, 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with two front ends, and keys for all that there is to ask."""
    server = Server(tmp_path_factory.mktemp("keys"))
    write_linear(server.store, "linear")
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "all", "--front-ends", "2")
    server.wait_for(lambda: crossed(server, server.key("inference")), "tensors to cross")
    try:
        yield server
    finally:
        server.run("stop")
        server.kill()


def crossed(server: Server, key: dict[str, str]) -> bool:
    before = server.metric("pyserve_front_end_tensors_total")
    assert server.ask("POST", "/predictions/linear", BODY, RAW | key).status == 200
    return server.metric("pyserve_front_end_tensors_total") > before


def test_with_the_key_tensors_cross(pair: Server) -> None:
    assert all(crossed(pair, pair.key("inference")) for _ in range(8))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "token missing"), ({"Authorization": "Bearer wrong"}, "token wrong"),
        ({"Authorization": "Basic x"}, "token malformed"), (None, "token of another scope"),
    ],
)  # fmt: skip
def test_without_it_the_engine_says_why_not(pair: Server, given: dict[str, str] | None, reason: str) -> None:
    before = pair.metric("pyserve_front_end_tensors_total")
    headers = pair.key("management") if given is None else given
    for _ in range(4):
        answer = pair.ask("POST", "/predictions/linear", BODY, RAW | headers)
        assert answer.status == 401 and answer.detail["reason"] == reason
    assert pair.metric("pyserve_front_end_tensors_total") == before


def test_a_key_that_was_replaced_opens_nothing_from_that_moment_on(pair: Server) -> None:
    clients = [pair.client() for _ in range(12)]  # in both front ends, all but surely
    stop = threading.Event()
    wrong: list[int] = []

    def keep_asking() -> None:
        with pair.client() as client:
            while not stop.is_set():
                status = client.ask("POST", "/predictions/linear", BODY, RAW | pair.key("inference")).status
                if status not in (200, 401):  # 401: the file has changed a moment before, or is about to
                    wrong.append(status)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for _ in range(6):
            old = pair.key("inference")
            for client in clients:
                assert client.ask("POST", "/predictions/linear", BODY, RAW | old).status == 200
            assert pair.ask("GET", "/token?type=inference", None, pair.key("API"), port="management").status == 200
            for client in clients:
                assert client.ask("POST", "/predictions/linear", BODY, RAW | old).status == 401
                assert client.ask("POST", "/predictions/linear", BODY, RAW | pair.key("inference")).status == 200
    finally:
        stop.set()
        asking.join(LIMIT_S)
    assert not wrong
    pair.wait_for(lambda: crossed(pair, pair.key("inference")), "tensors to cross again")


def test_the_key_itself_is_not_told(pair: Server) -> None:
    key = json.loads((pair.folder / "key_file.json").read_text())["inference"]["key"]
    assert key not in pair.log()
