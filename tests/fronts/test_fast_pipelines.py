"""Many requests behind each other, cut anywhere: each is answered once, in order, and in the same words."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.fronts.odd_requests import OddRequests
from tests.fronts.test_fast_path import ITEM, JSON, RAW, wire_form, without_drawn_ids
from tests.fronts.test_same_answers import write_models
from tests.support.serving import SEED
from tests.support.two_ways import Site, post, run, site

pytestmark = pytest.mark.usefixtures("either")

SIZE_MAX = 4000  # of a body: larger ones that are cut are read past the protocol


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """``data``, cut."""
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.choice((0, 1, 3, 20))))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if begin < end]


def test_pipelined_requests_in_random_cuts(store: Path) -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    rng = random.Random(SEED)
    write_models(store)

    async def test() -> None:
        async with site(store) as made:
            # What is refused ends its connection, so that these are mostly right ones.
            plain = [
                post("/predictions/linear", ITEM, RAW), post("/predictions/linear", b"[1, -2.5, 3.0, 0.125]", JSON),
                post("/predictions/linear", ITEM, RAW, "Accept: application/json"),
                post("/predictions/linear", ITEM, RAW, id=""), post("/none", b"x"),
            ]  # fmt: skip
            odd = [
                wire_form(request, number) for number, request in enumerate(OddRequests(SEED).take(400))
                if request.method == "POST" and len(request.body) < SIZE_MAX
                and not any(name == "x-server-timing" for name, _ in request.headers)
            ]  # fmt: skip
            for _ in range(120):
                asked = [rng.choice(plain if rng.random() < 0.8 else odd) for _ in range(rng.randint(1, 12))]
                count, is_whole = len(asked), rng.random() < 0.5
                cut = asked if is_whole else pieces(rng, b"".join(asked))
                got, wanted = await paused(made, rng, cut, count)
                assert without_drawn_ids(got) == without_drawn_ids(wanted), asked
            assert made.taken > 20 and made.fast.connections.budget.size == 0

    run(test())


async def paused(made: Site, rng: random.Random, cut: list[bytes], count: int) -> tuple[bytes, bytes]:
    """What both answer, with pauses between the pieces in which answers may come."""
    told = []
    for way in (made.fast, made.slow):
        wire = way.wire()
        for piece in cut:
            wire.send(piece)
            for _ in range(rng.choice((0, 0, 1, 30))):
                await asyncio.sleep(0)
        told.append(await wire.answers(count))
        if not wire.is_over:
            wire.transport.lose()
    return told[0], told[1]
