"""What comes behind a request on its connection, while that is answered natively or in the usual way."""

from __future__ import annotations

import asyncio
import math
import re
import struct
from pathlib import Path

import pytest

from tests.fronts.test_fast_path import ITEM, RAW, binary, without_drawn_ids
from tests.support.networks import Gate, Identity
from tests.support.packing import pack
from tests.support.two_ways import Site, Way, post, run, site

pytestmark = pytest.mark.usefixtures("either")

NONE = b"GET /none HTTP/1.1\r\nHost: localhost\r\nx-request-id: none\r\n\r\n"  # answered at once


def test_what_comes_behind_a_half_request_is_its_rest(store: Path) -> None:
    """Answered at once is only what stands before it in the same segment."""

    async def test() -> None:
        pack(store, network=Identity())
        async with site(store) as made:
            inner = post("/predictions/m", ITEM, RAW, id="inner")
            outer = post("/predictions/m", inner, RAW, id="outer")
            head = outer[: -len(inner)]
            told = [without_drawn_ids(each) for each in await made.both(NONE + head, inner, count=2)]
            assert told[0] == told[1] and b"outer" in told[0] and b"inner" not in told[0]

    run(test())


def test_what_comes_behind_a_request_that_runs_waits_for_its_turn(store: Path, gate: Gate) -> None:
    """Also if one before that, in the same segment, was answered at once."""

    async def test() -> None:
        async with site(store, gate=gate) as made:
            one, two = (post("/predictions/m", ITEM, RAW, id=id) for id in ("one", "two"))
            told = []
            for way in (made.fast, made.slow):
                gate.shut()
                wire = way.wire()
                wire.send(NONE + one)
                wire.send(two)
                gate.open()
                told.append(await wire.answers(3))
            assert told[0] == told[1] and 0 < told[0].index(b": one\r\n") < told[0].index(b": two\r\n")
            assert made.taken == 0

    run(test())


@pytest.mark.parametrize("wants_binary", [True, False])
@pytest.mark.parametrize("what", ["more comes", "its client ends its side", "the listener goes"])
def test_what_is_taken_over_runs_once_whatever_becomes_of_its_model(
    store: Path, gate: Gate, what: str, *, wants_binary: bool
) -> None:
    path, lines, body = binary(wants_binary=wants_binary)

    async def ask(made: Site, way: Way, *, unregisters: bool) -> tuple[bytes, int, list[str]]:
        gate.shut()
        wire, runs = way.wire(), gate.runs
        wire.send(post(path, body, *lines))
        await made.until(lambda: gate.runs > runs)
        if what == "more comes":
            wire.send(post("/none", b"", id="more"))
        elif what == "its client ends its side":
            wire.protocol.eof_received()
        else:
            way.connections.part()
        going = asyncio.ensure_future(made.registry.unregister("m", None)) if unregisters else None
        await asyncio.sleep(0)
        gate.open()
        told = await wire.answers(2 if what == "more comes" else 1)
        lines_of_it = [
            line for line in made.services.metrics.render().decode().splitlines()
            if re.match(r"pyserve_requests_total|pyserve_request_duration_seconds_count|Requests2XX", line)
        ]  # fmt: skip
        if going is not None:
            await going
        return told, gate.runs - runs, lines_of_it

    async def test() -> None:
        for unregisters in (False, True):
            told = []
            for is_fast in (True, False):
                async with site(store, gate=gate) as made:
                    way = made.fast if is_fast else made.slow
                    told.append(await ask(made, way, unregisters=unregisters))
                    assert made.taken == is_fast and way.connections.budget.size == 0
            assert told[0] == told[1] and told[0][0].startswith(b"HTTP/1.1 200") and told[0][1] == 1

    run(test())


def test_outputs_that_have_no_words_natively_are_made_once(store: Path, gate: Gate) -> None:
    """JSON has none for NaN, so endpoints have to see to the answer."""
    path, lines, body = binary(wants_binary=False)
    odd = body[: -len(ITEM)] + struct.pack("<4f", 1.0, math.nan, 2.0, 3.0)

    async def test() -> None:
        async with site(store, gate=gate) as made:
            runs = []
            for _ in range(4):
                before = gate.runs
                got, wanted = await made.both(post(path, odd, *lines))
                assert got == wanted and got.startswith(b"HTTP/1.1 200")
                runs.append(gate.runs - before)
            assert runs == [2, 2, 2, 2] and made.taken == 4

    run(test())
