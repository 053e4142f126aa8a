"""Native batches that do not come to an end: their requests, the worker that runs them, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyserve.config.config import Config
from pyserve.lanes import native_workers
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_rows import READY, UNLOADING
from tests.support.held import ENDLESS, Endless, EndlessAtOnce, EndlessHalfWay, EndlessOrHeld, Held, Hold, new_hold
from tests.support.lane_stand import HANG_S, Stand, error, run, standing
from tests.support.networks import save_script

# A request may run for a second. It may wait for longer: for a worker to be ended or replaced on a busy machine.
LIMITS = {"response_timeout_s": 1, "client_timeout_ms": 60_000}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_workers, "GRACE_S", 0.01)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is to be given up, however slow the machine is."""
    monkeypatch.setattr(native_workers, "GRACE_S", HANG_S)


@pytest.fixture
def hold() -> Iterator[Hold]:
    hold = new_hold()
    yield hold
    hold.release()


def states(stand: Stand) -> list[str]:
    return [row["state"] for row in stand.lane.core.workers()]


def test_an_endless_loop_of_operators_is_ended_and_its_worker_goes_on(tmp_path: Path, patient: None) -> None:
    async def test() -> None:
        async with standing(tmp_path, Endless(), **LIMITS) as stand:
            worker = stand.lane.core.workers()[0]["id"]
            for _ in range(2):
                body = error(await stand.answer(ENDLESS))
                assert (body["code"], body["detail"]["reason"]) == (504, "response_timeout")
                assert (await stand.answer(1)).status == 200
            assert [row["id"] for row in stand.lane.core.workers()] == [worker]
            stats = stand.lane.stats()
            assert (stats["interrupted"], stats["lost"], stats["stuck"], stats["running"]) == (2, 0, 0, 0)
            assert stand.engine.lost_count == 0 and not stand.services.stuck.replacement.done()

    run(test())


def test_what_an_ended_batch_left_half_changed_answers_nobody(tmp_path: Path, patient: None) -> None:
    async def test() -> None:
        async with standing(tmp_path, EndlessHalfWay(), **LIMITS) as stand:
            expected = bytes((await stand.answer(1)).body)
            for _ in range(2):
                assert (await stand.answer(ENDLESS)).status == 504
                assert bytes((await stand.answer(1)).body) == expected
            assert stand.lane.stats()["interrupted"] == 2 and states(stand) == ["ready"]

    run(test())


def test_what_an_ended_run_took_is_not_counted_to_the_requests_of_another_shape(
    tmp_path: Path, hold: Hold, patient: None
) -> None:
    async def test() -> None:
        async with standing(tmp_path, EndlessOrHeld(), batch_size=2, **LIMITS) as stand:
            stand.handler.preprocessed = torch.full((1, 4), 667.0)
            arrived_at = time.monotonic_ns()
            first = stand.post()
            stand.handler.preprocessed = torch.full((1, 6), ENDLESS)
            second = stand.post()
            await stand.until(lambda: first.answered)
            stand.lane.settings.response_timeout_s = 3600
            await stand.until(lambda: hold.begun.acquire(blocking=False))
            assert stand.lane.core.workers()[0]["running_since"] >= arrived_at + 1e9
            hold.release()
            await stand.until(lambda: second.answered)
            assert [answer.status for answer in stand.answers.values()] == [504, 200]

    run(test())


