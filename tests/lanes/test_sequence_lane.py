"""A lane of sequences in this process: what its counters are, and how requests that wait in a sequence end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve.archive.model_config import ModelConfig
from pyserve.config.config import Config
from pyserve.engine import Engine
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.lanes.python import PythonLane
from pyserve.lanes.resources import Services
from pyserve.lanes.sequences import SequenceLane
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.workers import PythonWorkers
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response
from pyserve.telemetry.metrics import Metrics

KEYS = ("ts_request_sequence_id", "ts_request_sequence_start", "ts_request_sequence_end")
SPEC: Any = SimpleNamespace(name="m", mode="batch", gpu_id=None, batch_size=1, header_keys=KEYS)


class Stand:
    """A lane whose workers never come: what is handed over stays queued. ``answers``: by request id."""

    def __init__(self, settings: ModelSettings, lifetime_ms: int = 0):
        self.engine = Engine(asyncio.get_running_loop(), cpu_budget=1)
        self.metrics = Metrics(torch_version="")
        pool: Any = None
        services = Services(Config(), self.engine, self.metrics, pool, pool, ErrorFormat(True))
        config = ModelConfig(sequence_batching=True, sequence_count_max=4, sequence_queue_size=8,
                             sequence_timeout_ms=lifetime_ms)  # fmt: skip
        self.lane = SequenceLane(services, SPEC, "m 1.0", settings, config)
        self.answers: dict[str, Response] = {}

    def post(self, id: str, sequence: str = "s", *, limit_ms: int = 0) -> Pending:
        headers = [(KEYS[0], sequence)] + ([("x-request-timeout-ms", str(limit_ms))] if limit_ms else [])
        request = Request("POST", "/predictions/m", headers=headers, id=id, arrived_at=time.monotonic_ns(),
                          has_timing=bool(limit_ms))  # fmt: skip

        def deliver(exchange: Exchange) -> None:
            assert exchange.response is not None and id not in self.answers
            self.answers[id] = exchange.response

        pending = Pending(self.lane, Exchange(request, deliver), "1.0", "default")
        self.lane.predict(pending)
        return pending

    def end(self, sequence: str) -> None:
        """As a handler does, with a header of an answer."""
        self.lane._on_answer(Response(200, b"", headers={KEYS[2]: sequence}))

    def reason(self, id: str) -> str:
        return str(json.loads(bytes(self.answers[id].body))["detail"]["reason"])


@asynccontextmanager
async def standing(workers: int = 1, lifetime_ms: int = 0, **settings: Any) -> AsyncIterator[Stand]:
    stand = Stand(ModelSettings(**settings), lifetime_ms)
    stand.lane.set_workers(workers)
    try:
        yield stand
    finally:
        stand.lane.answer_all(stand.lane.refusal("draining"))
        await stand.lane.close()
        stand.engine.close()


async def until(is_done: Callable[[], bool]) -> None:
    while not is_done():  # noqa: ASYNC110 - timers are waited for, which nothing reports
        await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PythonWorkers, "set_count", lambda self, count: None)
    monkeypatch.setattr(PythonLane, "may_take", True)


def test_all_counters_are_there_without_a_worker_too() -> None:
    async def test() -> None:
        async with standing() as stand:
            counted = stand.lane.stats()
            stand.lane.set_workers(0)
            assert stand.lane.stats().keys() == counted.keys() and stand.lane.stats()["submitted"] == 0
            assert stand.lane.worker_rows() == [] and stand.lane.capacity >= 4096
            stand.post("a")
            assert stand.answers["a"].status == 503 and stand.reason("a") == "no worker"

    run(test())


def test_a_request_goes_to_the_engine_and_the_next_one_waits() -> None:
    async def test() -> None:
        async with standing() as stand:
            first, second = stand.post("a"), stand.post("b")
            assert (first.stage, second.lane, stand.lane.waiting_count) == (SUBMITTED, stand.lane, 2)
            assert (stand.lane.stats()["queue_size"], stand.lane.in_flight_count) == (2, 2)
            first.exchange.disconnect()
            await until(lambda: second.stage == SUBMITTED)
            assert (first.stage, stand.lane.in_flight_count) == (OVER, 1)

    run(test())


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_client_that_hangs_up_waits_in_no_sequence(has_ended: bool) -> None:
    """Also of one that the handler has ended meanwhile: what waits in it still runs."""

    async def test() -> None:
        async with standing() as stand:
            first, gone, last = stand.post("a"), stand.post("b"), stand.post("c")
            if has_ended:
                stand.end("s")
            gone.exchange.disconnect()
            assert gone.stage == OVER and not stand.answers
            first.exchange.disconnect()
            await until(lambda: last.stage == SUBMITTED)
            assert gone.ticket == 0

    run(test())


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_request_whose_client_waits_no_longer_is_answered_once_and_never_runs(has_ended: bool) -> None:
    async def test() -> None:
        async with standing() as stand:
            first, late = stand.post("a"), stand.post("b", limit_ms=20)
            last = stand.post("c")
            if has_ended:
                stand.end("s")
            await until(lambda: "b" in stand.answers)
            assert (stand.answers["b"].status, stand.reason("b"), late.ticket) == (503, "expired", 0)
            first.exchange.disconnect()
            await until(lambda: last.stage == SUBMITTED)
            assert (late.stage, late.ticket) == (OVER, 0)

    run(test())


def test_what_waits_past_its_time_expires_in_its_sequence() -> None:
    async def test() -> None:
        async with standing(client_timeout_ms=100) as stand:
            stand.post("a"), stand.post("b")
            await until(lambda: len(stand.answers) == 2)
            assert {stand.reason(id) for id in "ab"} == {"expired"}
            assert stand.lane.in_flight_count == 0

    run(test())


def test_a_sequence_past_its_lifetime_ends_only_once_it_has_no_requests() -> None:
    """Its next request would begin another one of its name, and overtake those that wait."""

    async def test() -> None:
        async with standing(lifetime_ms=1) as stand:
            first, second = stand.post("a"), stand.post("b")
            await asyncio.sleep(0.25)  # it is looked after meanwhile
            third = stand.post("c")
            assert (first.stage, second.lane, third.lane) == (SUBMITTED, stand.lane, stand.lane)
            stand.lane.answer_error(third, stand.lane.refusal("draining"))
            stand.lane.answer_error(second, stand.lane.refusal("draining"))
            first.lane.answer(first, Response(200, b""))
            await until(lambda: stand.lane._sequences == {})
            stand.post("d")
            assert stand.answers["d"].status == 409 and "sequenceTimeoutMSec=1" in str(stand.answers["d"].body)

    run(test())


def test_without_a_limit_a_sequence_is_idle_for_a_minute() -> None:
    async def test() -> None:
        async with standing() as stand:
            pending = stand.post("a")
            pending.lane.answer(pending, Response(200, b""))
            await asyncio.sleep(0)
            (sequence,) = stand.lane._sequences.values()
            sequence.used_at -= 59
            stand.lane._look()
            assert list(stand.lane._sequences) == ["s"]
            sequence.used_at -= 2
            stand.lane._look()
            assert stand.lane._sequences == {}

    run(test())


def test_a_sequence_begun_again_goes_to_the_worker_that_has_waited_longest() -> None:
    async def test() -> None:
        async with standing(workers=2) as stand:
            members = []
            for id in "abc":
                pending = stand.post(id)
                members.append(pending.lane)
                assert isinstance(pending.lane, PythonLane)
                pending.lane.answer(pending, Response(200, b"", headers={KEYS[2]: "s"}))
            assert members[0] is members[2] is not members[1]

    run(test())


def test_draining_answers_what_waits_and_takes_no_more() -> None:
    async def test() -> None:
        async with standing() as stand:
            first = stand.post("a")
            stand.post("b")
            closing = asyncio.get_running_loop().create_task(stand.lane.close())
            await until(lambda: "b" in stand.answers)
            stand.post("c")
            assert stand.reason("b") == stand.reason("c") == "draining" and first.stage == SUBMITTED
            stand.lane.answer_all(stand.lane.refusal("draining"))
            await closing
            assert stand.reason("a") == "draining"

    run(test())
