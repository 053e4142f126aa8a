"""Another model takes a native lane's place while requests come in: none is lost, none gets a wrong answer or two."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pyserve import _core
from pyserve.lanes import native_workers
from pyserve.lanes.exchange import exchange
from pyserve.lanes.network import Network
from pyserve.proof.native_proof import BatchProof
from pyserve.proof.probe_inputs import ProbeRows
from tests.support.held import EndlessAtOnce, HeldAtOnce, Hold, new_hold
from tests.support.lane_stand import HANG_S, Stand, run, standing
from tests.support.networks import Affine, Gate, Gated, Times, save_script


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def another(stand: Stand, path: Path, network: nn.Module) -> Network:
    """As the lane's, but for the model."""
    script = save_script(network, path / f"{type(network).__name__}.pt")
    model = _core.TorchModel.load(str(script), stand.lane.network.example)
    return replace(stand.lane.network, torch_model=model, findings={})


def number(stand: Stand, id: str) -> float:
    answer = stand.answers[id]
    assert answer.status == 200
    return float(json.loads(bytes(answer.body))[0])


def workers(stand: Stand) -> list[tuple[int, str]]:
    return [(row["id"], row["state"]) for row in stand.lane.core.workers()]


@pytest.mark.parametrize("count", [1, 3])
def test_under_load_every_request_has_one_answer_of_one_of_the_two(tmp_path: Path, count: int) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=count, batch_size=4) as stand:
            before = workers(stand)
            exchanging = asyncio.create_task(exchange(stand.lane, another(stand, tmp_path, Times(3.0))))
            posted = 0
            while not exchanging.done() or posted < 200:
                if stand.lane.in_flight_count < 32:
                    stand.post(float(posted + 1), id=f"r{posted}")
                    posted += 1
                await asyncio.sleep(0)
            assert exchanging.result() == ""
            later = [f"l{n}" for n in range(20)]
            for n, id in enumerate(later):
                stand.post(float(n + 1), id=id)
            await stand.until(lambda: len(stand.answers) == posted + len(later))
            assert all(number(stand, f"r{n}") in (2.0 * (n + 1), 3.0 * (n + 1)) for n in range(posted))
            assert [number(stand, id) for id in later] == [3.0 * (n + 1) for n in range(len(later))]
            assert workers(stand) == before  # the same threads, which never stopped being ready

    run(test())


def test_a_batch_that_runs_ends_on_the_model_that_it_began_on(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path))) as stand:  # times 2
            gate.shut()
            runs = gate.runs
            stand.post(1.0, id="before")
            await stand.until(lambda: gate.runs > runs)
            exchanging = asyncio.create_task(exchange(stand.lane, another(stand, tmp_path, Times(3.0))))
            await stand.until(lambda: stand.lane.core.exchange_state() == (1, ""))
            assert not stand.answers and not exchanging.done()
            gate.open()
            assert await exchanging == ""
            await stand.until(lambda: "before" in stand.answers)
            assert number(stand, "before") == 2.0
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 3.0

    run(test())


def test_requests_are_answered_while_the_other_is_warmed_up(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(3.0), workers=2) as stand:
            network = another(stand, tmp_path, Gated(str(gate.path)))
            gate.shut()
            runs = gate.runs
            exchanging = asyncio.create_task(exchange(stand.lane, network))
            await stand.until(lambda: gate.runs > runs)
            stand.lane.set_workers(3)  # the budget lets two run at once: both are held up
            assert stand.lane.core.exchange_state()[1] == ""
            gate.open()
            assert await exchanging == ""
            assert await stand.lane.settled(HANG_S) == ""
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 2.0
            assert [state for _, state in workers(stand)] == ["ready"] * 3

    run(test())


def test_no_batch_is_larger_than_was_shown_of_both(tmp_path: Path, gate: Gate) -> None:
    """Some workers run the other one before all do."""

    async def test() -> None:
        async with standing(tmp_path, Times(3.0), workers=2, batch_size=8) as stand:
            network = another(stand, tmp_path, Gated(str(gate.path)))
            network.batches = BatchProof(network.run, ProbeRows([], [], []), 0.0, size_max=2, note="two")
            gate.shut()
            runs = gate.runs
            exchanging = asyncio.create_task(exchange(stand.lane, network))
            await stand.until(lambda: gate.runs > runs)
            assert stand.lane.batch_size_max == 2
            stand.lane.apply_limits()
            for n in range(32):
                stand.post(float(n + 1), id=f"r{n}")
            gate.open()
            assert await exchanging == ""
            await stand.until(lambda: len(stand.answers) == 32)
            counts = dict(zip(*stand.lane.core.stats()["batch_size"][:2], strict=False))
            assert not any(count for size, count in counts.items() if size > 2)
            assert stand.lane.batch_size_max == network.batches.size_max

    run(test())