def test_a_batch_that_cannot_be_ended_costs_its_requests_and_no_other(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        async with standing(tmp_path, Held(), batch_size=2, **LIMITS) as stand:
            stuck = [stand.post(ENDLESS, id="stuck"), stand.post(1, id="neighbour")]
            await stand.until(lambda: hold.begun.acquire(blocking=False))
            waiting = [stand.post(i, id=f"r{i}") for i in range(5)]
            await stand.until(lambda: all(each.answered for each in [*stuck, *waiting]))
            assert [stand.answers[id].status for id in ("stuck", "neighbour")] == [504, 504]
            assert [stand.answers[f"r{i}"].status for i in range(5)] == [200] * 5
            assert states(stand) == ["lost", "ready"] and stand.lane.ready_count == 1
            assert [row.status for row in stand.lane.worker_rows()] == [UNLOADING, READY]
            stats = stand.lane.stats()
            assert (stats["lost"], stats["stuck"], stats["running"]) == (1, 1, 0)
            assert stand.services.stuck.count == stand.engine.lost_count == 1
            hold.release()  # late answers are nobody's: `Stand` would notice a second one
            await stand.until(lambda: states(stand) == ["ready"])
            assert stand.engine.lost_count == 0 and stand.lane.stats()["stuck"] == 0
            assert (await stand.answer(3)).status == 200
            assert stand.lane.stats()["running"] == 0 and not stand.services.stuck.replacement.done()

    run(test())


def test_requests_are_admitted_while_a_lost_worker_is_replaced(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        async with standing(tmp_path, Held(), **LIMITS) as stand:
            first = stand.post(ENDLESS)
            await stand.until(lambda: hold.begun.acquire(blocking=False))
            assert stand.lane.core.lose(stand.lane.core.workers()[0]["id"])
            stand.lane.set_workers(1)
            assert stand.lane.ready_count or stand.lane.may_take  # it may have come already
            assert (await stand.answer(1)).status == 200
            assert not stand.lane.may_take
            await stand.until(lambda: first.answered)

    run(test())


def test_closing_and_scaling_do_not_wait_for_what_does_not_end(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        async with standing(tmp_path, Held(), workers=2, **LIMITS) as stand:
            gone = stand.post(ENDLESS)
            await stand.until(lambda: hold.begun.acquire(blocking=False))
            stand.lane.set_workers(0)
            assert await stand.lane.settled(HANG_S) == ""
            assert states(stand) == ["lost"] and gone.answered
            stand.lane.set_workers(1)
            assert await stand.lane.settled(HANG_S) == ""
            assert (await stand.answer(1)).status == 200
            await stand.lane.close()
            assert stand.lane.core.workers() == [] and stand.engine.lost_count == 1
            assert "m 1.0, which is not served any more" in stand.services.stuck.replacement.result()
            hold.release()
            await stand.until(lambda: stand.engine.lost_count == 0)

    run(test())


def test_a_batch_that_nobody_waits_for_does_not_hold_up_the_end(tmp_path: Path, patient: None) -> None:
    async def test() -> None:
        async with standing(tmp_path, Endless(), response_timeout_s=3600) as stand:
            left = stand.post(ENDLESS)
            await stand.until(lambda: stand.lane.core.running == 1)
            left.disconnect()
            await stand.lane.close()
            assert stand.engine.lost_count == 0 and not stand.services.stuck.replacement.done()
            assert stand.lane.stats()["interrupted"] == 1

    run(test())


def test_a_warm_up_that_does_not_end_fails_at_its_time(tmp_path: Path, patient: None) -> None:
    async def test() -> None:
        script = save_script(EndlessAtOnce(), tmp_path / "m.pt")
        stand = Stand(script, ModelSettings(startup_timeout_s=1), Config(), private=True)
        stand.lane.set_workers(1)
        assert "did not come to an end in time" in await stand.lane.settled(HANG_S)
        await stand.end()
        assert stand.engine.lost_count == 0

    run(test())


def test_a_warm_up_that_cannot_be_ended_is_not_waited_for(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        script = save_script(Held(), tmp_path / "m.pt")
        settings = ModelSettings(startup_timeout_s=3600, response_timeout_s=3600)
        stand = Stand(script, settings, Config(), private=True, example=ENDLESS)
        stand.lane.set_workers(1)
        assert await stand.lane.settled(0.1) == "a worker was not ready within startup_timeout=0.1 s"
        stand.lane.set_workers(0)
        await stand.end()
        assert stand.engine.lost_count == 1 and stand.services.stuck.replacement.done()
        hold.release()
        await stand.until(lambda: stand.engine.lost_count == 0)

    run(test())


def test_who_waits_for_a_warm_up_that_is_given_up_learns_that(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        script = save_script(Held(), tmp_path / "m.pt")
        stand = Stand(script, ModelSettings(startup_timeout_s=1), Config(), private=True, example=ENDLESS)
        stand.lane.set_workers(1)
        assert await stand.lane.settled(HANG_S) == "a worker's warm-up did not end within startup_timeout=1 s"
        await stand.end()
        hold.release()
        await stand.until(lambda: stand.engine.lost_count == 0)

    run(test())


def test_with_too_many_stuck_the_process_is_to_be_replaced(tmp_path: Path, hold: Hold) -> None:
    async def test() -> None:
        async with standing(tmp_path, Held(), **LIMITS) as stand:
            replacement = stand.services.stuck.replacement
            assert (await stand.answer(ENDLESS)).status == 504
            await stand.until(lambda: stand.engine.lost_count == 1 and stand.lane.ready_count == 1)
            assert not replacement.done()  # one may be
            assert (await stand.answer(ENDLESS)).status == 504
            await stand.until(replacement.done)
            assert replacement.result().startswith("2 threads are stuck, the last one in m 1.0 (W-9001-m_1.0)")
            assert (await stand.answer(1)).status == 200  # it goes on serving until it is replaced

    run(test())
