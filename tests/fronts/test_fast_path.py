"""What is answered natively is to the byte what the endpoints answer, and everything else goes its usual way."""

from __future__ import annotations

import asyncio
import json
import random
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.http1.limits import Http1Limits
from pyserve.telemetry.access_log import FILE, AccessLog
from pyserve.telemetry.log_files import LogWriter
from tests.fronts.odd_requests import Odd, OddRequests
from tests.fronts.test_same_answers import write_models
from tests.support.networks import Gate, Identity, Poisoned
from tests.support.packing import pack
from tests.support.serving import SEED
from tests.support.two_ways import Site, Wire, post, run, site

pytestmark = pytest.mark.usefixtures("either")

COUNT = {"own process": 3000, "front end": 800}  # of requests: through a ring each takes longer
RAW = "Content-Type: application/octet-stream"
JSON = "Content-Type: application/json"
ITEM = struct.pack("<4f", 1.0, -2.5, 3.0, 0.125)
_ID = re.compile(rb"(?<=\r\nx-request-id: )[0-9a-f-]{36}(?=\r\n)")
_DRAWN = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_FLAG = 1 << 63


@pytest.fixture
def many(store: Path) -> Path:
    """The models that odd requests are for."""
    write_models(store)
    return store


@pytest.fixture
def same(store: Path) -> Path:
    """One model, which answers its input."""
    pack(store, network=Identity())
    return store


