"""Keys, headers for browsers and large answers of what is answered natively: to the byte as in the usual way."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.errors import TokenError
from pyserve.security.tokens import Key, Scope, Tokens
from tests.fronts.test_behind_fast import NONE
from tests.fronts.test_fast_path import ITEM, JSON, RAW, binary
from tests.support.networks import Gate, Identity
from tests.support.packing import pack
from tests.support.two_ways import Site, post, run, site

pytestmark = pytest.mark.usefixtures("either")

INFERENCE, MANAGEMENT = "the-key-of-inference", "the-key-of-management"


class Wide(nn.Module):
    """[n, 4] -> [n, 4 * count]"""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, self.count)


def tokens(folder: Path, **keys: float | None) -> Tokens:
    """Keys of both APIs, and when they expire."""
    file = folder / "keys"
    file.write_text(json.dumps({scope: {"key": text} for scope, text in texts().items()}))
    made = {scope: Key(text, keys.get(scope)) for scope, text in texts().items()}
    return Tokens(made, frozenset({"inference", "management"}), lifetime_s=60, provided=file)


def texts() -> dict[Scope, str]:
    return {"inference": INFERENCE, "management": MANAGEMENT}


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


@pytest.fixture
def same(store: Path) -> Path:
    pack(store, network=Identity())
    return store


async def asked(made: Site, *lines: str, body: bytes = ITEM) -> bytes:
    """The answer, which is that of the usual way."""
    got, wanted = await made.both(post("/predictions/m", body, RAW, *lines))
    assert got == wanted, lines
    return got


def test_who_shows_the_key_is_answered_natively(same: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with site(same, tokens=tokens(tmp_path)) as made:
            for count in range(1, 4):
                assert (await asked(made, bearer(INFERENCE))).startswith(b"HTTP/1.1 200")
                assert made.taken == count
            for line in (f"authorization: bearer   {INFERENCE}", f"AUTHORIZATION: BEARER {INFERENCE}  "):
                assert (await asked(made, line)).startswith(b"HTTP/1.1 200")
            assert made.taken == 5
            for path, lines, body in (binary(wants_binary=True), binary(wants_binary=False)):
                got, wanted = await made.both(post(path, body, bearer(INFERENCE), *lines))
                assert got == wanted and got.startswith(b"HTTP/1.1 200")
            assert made.taken == 7

    run(test())


@pytest.mark.parametrize("lines", [
    (), ("Authorization: ",), (bearer("wrong"),), (bearer(MANAGEMENT),), (f"Authorization: Basic {INFERENCE}",),
    (f"Authorization: {INFERENCE}",), (bearer(INFERENCE + "x"),), (bearer(INFERENCE[:-1]),),
    (bearer(INFERENCE.upper()),),
    (bearer(INFERENCE), bearer("wrong")), (f"Proxy-Authorization: Bearer {INFERENCE}",), (bearer(f"{INFERENCE} x"),),
    (bearer("x" * 3000),),
])  # fmt: skip
def test_who_does_not_is_refused_in_the_same_words(same: Path, tmp_path: Path, lines: tuple[str, ...]) -> None:
    async def test() -> None:
        async with site(same, tokens=tokens(tmp_path)) as made:
            for _ in range(2):  # before somebody has shown the right one, and behind that
                for _ in range(2):
                    assert (await asked(made, *lines)).startswith(b"HTTP/1.1 401")
                taken = made.taken
                assert (await asked(made, bearer(INFERENCE))).startswith(b"HTTP/1.1 200")
                assert made.taken == taken + 1
            assert made.fast.connections.budget.size == 0

    run(test())


def test_the_last_of_two_headers_counts(same: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with site(same, tokens=tokens(tmp_path)) as made:
            assert (await asked(made, bearer("wrong"), bearer(INFERENCE))).startswith(b"HTTP/1.1 200")
            assert made.taken == 0

    run(test())


def test_a_key_that_expires_is_refused_from_then_on(same: Path, tmp_path: Path) -> None:
    async def test() -> None:
        keys = tokens(tmp_path, inference=time.time() + 3600)
        async with site(same, tokens=keys) as made:
            assert (await asked(made, bearer(INFERENCE))).startswith(b"HTTP/1.1 200")
            assert made.taken == 1
        keys = tokens(tmp_path, inference=time.time() - 1)
        async with site(same, tokens=keys) as made:
            assert (await asked(made, bearer(INFERENCE))).startswith(b"HTTP/1.1 401")
            assert made.taken == 0
        # Known from before, and the time comes.
        expires_at = time.time() + 1
        keys = tokens(tmp_path, inference=expires_at)
        async with site(same, tokens=keys) as made:
            wire = made.fast.wire()
            told = b""
            while time.time() < expires_at:
                wire.send(post("/predictions/m", ITEM, RAW, bearer(INFERENCE)))
                told = await wire.answers()
            wire.send(post("/predictions/m", ITEM, RAW, bearer(INFERENCE)))
            told = await wire.answers()
            assert told.startswith(b"HTTP/1.1 401") and b"token expired" in told

    run(test())


def test_a_key_that_is_replaced_is_refused_at_once(same: Path, tmp_path: Path) -> None:
    """From the moment on at which somebody can know of it; and the other one is taken natively, too."""

    async def test() -> None:
        keys = tokens(tmp_path)
        async with site(same, tokens=keys) as made:
            for number in range(4):
                old, new = INFERENCE + str(number - 1) * bool(number), f"{INFERENCE}{number}"
                wires = [made.fast.wire(), made.slow.wire()]
                for wire in wires:
                    wire.send(post("/predictions/m", ITEM, RAW, bearer(old)))
                    assert (await wire.answers()).startswith(b"HTTP/1.1 200")
                keys.file.write_text(json.dumps({"inference": {"key": new}, "management": {"key": MANAGEMENT}}))
                await asyncio.to_thread(keys.reload)
                for given, status in ((old, 401), (new, 200)):
                    told = []
                    for wire in wires:
                        wire.send(post("/predictions/m", ITEM, RAW, bearer(given)))
                        told.append(await wire.answers())
                    assert told[0] == told[1] and told[0].startswith(b"HTTP/1.1 %d" % status)
                taken = made.taken
                await made.until_told()
                assert (await asked(made, bearer(new))).startswith(b"HTTP/1.1 200") and made.taken == taken + 1

    run(test())


@pytest.mark.parametrize("wants_binary", [True, False])
@pytest.mark.parametrize("more", [b"", NONE])
def test_what_was_let_in_is_answered_though_its_key_is_replaced(
    store: Path, gate: Gate, tmp_path: Path, more: bytes, *, wants_binary: bool
) -> None:
    """Also if it is taken over meanwhile, and its answer made by an endpoint."""

    async def test() -> None:
        keys = tokens(tmp_path)
        async with site(store, gate=gate, tokens=keys) as made:
            path, lines, body = binary(wants_binary=wants_binary)
            odd = body[: -len(ITEM)] + struct.pack("<4f", 1.0, math.nan, 2.0, 3.0)
            told = []
            for way in (made.fast, made.slow):
                gate.shut()
                wire, runs = way.wire(), gate.runs
                key = keys.keys["inference"]
                wire.send(post(path, odd, bearer(key), *lines))
                await made.until(partial(_is_more, gate, runs))
                if more:
                    wire.send(more)
                keys.file.write_text(json.dumps({"inference": {"key": key + "x"}, "management": {"key": MANAGEMENT}}))
                await asyncio.to_thread(keys.reload)
                gate.open()
                told.append(await wire.answers(1 + bool(more)))
                assert gate.runs - runs == 1
                await made.until_told()
            assert told[0].startswith(b"HTTP/1.1 200") and made.taken == 1
            assert told[0].partition(b"HTTP/1.1 404")[0] == told[1].partition(b"HTTP/1.1 404")[0]

    run(test())


def _is_more(gate: Gate, runs: int) -> bool:
    return gate.runs > runs


def test_until_when_a_header_passes(tmp_path: Path) -> None:
    keys = tokens(tmp_path)
    assert keys.passes_until("inference", f"Bearer {INFERENCE}") == math.inf
    assert keys.passes_until("inference", f"Bearer {MANAGEMENT}") is None
    assert keys.passes_until("inference", "") is None
    keys._keys["inference"] = replace(keys._keys["inference"], expires_at=time.time() + 60)
    until = keys.passes_until("inference", f"Bearer {INFERENCE}")
    assert until is not None and time.time() < until < math.inf
    keys._keys["inference"] = replace(keys._keys["inference"], expires_at=time.time() - 60)
    assert keys.passes_until("inference", f"Bearer {INFERENCE}") is None
    with pytest.raises(TokenError):
        keys.check("inference", f"Bearer {INFERENCE}")


# --- large answers, and what clients take -----------------------------------------------------------------------------

ACCEPTED = (
    "", "gzip", "identity", "gzip;q=0", "*", "*;q=0", "br", "br, gzip;q=0.5", "gzip, deflate, zstd",
    "identity;q=1, gzip;q=0.5", "x-gzip", "gzip;q=oops",
)  # fmt: skip


@pytest.mark.parametrize("count", [1, 200, 255, 256, 257, 5000, 70_000])
def test_answers_of_all_sizes(store: Path, count: int) -> None:
    """Around the size from which on they are compressed, and around those from which on others make them."""
    pack(store, network=Wide(count))

    async def test() -> None:
        async with site(store, max_response_size=10_000_000) as made:
            for accepted in ACCEPTED:
                lines = [f"Accept-Encoding: {accepted}"] if accepted else []
                for path, more, body in (
                    ("/predictions/m", (RAW,), ITEM), ("/predictions/m", (RAW, "Accept: application/json"), ITEM),
                    ("/predictions/m", (JSON,), b"[1, -2.5, 3.0, 0.125]"), binary(wants_binary=True),
                    binary(wants_binary=False),
                ):  # fmt: skip
                    for number in range(2):
                        got, wanted = await made.both(post(path, body, *more, *lines, id=f"n{number}"))
                        assert got == wanted and got.startswith(b"HTTP/1.1 200"), (accepted, path, more)
            assert made.taken > 0

    run(test())


def test_large_answers_are_made_natively_for_clients_that_take_no_coding(store: Path) -> None:
    pack(store, network=Wide(5000))

    async def test() -> None:
        async with site(store) as made:
            for count in range(1, 4):
                assert b"vary: Accept-Encoding" in await asked(made)
                assert made.taken == count
            for number in range(3):
                assert b"content-encoding: " in await asked(made, "Accept-Encoding: gzip", body=bytes(16))
                assert made.taken == 4, number  # the first one has shown it

    run(test())


@pytest.mark.parametrize("size_max", [20, 84, 85, 300, 20_000])
def test_answers_over_the_limit_are_refused_in_the_same_words(store: Path, size_max: int) -> None:
    pack(store, network=Wide(300))

    async def test() -> None:
        async with site(store, max_response_size=size_max) as made:
            for path, more, body in (
                ("/predictions/m", (RAW,), ITEM), ("/predictions/m", (JSON,), b"[1, -2.5, 3.0, 0.125]"),
                binary(wants_binary=True), binary(wants_binary=False),
            ):  # fmt: skip
                for _ in range(2):
                    got, wanted = await made.both(post(path, body, *more))
                    assert got == wanted
            assert made.taken > 0

    run(test())


@pytest.mark.parametrize("config", [
    {"cors_allowed_origin": "*"},
    {"cors_allowed_origin": "https://a.example", "cors_allowed_methods": "POST", "cors_allowed_headers": "X-A, X-B"},
    {"cors_allowed_headers": "X-A"},
])  # fmt: skip
def test_headers_for_browsers_that_are_the_same_for_all(store: Path, config: dict[str, Any]) -> None:
    pack(store, network=Wide(400))

    async def test() -> None:
        async with site(store, **config) as made:
            for lines in ((), ("Origin: https://a.example",), ("Origin: https://b.example", "Accept-Encoding: gzip")):
                assert b"\r\naccess-control-" in (await asked(made, *lines)).lower()
                got, wanted = await made.both(post("/predictions/m", b"[1, 2, 3, 4]", JSON, *lines))
                assert got == wanted
                path, more, body = binary(wants_binary=True)
                got, wanted = await made.both(post(path, body, *more, *lines))
                assert got == wanted
            assert made.taken > 3

    run(test())
