"""Front ends read and answer plain requests natively: counted, in the words of one process, whatever dies meanwhile."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import struct
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from pyserve.fronts.rows import Table
from pyserve.fronts.shared_budget import LEASE_STEP, LedgerFile, SharedBudget
from tests.fronts.test_fast_path import ITEM, JSON, RAW, binary
from tests.fronts.test_tensors_under_attack import BODY, Many, crossed, right, wait_until
from tests.support.networks import Gate, Identity
from tests.support.packing import pack
from tests.support.serving import LIMIT_S, Server
from tests.support.serving_models import write_linear
from tests.support.two_ways import post, run, site

FORMS = {
    "raw": ("/predictions/linear", (RAW,), ITEM),
    "raw, JSON back": ("/predictions/linear/1.0", (RAW, "Accept: application/json"), ITEM),
    "JSON": ("/predictions/linear", (JSON,), b"[1, -2.5, 3.0, 0.125]"),
    "binary": binary(wants_binary=True),
    "binary, JSON back": binary(wants_binary=False),
}
# What Python's code in front ends sees to.
OTHERS = {
    "data": ("/predictions/linear", (JSON,), b'{"data": [1, 2, 3, 4]}'),
    "instances": ("/v1/models/linear:predict", (JSON,), b'{"instances": [[1, 2, 3, 4]]}'),
    "a time limit": ("/predictions/linear", (RAW, "x-request-timeout-ms: 60000"), ITEM),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Of one front end, and of two."""
    made = []
    for count in (1, 2):
        server = Server(tmp_path_factory.mktemp(f"native{count}"))
        write_linear(server.store, "linear")
        server.start("--models", "all", "--front-ends", str(count))
        made.append(server)
    wait_until(lambda: crossed(made[1], "linear", ITEM), "tensors to cross")
    try:
        yield made[0], made[1]
    finally:
        for server in made:
            server.run("stop")
            server.kill()


