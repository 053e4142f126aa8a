"""Which requests the audit runs again, what it counts and says, and what it leaves alone; without processes."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve.archive.model_config import ModelConfig
from pyserve.errors import ModelLoadError, OverloadedError
from pyserve.lanes.audit import Repetition
from pyserve.lanes.native import NativeLane
from pyserve.models import audit as audit_module
from pyserve.models.audit import KEPT_SIZE_MAX, LOG_INTERVAL_S, WAITING_MAX, Audit
from pyserve.models.audit_choice import audit_of, tolerance_of
from pyserve.models.loader import PRECISION_ERROR_MAX
from pyserve.proof.comparison import ROUNDING
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response


class FakeLane:
    """Answers what it is told to.

    Attributes:
        answer: to every request; a text is the reason why there is none.
        asked: bodies of the requests.
        gate: answers wait for it.
    """

    def __init__(self, answer: Response | str):
        self.answer = answer
        self.asked: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.was_asked = asyncio.Event()
        self.wanted_count = 0
        self.ended = False
        self.failure = ""
        self.settings = type("Settings", (), {"startup_timeout_s": 1})

    def set_workers(self, count: int) -> None:
        self.wanted_count = 0 if self.failure else count

    async def settled(self, timeout_s: float) -> str:
        return self.failure

    async def ask(self, request: Request, again: Any) -> Response | str:
        self.asked.append(bytes(request.body))
        self.was_asked.set()
        await self.gate.wait()
        return self.answer

    async def end(self) -> None:
        self.ended = True


class Stand:
    """An audit of all requests, and clients that each get what ``ask`` is told."""

    def __init__(self, answer: Response | str, share: float = 1.0):
        self.lane = FakeLane(answer)
        self.opened = 0
        self.now = 1000.0
        self.audit = Audit(
            "m 1.0", share=share, tolerance=1e-4, open_lane=self._open, causes="batches", now=lambda: self.now
        )
        self.delivered: list[Exchange] = []

    async def _open(self) -> Any:
        self.opened += 1
        return self.lane

    def begin(self, body: bytes = b"[1]", id: str = "r") -> Exchange:
        request = Request("POST", "/predictions/m", body=bytearray(body), id=id)
        exchange = Exchange(request, self.delivered.append)
        self.audit.consider(exchange, Repetition(lambda lane, copy: None))  # type: ignore[arg-type, return-value]
        return exchange

    def ask(self, live: Response, body: bytes = b"[1]", id: str = "r") -> None:
        self.begin(body, id).respond(live)

    async def finish(self) -> None:
        if self.audit._task is not None:
            await self.audit._task


def said(value: Any) -> Response:
    return Response(200, json.dumps(value).encode())


@asynccontextmanager
async def stand(answer: Response | str, share: float = 1.0) -> AsyncIterator[Stand]:
    made = Stand(answer, share)
    yield made
    await made.audit.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


@pytest.mark.parametrize("share, expected", [(1.0, 10_000), (0.3, 3000), (0.1, 1000), (0.001, 10)])
def test_requests_are_chosen_evenly_beginning_with_the_first(share: float, expected: int) -> None:
    audit = Audit("m 1.0", share=share, tolerance=0.0, open_lane=lambda: None, causes="")  # type: ignore[arg-type, return-value]
    chosen = []

    def body() -> bytes:
        chosen.append(number)
        return b""

    for number in range(10_000):  # noqa: B007 - `body` tells it
        exchange = Exchange(Request("POST", "/"), lambda each: None)
        audit.consider(exchange, Repetition(lambda lane, copy: None, body))  # type: ignore[arg-type, return-value]
        exchange.disconnect()
    assert len(chosen) == expected and chosen[0] == 0
    gaps = {after - before for before, after in itertools.pairwise(chosen)}
    assert gaps <= {int(1 / share), int(1 / share) + 1}


def test_equal_answers_are_counted_and_no_difference() -> None:
    async def work() -> None:
        async with stand(said([1.0, 2.0])) as made:
            for _ in range(5):
                made.ask(said([1.0, 2.00001]))
            await made.finish()
            assert made.audit.report() == {
                "share": 1.0, "tolerance": 1e-4, "requests": 5, "differences": 0, "skipped": {},
            }  # fmt: skip
            assert len(made.delivered) == 5

    run(work())


def test_first_difference_is_kept_with_the_digest_of_its_body(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with stand(said([1.0, 2.0])) as made:
            made.ask(said([1.0, 2.0]), b"[0]", "right")
            made.ask(said([1.0, 2.5]), b"[1]", "wrong")
            made.ask(said([1.0, 3.0]), b"[2]", "worse")
            await made.finish()
            report = made.audit.report()
            assert (report["requests"], report["differences"]) == (3, 2)
            assert report["firstDifference"] == {
                "requestId": "wrong", "sha256": hashlib.sha256(b"[1]").hexdigest(), "difference": 0.25,
                "what": "the numbers of JSON",
            }  # fmt: skip

    run(work())
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    text = record.getMessage()
    assert "request wrong" in text and hashlib.sha256(b"[1]").hexdigest() in text
    assert "0.25 of 0.0001 allowed" in text and "batches" in text and "random" in text


def test_later_differences_are_logged_at_a_bounded_rate(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            for number in range(4):
                made.ask(said([2.0]), id=f"early{number}")
            await made.finish()
            made.now += LOG_INTERVAL_S
            made.ask(said([2.0]), id="late")
            await made.finish()
            assert made.audit.differences == 5

    run(work())
    texts = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len(texts) == 2
    assert "request early0" in texts[0] and "request late" in texts[1] and "3 more since" in texts[1]


def test_error_of_the_model_alone_is_a_difference() -> None:
    async def work() -> None:
        async with stand(Response(503, b'{"code": 503}')) as made:
            made.ask(said([1.0]))
            await made.finish()
            assert (made.audit.requests, made.audit.differences) == (1, 1)

    run(work())


def test_errors_streams_and_what_has_no_answer_alone_are_skipped_with_their_reason() -> None:
    async def work() -> None:
        async with stand("process died") as made:
            refused = ErrorFormat().answer(OverloadedError("no worker"), Request("POST", "/"))
            made.ask(refused)
            made.ask(Response(418, b"teapot"))
            streamed = made.begin()
            streamed.start_stream(Response(200, b"part"))
            streamed.end_stream(b"end")
            assert not made.opened  # nothing was worth a process
            made.ask(said([1.0]))
            await made.finish()
            assert made.audit.report()["skipped"] == {"error": 2, "process died": 1, "streamed": 1}
            assert made.audit.requests == 0

    run(work())


def test_requests_beyond_the_few_that_may_wait_are_skipped_and_answered() -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            made.lane.gate.clear()
            for _ in range(WAITING_MAX + 3):
                made.ask(said([1.0]))
            assert len(made.delivered) == WAITING_MAX + 3
            made.lane.gate.set()
            await made.finish()
            assert made.audit.requests == WAITING_MAX
            assert made.audit.skipped == {"too many wait": 3}

    run(work())


def test_memory_of_kept_bodies_and_answers_is_bounded_and_given_back() -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            made.ask(said([1.0]), bytes(KEPT_SIZE_MAX + 1))
            half = bytes(KEPT_SIZE_MAX // 2 + 1)
            made.ask(Response(200, half), half)  # body and answer together
            first, second = made.begin(half), made.begin(half)
            assert made.audit.skipped == {"too large": 3}
            first.respond(said([1.0]))
            second.respond(said([1.0]))
            await made.finish()
            made.ask(said([1.0]), half)
            await made.finish()
            assert made.audit.requests == 2
            assert made.audit._kept_size == 0

    run(work())


def test_clients_that_hang_up_leave_their_place_to_others() -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            for _ in range(WAITING_MAX):
                made.begin().disconnect()
            made.ask(said([1.0]))
            await made.finish()
            assert made.audit.requests == 1 and not made.audit.skipped

    run(work())


def test_network_that_changes_the_body_in_place_does_not_change_what_is_run_again() -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            exchange = made.begin(b"[1]")
            exchange.request.body[:] = b"[9]"
            exchange.respond(said([1.0]))
            await made.finish()
            assert made.lane.asked == [b"[1]"]

    run(work())


def test_answer_leaves_even_if_the_audit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            monkeypatch.setattr(audit_module.KeptAnswer, "of", lambda response: 1 / 0)
            made.ask(said([1.0]))
            assert [each.response.body for each in made.delivered if each.response] == [b"[1.0]"]

    run(work())


def test_process_that_cannot_be_started_is_told_once_and_tried_again_after_a_pause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            made.lane.failure = "no memory"
            for _ in range(5):
                made.ask(said([1.0]))
            await made.finish()
            assert made.audit.skipped == {"no process": 5}
            made.lane.failure = ""
            made.now += audit_module.RETRY_PAUSE_S
            made.ask(said([1.0]))
            await made.finish()
            assert made.audit.requests == 1 and made.opened == 1

    run(work())
    assert sum("the audit has no process" in each.getMessage() for each in caplog.records) == 1


def test_archive_that_cannot_be_prepared_for_the_audit_costs_no_answer() -> None:
    async def work() -> None:
        async def fail() -> Any:
            raise ModelLoadError("no interpreter")

        async with stand(said([1.0])) as made:
            made.audit._open_lane = fail
            made.ask(said([1.0]))
            await made.finish()
            assert made.audit.skipped == {"no process": 1} and len(made.delivered) == 1

    run(work())


def test_stopping_ends_the_process_and_the_next_request_starts_another() -> None:
    async def work() -> None:
        async with stand(said([1.0])) as made:
            made.lane.gate.clear()
            unanswered = made.begin()
            made.ask(said([1.0]))
            await made.lane.was_asked.wait()
            await made.audit.stop()
            assert made.lane.ended
            unanswered.respond(said([1.0]))  # too late to be audited
            made.lane.gate.set()
            made.ask(said([1.0]))
            await made.finish()
            assert made.audit.requests == 1 and made.opened == 2

    run(work())


def test_tolerance_follows_the_precision_and_what_the_user_allows() -> None:
    assert tolerance_of("fp32", None, is_on_gpu=False) == ROUNDING["fp32"]
    assert tolerance_of("fp32", 0.5, is_on_gpu=False) == ROUNDING["fp32"]
    assert tolerance_of("fp32", None, is_on_gpu=True) == ROUNDING["fp16"]
    assert tolerance_of("bf16", None, is_on_gpu=False) == PRECISION_ERROR_MAX > ROUNDING["bf16"]
    assert tolerance_of("fp16", 1e-6, is_on_gpu=False) == ROUNDING["fp16"]
    assert tolerance_of("bf16", 0.5, is_on_gpu=False) == 0.5


@pytest.mark.parametrize(("served", "tolerance"), [("fp32", 1e-4), ("int8", 0.05)])
def test_the_precision_that_counts_is_the_one_that_is_served(served: str, tolerance: float) -> None:
    """int8 that cannot be had is served in fp32, whose differences are no rounding of int8."""
    lane = object.__new__(NativeLane)
    lane.network = SimpleNamespace(precision=served)  # type: ignore[assignment]
    config = ModelConfig(audit_share=0.5, precision="int8")
    options: Any = SimpleNamespace(archive=SimpleNamespace(config=config), devices=["cpu"], label="m 1.0")
    audit = audit_of(options, lane)
    assert audit is not None and audit.report()["tolerance"] == tolerance