def test_it_is_warmed_up_as_a_worker_that_starts_before_a_request_runs_on_it(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=8) as stand:
            runs, rows = gate.runs, gate.rows
            assert rows >= 1 + 8
            assert await exchange(stand.lane, another(stand, tmp_path, Gated(str(gate.path)))) == ""
            assert (gate.runs, gate.rows) == (2 * runs, 2 * rows)

    run(test())


def test_one_that_cannot_run_leaves_everything_as_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=2) as stand:
            former = stand.lane.network
            refusal = await exchange(stand.lane, another(stand, tmp_path, Affine()))  # takes another shape
            assert "mat1 and mat2" in refusal
            assert stand.lane.network is former
            stand.lane.set_workers(3)
            assert await stand.lane.settled(HANG_S) == ""
            for n in range(6):
                stand.post(1.0, id=f"r{n}")
            await stand.until(lambda: len(stand.answers) == 6)
            assert {number(stand, f"r{n}") for n in range(6)} == {2.0}
            assert await exchange(stand.lane, another(stand, tmp_path, Times(3.0))) == ""  # another may do better
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 3.0

    run(test())


def test_one_whose_run_does_not_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_workers, "GRACE_S", HANG_S)

    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=2, response_timeout_s=1, client_timeout_ms=60_000) as stand:
            before = workers(stand)
            assert "did not come to an end" in await exchange(stand.lane, another(stand, tmp_path, EndlessAtOnce()))
            assert workers(stand) == before
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 2.0

    run(test())


def test_one_whose_run_cannot_be_ended_costs_the_worker_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_workers, "GRACE_S", 0.01)
    hold: Hold = new_hold()

    async def test() -> None:
        async with standing(tmp_path, Times(2.0), response_timeout_s=1, client_timeout_ms=60_000) as stand:
            network = another(stand, tmp_path, HeldAtOnce())
            assert "did not come to an end" in await exchange(stand.lane, network)
            assert await stand.lane.settled(HANG_S) == ""
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 2.0
            hold.release()
            await stand.until(lambda: stand.lane.core.lost_count == 0)

    try:
        run(test())
    finally:
        hold.release()


def test_workers_that_come_later_run_the_other_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            stand.lane.set_workers(0)
            assert await exchange(stand.lane, another(stand, tmp_path, Times(3.0))) == ""
            stand.lane.set_workers(2)
            assert await stand.lane.settled(HANG_S) == ""
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 3.0

    run(test())


def test_without_a_worker_the_first_one_warms_it_up(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(3.0), batch_size=8) as stand:
            stand.lane.set_workers(0)
            runs, rows = gate.runs, gate.rows
            assert await exchange(stand.lane, another(stand, tmp_path, Gated(str(gate.path)))) == ""
            assert (gate.runs, gate.rows) == (runs, rows)
            stand.lane.set_workers(1)
            assert await stand.lane.settled(HANG_S) == ""
            assert gate.rows >= rows + 1 + 8, "before its first request"
            stand.post(1.0, id="after")
            await stand.until(lambda: "after" in stand.answers)
            assert number(stand, "after") == 2.0

    run(test())


def test_the_end_does_not_wait_for_it(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path))) as stand:
            gate.shut()
            runs = gate.runs
            stand.post(1.0, id="before")
            await stand.until(lambda: gate.runs > runs)
            exchanging = asyncio.create_task(exchange(stand.lane, another(stand, tmp_path, Times(3.0))))
            closing = asyncio.create_task(stand.lane.close())
            assert await exchanging == "it is being unregistered"
            gate.open()
            await closing
            assert number(stand, "before") == 2.0

    run(test())


def test_the_weights_of_the_one_before_are_let_go_of(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=2) as stand:
            former: Any = weakref.ref(stand.lane.network)
            assert await exchange(stand.lane, another(stand, tmp_path, Times(3.0))) == ""
            gc.collect()
            assert former() is None

    run(test())


def test_only_of_one_handler(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            other = replace(another(stand, tmp_path, Times(3.0)), restored=lambda output: output)
            with pytest.raises(ValueError, match="one structure"):
                await exchange(stand.lane, other)

    run(test())