class Direct:
    """A client that sends each request in one piece; a context."""

    def __init__(self, server: Server):
        self._socket = server.connect()

    def ask(self, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the answer. OSError if there is none."""
        self._socket.sendall(data)
        answer = http.client.HTTPResponse(self._socket)
        try:
            answer.begin()
            body = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from None
        return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() != "date"], body

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class ManyDirect(Many):
    """`Many` such clients."""

    def _ask(self) -> None:
        request = post("/predictions/linear", BODY, RAW)
        client = Direct(self._server)
        while not self._stop.is_set():
            try:
                status, _, body = client.ask(request)
                self.seen.append((status, body))
            except OSError as error:
                self.seen.append((0, repr(error).encode()))
                client.__exit__()
                client = Direct(self._server)
        client.__exit__()


def native(server: Server) -> float:
    return server.metric("pyserve_front_end_native_total")


def lines_of(server: Server, path: str) -> list[str]:
    """Of the access log, without what differs."""
    written = (server.folder / "logs" / "access_log.log").read_text()
    found = [line for line in written.splitlines() if f" {path} " in line]
    return [re.sub(r"^\S+ - /\S+ | \d+$", "", line) for line in found]


@pytest.mark.server
@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_plain_requests_are_answered_natively(servers: tuple[Server, Server], form: str) -> None:
    path, lines, body = {**FORMS, **OTHERS}[form]
    path = path.replace("/m/", "/linear/")
    told = []
    for server in servers:
        before, wanted = native(server), len(lines_of(server, path)) + 20 + (path == "/predictions/linear")
        with Direct(server) as client:
            client.ask(post("/predictions/linear", ITEM, RAW))  # memory for bodies is leased by the first
            answers = [client.ask(post(path, body, *lines)) for _ in range(20)]
        assert {status for status, _, _ in answers} == {200}
        wait_until(lambda server=server, wanted=wanted: len(lines_of(server, path)) == wanted, "the access log")
        told.append((answers, lines_of(server, path)[-20:]))
        if server is servers[1] and form in FORMS:
            wait_until(lambda server=server, before=before: native(server) >= before + 20, "them to be counted")
        else:
            assert native(server) <= before + 1
    assert told[0] == told[1]


@pytest.mark.server
def test_front_ends_and_engines_that_are_killed_under_load(tmp_path: Path) -> None:
    """One front end costs its own clients their connections; an engine those that it had, for a moment."""
    server = Server(tmp_path)
    write_linear(server.store, "linear")
    server.start("--models", "all", "--front-ends", "2")
    try:
        wait_until(lambda: crossed(server, "linear", struct.pack("<4f", 1, 2, 3, 4)), "tensors to cross")
        with ManyDirect(server, 16) as load:
            load.wait_for_more(500)
            before = native(server)
            for process in server.front_ends:
                fd = os.pidfd_open(process.pid)
                os.kill(process.pid, signal.SIGKILL)
                assert select.select([fd], [], [], LIMIT_S)[0]
                os.close(fd)
                load.wait_for_more(300)
            wait_until(lambda: native(server) > before, "others to answer natively")
            for _ in range(2):
                server.kill_server_process()
                wait_until(lambda: (503, load.seen[-1][1]) in load.seen[-20:], "a refusal")
                wait_until(lambda: load.seen[-1][0] == 200, "the next engine")
                load.wait_for_more(300)
            wait_until(lambda: native(server) > 0, "the next engine's front ends to answer natively")
        assert {status for status, _ in load.seen} <= {0, 200, 503}
        assert {body for status, body in load.seen if status == 200} == {right()}
        assert server.run("stop").returncode == 0
        assert "Traceback" not in server.log()
    finally:
        server.kill()


# --- a front end and an engine in this process ------------------------------------------------------------------------


def test_what_is_under_way_as_the_engine_goes_is_told_to_come_again(store: Path, gate: Gate, front_end: None) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            front = made.front
            assert front is not None
            gate.shut()
            wires = [made.fast.wire() for _ in range(5)]
            for wire in wires:
                wire.send(post("/predictions/m", ITEM, RAW))
            await made.until_crossed()
            front.gate.close()
            for wire in wires:
                told = await wire.answers()
                assert told.startswith(b"HTTP/1.1 503") and b"Retry-After: 1\r\n" in told and b": an-id\r\n" in told
                wire.send(post("/predictions/m", ITEM, RAW))
                assert (await wire.answers()).startswith(b"HTTP/1.1 503")
            assert made.taken == 5 and made.fast.connections.budget.size == 0
            gate.open()
            await made.until(lambda: not made.lane("m").in_flight_count)
            front.gate = front.new_gate()
            await front.gate.open([made.router])
            await made.until_told()
            for wire in wires:
                wire.send(post("/predictions/m", ITEM, RAW))
                assert (await wire.answers()).startswith(b"HTTP/1.1 200")
            assert made.taken == 9, "memory for bodies is leased anew by the first of them"

    run(test())


def test_nothing_is_taken_while_another_engine_is_awaited(store: Path, front_end: None) -> None:
    pack(store, network=Identity())

    async def test() -> None:
        async with site(store) as made:
            front = made.front
            assert front is not None
            wire = made.fast.wire()
            wire.send(post("/predictions/m", ITEM, RAW))
            await wire.answers()
            await front.gate.drain(keeps_sockets=True)
            await made.until(lambda: not front.door._is_open)
            wire.send(post("/predictions/m", ITEM, RAW))
            assert made.taken == 1 and len(front.door._held) == 1
            front.gate.close()
            await made.until(lambda: front.door._channel is None)
            front.gate = front.new_gate()
            await front.gate.open([made.router])
            assert (await wire.answers()).startswith(b"HTTP/1.1 200")

    run(test())


def test_a_full_ring_has_requests_wait(store: Path, gate: Gate, front_end: None) -> None:
    """What finds no room is Python's, and what comes behind that waits behind it."""

    async def test() -> None:
        async with site(store, gate=gate) as made:
            front = made.front
            assert front is not None and front.door._channel is not None
            front.door._channel.writer.has_waiting = True
            wire = made.fast.wire()
            wire.send(post("/predictions/m", ITEM, RAW))
            assert made.taken == 0 and len(wire.protocol._slots) == 1
            assert (await wire.answers()).startswith(b"HTTP/1.1 200")
            front.door._channel.writer.has_waiting = False
            wire.send(post("/predictions/m", ITEM, RAW))
            assert made.taken == 1 and (await wire.answers()).startswith(b"HTTP/1.1 200")

    run(test())


@pytest.mark.parametrize("ends", ["answered", "gone", "taken over"])
@pytest.mark.parametrize("tables", [0, 1, 3])
def test_stages_of_what_is_under_way_are_told_however_often_the_table_changes(
    store: Path, gate: Gate, front_end: None, tables: int, ends: str
) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            front, model = made.front, made.registry.get("m")
            assert front is not None and model.stage_times is not None

            def told() -> list[int]:
                assert front is not None and model.stage_times is not None
                front.door._tell_counts()
                return [sum(times.histogram()[1]) for times in model.stage_times]

            gate.shut()
            before = told()
            wire = made.fast.wire()
            wire.send(post("/predictions/m", b"[1, 2, 3, 4]", JSON))
            await made.until_crossed()
            for _ in range(tables):
                made.tensors.take_back()
                await made.until_told()
            assert made.taken == 1
            if ends == "gone":
                wire.transport.lose()
            elif ends == "taken over":
                wire.send(b"POST /none HTTP/1.1\r\n")
            gate.open()
            if ends != "gone":
                assert (await wire.answers()).startswith(b"HTTP/1.1 200")
            wanted = [before[0] + 1, before[1] + (ends != "gone")]
            await made.until(lambda: told() == wanted)
            made.tensors.take_back()
            await made.until_told()
            assert not front.listener._former and not front.door._former_tables and told() == wanted

    run(test())


def test_a_lease_is_given_back_though_native_code_gave_back_the_bytes() -> None:
    file = LedgerFile(2, 64 * LEASE_STEP)
    try:
        budget = SharedBudget(64 * LEASE_STEP, 2)
        budget.attach(file.of(0))
        budget.charge(10 * LEASE_STEP)
        budget.size = 0  # as native code does
        assert budget.lease == 10 * LEASE_STEP
        budget.look()
        assert budget.lease <= 2 * LEASE_STEP
    finally:
        file.close()


def test_until_when_a_key_lets_in() -> None:
    def table(key: dict[str, object] | None) -> Table:
        return Table(json.dumps({"generation": 1, "entries": [], "key": key}).encode())

    assert not table(None).has_key and table(None).passes_until("Bearer x") is None
    digest = sha256(b"x").hexdigest()
    lasting = table({"digest": digest, "expires_at": None})
    assert lasting.has_key and lasting.passes_until("bearer  x") == float("inf")
    assert lasting.passes_until("Bearer y") is None and lasting.passes_until("") is None
    assert table({"digest": digest, "expires_at": 1.0}).passes_until("Bearer x") is None
    assert table({"digest": digest, "expires_at": 1e12}).passes_until("Bearer x") == 1e12
