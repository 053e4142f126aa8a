"""How long clients wait holds with several front ends as with one, in the same words."""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.networks import Gate, Gated
from tests.support.packing import pack
from tests.support.serving import JSON, LIMIT_S, RAW, Answer, Server

pytestmark = pytest.mark.server

HEADER = "x-request-timeout-ms"
ITEM = struct.pack("<4f", 1, 2, 3, 4)
BODIES = ((RAW, ITEM), (JSON, b"[1, 2, 3, 4]"))


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Server, Gate]]]:
    """With one front end, and with two; a model of one worker that runs when the test lets it."""
    made = []
    try:
        for count in (1, 2):
            folder = tmp_path_factory.mktemp(f"deadlines{count}")
            server, gate = Server(folder), Gate(folder / "gate")
            made.append((server, gate))
            pack(server.store, network=Gated(str(gate.path)))
            server.start("--models", "all", "--front-ends", str(count))
            server.manage("PUT", "/models/m?min_worker=1&max_worker=1&synchronous=true")
        yield made
    finally:
        for server, gate in made:
            gate.open()
            server.run("stop")
            server.kill()


def ask(server: Server, headers: dict[str, str], body: bytes, limit: str) -> Answer:
    return server.ask("POST", "/predictions/m", body, {**headers, HEADER: limit, "x-request-id": "an-id"})


def told(answer: Answer) -> tuple[int, str]:
    """Without what was measured."""
    return answer.status, re.sub(r"[0-9]+(\.[0-9]+)?", "N", answer.body.decode("latin-1"))


@pytest.mark.parametrize(
    "limit", ["0", "-1", "soon", "1.5", "", "86400001", " 50000 ", "1e3", "0x10", "9" * 30, "50000"]
)
def test_what_may_stand_there(servers: list[tuple[Server, Gate]], limit: str) -> None:
    answers = [ask(server, headers, body, limit) for server, _ in servers for headers, body in BODIES]
    seen = [(answer.status, answer.body) for answer in answers]
    assert seen[:2] == seen[2:] and seen[0][0] == (200 if limit.strip() == "50000" else 400)


def test_one_that_runs_is_answered_when_its_client_stops_waiting(servers: list[tuple[Server, Gate]]) -> None:
    answers = []
    for server, gate in servers:
        before = server.metric("pyserve_front_end_tensors_total")
        for headers, body in BODIES:
            gate.shut()
            answers.append(told(ask(server, headers, body, "2000")))
            gate.open()
            assert ask(server, RAW, ITEM, "60000").status == 200
        assert server.metric("pyserve_front_end_tensors_total") == before, "their endpoint sees to these"
    assert answers[:2] == answers[2:] and {status for status, _ in answers} == {504}


def test_one_that_waits_never_runs(servers: list[tuple[Server, Gate]]) -> None:
    answers = []
    for server, gate in servers:
        gate.shut()
        busy = threading.Thread(target=server.ask, args=("POST", "/predictions/m", ITEM, RAW))
        runs = gate.runs
        busy.start()
        try:
            server.wait_for(lambda: gate.runs > runs, "it to run")  # noqa: B023
            answers.append(told(ask(server, RAW, ITEM, "300")))
        finally:
            gate.open()
            busy.join(LIMIT_S)
        assert gate.runs == runs + 1
    assert answers[0] == answers[1] and answers[0][0] == 503 and "expired" in answers[0][1]