def wire_form(request: Odd, number: int) -> bytes:
    lines = [f"{request.method} {request.target} HTTP/1.1", "Host: localhost", f"x-request-id: odd-{number}"]
    lines += [f"{name}: {value}" for name, value in request.headers]
    lines.append(f"Content-Length: {len(request.body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


def without_drawn_ids(answer: bytes) -> bytes:
    return _DRAWN.sub(b"ID", answer)


class Pair:
    """Kept connections, one of each way."""

    def __init__(self, site: Site):
        self._site = site
        self._wires: list[Wire] = []

    async def ask(self, data: bytes) -> tuple[bytes, bytes]:
        if not self._wires or any(wire.is_over for wire in self._wires):
            for wire in self._wires:
                wire.transport.lose()
            self._wires = [self._site.fast.wire(), self._site.slow.wire()]
        told = []
        for wire in self._wires:
            wire.send(data)
            told.append(without_drawn_ids(await wire.answers()))
        return told[0], told[1]


def test_the_same_requests_get_the_same_bytes(many: Path, either: str) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    asked = COUNT[either]

    async def test() -> None:
        async with site(many) as made:
            pair, different, right = Pair(made), [], 0
            for number, request in enumerate(OddRequests(SEED).take(asked)):
                if request.method == "HEAD" or any(name == "x-server-timing" for name, _ in request.headers):
                    continue
                got, wanted = await pair.ask(wire_form(request, number))
                right += wanted.startswith(b"HTTP/1.1 200")
                if got != wanted:
                    different.append((request, wanted, got))
            assert not different, f"{len(different)} of {asked}, the first: {different[0]}"
            assert right > asked / 5 and made.taken > asked / 25, (right, made.taken)

    run(test())


def test_numbers_of_all_kinds_are_written_the_same(many: Path, either: str) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    rng = random.Random(SEED)

    def double() -> float:
        if rng.random() < 0.3:
            return rng.choice((0.0, -0.0, 1e15, 1e16, 1e-4, 1e-5, 123456.0, 0.1, 5e-324, 1.7e308, 9007199254740993.0))
        [value] = struct.unpack("<d", struct.pack("<Q", rng.getrandbits(64)))
        return value if rng.random() < 0.5 else round(rng.uniform(-1e6, 1e6), rng.randint(0, 12))

    async def test() -> None:
        async with site(many) as made:
            pair = Pair(made)
            asked = [
                ("double", lambda: struct.pack("<2d", double(), double())),
                ("single", lambda: struct.pack("<I", rng.getrandbits(32))),
                ("whole", lambda: struct.pack("<6q", *(rng.getrandbits(64) - _FLAG for _ in range(6)))),
                ("bytes", lambda: bytes(rng.choices(range(128, 256), k=5))),
                ("scalar", lambda: struct.pack("<3f", *(rng.uniform(-9, 9) for _ in range(3)))),
            ]  # fmt: skip
            for number in range(2 * COUNT[either] // 3):
                name, make = asked[number % len(asked)]
                got, wanted = await pair.ask(post(f"/predictions/{name}", make(), RAW, "Accept: application/json"))
                assert got == wanted
            assert made.taken > COUNT[either] // 3

    run(test())


def binary(*, wants_binary: bool) -> tuple[str, tuple[str, ...], bytes]:
    """Path, headers and body of a binary request of the Open Inference Protocol."""
    entry = {"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": len(ITEM)}}
    text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": wants_binary}}).encode()
    return "/v2/models/m/infer", (f"Inference-Header-Content-Length: {len(text)}",), text + ITEM


@pytest.mark.parametrize("path, lines, body", [
    ("/predictions/m", (RAW,), ITEM),
    ("/predictions/m", (JSON,), b"[1, -2.5, 3.0, 0.125]"),
    binary(wants_binary=True),
    binary(wants_binary=False),
])  # fmt: skip
def test_a_request_may_be_cut_anywhere(same: Path, either: str, path: str, lines: tuple[str, ...], body: bytes) -> None:
    async def test() -> None:
        async with site(same) as made:
            whole = post(path, body, *lines)
            told = await made.both(whole)
            assert told[0] == told[1] and made.taken == 1
            for data, count in ((whole, 1), (whole * 2, 2), (whole + b"\r\n", 1), (whole + whole[:9], 1)):
                wanted = (await made.both(data, count=count))[1]
                cuts = range(1, len(data), 1 if either == "own process" else 7)
                for at in sorted({*cuts, min(len(whole), len(data) - 1)}):
                    got, same_way = await made.both(data[:at], data[at:], count=count)
                    assert got == same_way == wanted, at
                got, _ = await made.both(*(data[i : i + 1] for i in range(len(data))), count=count)
                assert got == wanted
            assert made.taken > 1  # those that were cut behind their end

    run(test())


def test_a_second_request_behind_one_that_runs_waits_for_its_turn(store: Path, gate: Gate) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            first, second = post("/predictions/m", ITEM, RAW, id="one"), post("/predictions/m", ITEM, RAW, id="two")
            told = []
            for way in (made.fast, made.slow):
                gate.shut()
                wire = way.wire()
                wire.send(first)
                await made.until_crossed()
                assert wire.protocol._slots or made.lane("m").in_flight_count == 1
                wire.send(second)
                assert len(wire.protocol._slots) == 2
                gate.open()
                told.append(await wire.answers(2))
                wire.send(post("/predictions/m", ITEM, RAW, id="three"))
                told[-1] += await wire.answers()
            assert told[0] == told[1] and made.taken == 2
            assert [told[0].index(id) for id in (b"one", b"two", b"three")] == sorted(
                told[0].index(id) for id in (b"one", b"two", b"three")
            )

    run(test())


def test_a_client_that_hangs_up_is_counted_and_holds_nothing(store: Path, gate: Gate) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            gate.shut()
            wires = [made.fast.wire() for _ in range(5)]
            for wire in wires:
                wire.send(post("/predictions/m", ITEM, RAW))
            lane, budget = made.lane("m"), made.fast.connections.budget
            await made.until_crossed()
            assert made.taken == 5 and lane.in_flight_count == 5 and budget.size == 5 * len(ITEM)
            for wire in wires:
                wire.transport.lose()
            await made.until(lambda: lane.in_flight_count == 0)
            assert budget.size == 0 and lane.rows.count == 0
            gate.open()
            assert (await made.both(post("/predictions/m", ITEM, RAW)))[0].startswith(b"HTTP/1.1 200")
            await made.until(lambda: lane.core.stats()["cancelled"] >= 4)

    run(test())


def test_a_client_that_ends_its_side_is_answered_and_then_left(store: Path, gate: Gate) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            told = []
            for way in (made.fast, made.slow):
                gate.shut()
                wire = way.wire()
                wire.send(post("/predictions/m", ITEM, RAW))
                wire.protocol.eof_received()
                gate.open()
                told.append(await wire.answers())
                assert wire.is_over
            assert told[0] == told[1] and b"connection: close" in told[0] and made.taken == 1

    run(test())


def test_what_runs_as_the_listener_goes_is_the_last_of_its_connection(store: Path, gate: Gate, either: str) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            gate.shut()
            wire, idle = made.fast.wire(), made.fast.wire()
            wire.send(post("/predictions/m", ITEM, RAW))
            await made.until_crossed()
            made.fast.connections.part()
            assert made.lane("m").in_flight_count == 1 and not wire.protocol._native.is_busy
            assert made.lane("m").rows.count == (either == "front end"), "the engine does not notice"
            gate.open()
            assert b"connection: close" in await wire.answers()
            idle.send(post("/predictions/m", ITEM, RAW))
            assert b"connection: close" in await idle.answers()
            assert made.taken == 1

    run(test())


def test_a_model_that_goes_takes_nothing_more_and_answers_what_it_has(store: Path, gate: Gate, either: str) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            gate.shut()
            wire = made.fast.wire()
            wire.send(post("/predictions/m", ITEM, RAW))
            await made.until_crossed()
            going = asyncio.ensure_future(made.registry.unregister("m", None))
            await made.until(lambda: not list(made.registry.default_models()))
            late = made.fast.wire()
            late.send(post("/predictions/m", ITEM, RAW))
            assert (await late.answers()).startswith(b"HTTP/1.1 404")
            gate.open()
            assert (await wire.answers()).startswith(b"HTTP/1.1 200")
            await going
            got, wanted = await made.both(post("/predictions/m", ITEM, RAW))
            assert without_drawn_ids(got) == without_drawn_ids(wanted) and got.startswith(b"HTTP/1.1 404")
            # A front end may not know yet, and is told when it asks.
            assert made.taken == 1 or either == "front end"

    run(test())


def test_a_request_that_fails_is_answered_in_the_same_words(store: Path) -> None:
    pack(store, network=Poisoned())

    async def test() -> None:
        async with site(store) as made:
            for body in (struct.pack("<4f", 666, 0, 0, 0), ITEM, struct.pack("<4f", 0, 0, 666, 1)):
                got, wanted = await made.both(post("/predictions/m", body, RAW))
                assert got == wanted
            assert made.taken == 3 and made.fast.connections.budget.size == 0

    run(test())


def test_a_full_queue_is_refused_in_the_same_words(store: Path, gate: Gate) -> None:
    async def test() -> None:
        async with site(store, gate=gate, job_queue_size=2, queue_full_retry_after=1) as made:
            gate.shut()
            wires = [made.fast.wire() for _ in range(2)]
            wires[0].send(post("/predictions/m", ITEM, RAW))
            await made.until_crossed()
            await made.until(lambda: made.lane("m").core.queue_size == 0)  # a worker has it
            wires[1].send(post("/predictions/m", ITEM, RAW))
            more = [made.fast.wire() for _ in range(8)]
            for wire in more:
                wire.send(post("/predictions/m", ITEM, RAW))
            await made.until_crossed()
            try:
                got, wanted = await made.both(post("/predictions/m", ITEM, RAW))
            finally:
                gate.open()
            # Which grow while the one that runs takes longer.
            got, wanted = (re.sub(rb"(Retry-After: |\"waiting\": )[0-9]+", rb"\1N", each) for each in (got, wanted))
            assert got == wanted and got.startswith(b"HTTP/1.1 503") and b"queue full" in got
            for wire in (*wires, *more):
                assert await wire.answers()
            assert made.lane("m").in_flight_count == 0

    run(test())


def test_a_request_that_runs_too_long_is_answered_in_the_same_words(store: Path, gate: Gate) -> None:
    async def test() -> None:
        async with site(store, gate=gate) as made:
            made.lane("m").settings.response_timeout_s = 1
            made.lane("m").apply_limits()
            gate.shut()
            got, wanted = await made.both(post("/predictions/m", ITEM, RAW))
            gate.open()
            assert made.taken == 1 and got.split(b"\r\n")[0] == wanted.split(b"\r\n")[0]
            assert not got.startswith(b"HTTP/1.1 200") and made.fast.connections.budget.size == 0

    run(test())


def test_large_answers_and_those_without_a_word_go_the_usual_way(many: Path) -> None:
    async def test() -> None:
        async with site(many) as made:
            large = torch.rand(3000).numpy().tobytes()
            odd = struct.pack("<4f", -1, 0, 1, 2)
            for path, body in (("large", large), ("large", large), ("odd", odd), ("odd", odd)):
                for accept in ("application/json", "application/octet-stream"):
                    got, wanted = await made.both(post(f"/predictions/{path}", body, RAW, f"Accept: {accept}"))
                    assert got == wanted

    run(test())


def test_ids_are_drawn_and_bodies_counted_while_they_are_there(same: Path) -> None:
    async def test() -> None:
        async with site(same) as made:
            wire, ids = made.fast.wire(), set()
            for _ in range(600):
                wire.send(post("/predictions/m", ITEM, RAW, id=""))
                assert made.fast.connections.budget.size == len(ITEM)
                [drawn] = _ID.findall(await wire.answers())
                assert _DRAWN.fullmatch(drawn)
                ids.add(drawn)
                assert made.fast.connections.budget.size == 0
            assert len(ids) == 600 == made.taken

    run(test())


def test_a_budget_that_is_used_up_is_told_in_the_same_words(store: Path, gate: Gate, either: str) -> None:
    async def test() -> None:
        limits = Http1Limits(body_budget_size=len(ITEM) + 3)
        async with site(store, gate=gate, limits=limits) as made:
            gate.shut()
            first = [way.wire() for way in (made.fast, made.slow)]
            for wire in first:
                wire.send(post("/predictions/m", ITEM, RAW))
            got, wanted = await made.both(post("/predictions/m", ITEM, RAW))
            assert got == wanted and b"body budget" in got
            assert made.taken == (either == "own process"), "of a front end each byte has to be leased here"
            gate.open()
            assert len({await wire.answers() for wire in first}) == 1

    run(test())


def test_both_are_counted_alike(same: Path) -> None:
    async def test() -> None:
        async with site(same) as made:

            def counted() -> list[Any]:
                text = made.services.metrics.render().decode()
                return sorted(
                    line for line in text.splitlines()
                    if re.match(r"pyserve_requests_total|pyserve_request_duration_seconds_count|ts_inference_requests|"
                                r"Requests2XX|pyserve_batch_size_count", line)
                )  # fmt: skip

            seen = []
            for way in (made.fast, made.slow):
                before, wire = counted(), way.wire()
                for version in ("", "/1.0", ""):
                    wire.send(post(f"/predictions/m{version}", ITEM, RAW))
                    await wire.answers()
                after = counted()
                seen.append([
                    (name, float(value) - float(dict(line.rsplit(" ", 1) for line in before).get(name, 0)))
                    for name, value in (line.rsplit(" ", 1) for line in after)
                ])  # fmt: skip
            assert seen[0] == seen[1] and any(grown == 2 for _, grown in seen[0]) and made.taken == 3

    run(test())


def test_each_answer_has_its_line_in_the_access_log(same: Path, tmp_path: Path) -> None:
    writer = LogWriter()
    log = AccessLog(writer, tmp_path / "logs")

    async def test() -> None:
        async with site(same, log=log) as made:
            made.slow.connections.on_answer = made.fast.connections.on_answer = log.observe_http
            for _ in range(3):
                for way in (made.fast, made.slow):
                    wire = way.wire()
                    wire.send(post("/predictions/m", ITEM, RAW))
                    await wire.answers()
            assert made.taken == 3

    run(test())
    writer.close()
    lines = (tmp_path / "logs" / FILE).read_text().splitlines()
    pattern = r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} - /127\.0\.0\.1:43090 "POST /predictions/m HTTP/1\.1" 200 \d+'
    assert len(lines) == 6 and all(re.fullmatch(pattern, line) for line in lines), lines


def test_json_of_an_item_is_read_without_python(same: Path) -> None:
    async def test() -> None:
        async with site(same) as made:
            got, wanted = await made.both(post("/predictions/m", json.dumps([1, 2.5, -3, 1e-7]).encode(), JSON))
            assert got == wanted and made.taken == 1 and b"1.0000000116860974e-07" in got

    run(test())


def test_a_batch_holds_both_kinds(store: Path, gate: Gate) -> None:
    """Requests of both ways, in one queue: each gets its own row."""

    async def test() -> None:
        async with site(store, gate=gate) as made:
            gate.shut()
            wires = []
            for number in range(12):
                wire = (made.fast, made.slow)[number % 2].wire()
                wire.send(post("/predictions/m", struct.pack("<4f", number, 0, 0, 0), RAW, id=f"n{number}"))
                wires.append(wire)
            gate.open()
            for number, wire in enumerate(wires):
                answer = await wire.answers()
                assert f"n{number}\r\n".encode() in answer
                assert answer.endswith(struct.pack("<4f", 2 * number, 0, 0, 0))
            assert made.taken == 6

    run(test())
