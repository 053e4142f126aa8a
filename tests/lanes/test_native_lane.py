"""The native lane between admission and answer: real engine, real loop, exchanges without a socket."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.config.config import Config
from pyserve.errors import InputError
from pyserve.handler import PredictionException
from pyserve.request.exchange import Exchange
from tests.support.lane_stand import HANG_S, Probe, error, run, standing
from tests.support.networks import POISON, Gate, Gated, Greedy, Identity, Poisoned


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fast", [True, False], ids=["on the loop", "in the pool"])
def test_each_request_gets_its_own_answer(tmp_path: Path, is_fast: bool) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=4, workers=2) as stand:
            stand.handler.is_fast = is_fast
            exchanges = [stand.post(float(i), id=f"r{i}") for i in range(50)]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            for i in range(50):
                answer = stand.answers[f"r{i}"]
                assert (answer.status, json.loads(bytes(answer.body))) == (200, [float(i), 0.0, 0.0, 0.0])
                assert (answer.reason, answer.content_type) == ("", "application/json")
            assert stand.lane.in_flight_count == 0

    run(test())


def test_a_poisoned_neighbour_costs_nobody_an_answer(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Poisoned(), batch_size=4, min_batch=4, max_batch_delay_ms=60_000) as stand:
            exchanges = [stand.post(POISON if i == 2 else i, id=f"r{i}") for i in range(4)]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            assert [stand.answers[f"r{i}"].status for i in range(4)] == [200, 200, 503, 200]
            body = error(stand.answers["r2"])
            assert (body["type"], body["message"]) == ("InternalServerException", "Prediction failed")
            assert "poisoned input" in body["detail"]["text"]

    run(test())


def test_the_exceptions_text_stays_inside_when_detail_is_not_private(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Poisoned(), private=False) as stand:
            for body in (error(await stand.answer(POISON)), error(await stand.answer(POISON))):
                assert body["message"] == "Prediction failed"
                assert "poisoned" not in json.dumps(body) and "text" not in body["detail"]

    run(test())


def test_a_model_without_memory_answers_507(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Greedy()) as stand:
            body = error(await stand.answer(POISON))
            assert (body["code"], body["message"]) == (507, "Out of resources")
            assert (await stand.answer(1)).status == 200

    run(test())


@pytest.mark.parametrize("is_fast", [True, False], ids=["on the loop", "in the pool"])
@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (InputError("no picture"), 400, "no picture"),
        (PredictionException("sold out", 429), 429, "sold out"),
        (PredictionException("unsaid"), 500, "unsaid"),
        (KeyError("secret"), 503, "Prediction failed"),
        (MemoryError(), 507, "Out of resources"),
    ],
)
def test_what_preprocess_raises_is_answered(
    tmp_path: Path, raised: Exception, status: int, message: str, is_fast: bool
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), private=False) as stand:
            stand.handler.is_fast = is_fast
            stand.handler.preprocess_error = raised
            body = error(await stand.answer(1))
            assert (body["code"], body["message"]) == (status, message)
            assert "secret" not in json.dumps(body)
            stand.handler.preprocess_error = None
            assert (await stand.answer(1)).status == 200

    run(test())


@pytest.mark.parametrize("is_fast", [True, False], ids=["on the loop", "in the pool"])
@pytest.mark.parametrize("made", ["text", 7, [1.0], torch.zeros(2, 4), torch.tensor(1.0), []], ids=repr)
def test_a_preprocess_that_makes_no_item_fails_its_request(tmp_path: Path, made: object, is_fast: bool) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:
            stand.handler.is_fast = is_fast
            stand.handler.preprocessed = made
            body = error(await stand.answer(1))
            assert (body["code"], body["message"]) == (503, "Prediction failed")
            assert body["detail"]["where"] == "preprocess"

    run(test())


def test_input_that_is_not_the_described_one_is_the_clients_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:
            for body in (b"[1, 2]", b"{", b'"text"', b"[" * 200, b""):
                answer = error(await stand.answer(body=body))
                assert (answer["code"], answer["type"]) == (400, "BadRequestException")

    run(test())


def fail(handler: Probe, data: Any) -> Any:
    raise ValueError("secret")


def refuse(handler: Probe, data: Any) -> Any:
    raise PredictionException("not for you", 418)


@pytest.mark.parametrize(
    ("postprocessor", "status", "message"),
    [
        (lambda handler, data: [1], 503, "number of batch response mismatched"),
        (lambda handler, data: [1] * 5, 503, "number of batch response mismatched"),
        (lambda handler, data: "abcd", 503, "Invalid model predict output"),
        (lambda handler, data: None, 503, "Invalid model predict output"),
        (fail, 503, "Prediction failed"),
        (refuse, 418, "not for you"),
    ],
)
def test_what_postprocess_does_wrong_is_answered(
    tmp_path: Path, postprocessor: Callable[[Probe, Any], Any], status: int, message: str
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=4, min_batch=4, max_batch_delay_ms=60_000) as stand:
            stand.handler.postprocessor = lambda data: postprocessor(stand.handler, data)
            exchanges = [stand.post(i) for i in range(4)]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            for answer in stand.answers.values():
                assert (error(answer)["code"], error(answer)["message"]) == (status, message)

    run(test())


@pytest.mark.parametrize("bad", [{1, 2}, "\ud800", object()], ids=["set", "surrogate", "object"])
def test_a_result_that_cannot_be_encoded_fails_alone(tmp_path: Path, bad: object) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=3, min_batch=3, max_batch_delay_ms=60_000) as stand:
            stand.handler.postprocessor = lambda data: ["a", bad, b"c"]
            exchanges = [stand.post(i, id=f"r{i}") for i in range(3)]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            assert [stand.answers[f"r{i}"].status for i in range(3)] == [200, 503, 200]
            assert error(stand.answers["r1"])["message"] == "Unsupported model output data type."

    run(test())


def test_status_and_headers_of_the_handler_are_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:

            def teapot(data: Any) -> list[bytes]:
                context = stand.handler.context
                assert context is not None
                context.set_response_status(418, "Teapot", 0)
                context.set_response_header(0, "x-own", context.get_request_header(0, "Content-Type") or "")
                return [b"tea"]

            stand.handler.postprocessor = teapot
            answer = await stand.answer(1)
            assert (answer.status, answer.reason, bytes(answer.body)) == (418, "Teapot", b"tea")
            assert answer.headers == {"x-own": "application/json"} and answer.content_type is None

    run(test())


def test_an_answer_above_max_response_size_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), config=Config(max_response_size=40)) as stand:
            assert (await stand.answer(1)).status == 200
            stand.handler.postprocessor = lambda data: [b"x" * 41]
            body = error(await stand.answer(1))
            assert body["code"] == 503 and "max_response_size=40" in body["message"]

    run(test())


# --- admission --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "queue_size"), [(1, 10), (2, 7)])
def test_exactly_the_queue_and_the_workers_are_admitted(
    tmp_path: Path, gate: Gate, workers: int, queue_size: int
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), workers=workers, queue_size=queue_size) as stand:
            gate.shut()
            runs = gate.runs
            first = [stand.post(i) for i in range(workers)]
            await stand.until(lambda: gate.runs == runs + workers)
            exchanges = first + [stand.post(i) for i in range(50)]
            refused = [exchange for exchange in exchanges if exchange.answered]
            assert len(exchanges) - len(refused) == queue_size + workers
            for exchange in refused:
                answer = stand.answers[exchange.request.id]
                body = error(answer)
                assert (body["code"], body["type"]) == (503, "ServiceUnavailableException")
                assert body["message"].startswith('Model "m" has no worker to serve inference request.')
                assert (body["detail"]["reason"], body["detail"]["waiting"]) == ("queue full", queue_size)
                assert body["detail"]["workers"] == workers
                assert int(answer.headers["Retry-After"]) >= 1
            gate.open()
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            assert sum(answer.status == 200 for answer in stand.answers.values()) == queue_size + workers

    run(test())


@pytest.mark.parametrize("url_version", ["default", "1.0"])
@pytest.mark.parametrize(("status", "retry_after"), [(503, 0), (429, 0), (429, 77)])
def test_a_full_queue_is_answered_as_configured(
    tmp_path: Path, gate: Gate, status: int, retry_after: int, url_version: str
) -> None:
    config = Config(queue_full_status=status, queue_full_retry_after=retry_after)

    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), config=config, queue_size=1) as stand:
            gate.shut()
            runs = gate.runs
            stand.post(0)
            await stand.until(lambda: gate.runs == runs + 1)
            stand.post(1)
            refused = stand.post(2, url_version=url_version)
            answer = stand.answers[refused.request.id]
            assert (answer.status, error(answer)["code"], error(answer)["detail"]["reason"]) == (
                status, status, "queue full",
            )  # fmt: skip
            assert answer.headers["Retry-After"] in ({str(retry_after)} if retry_after else {"1", "2", "3"})
            gate.open()

    run(test())


def test_requests_being_preprocessed_count_as_waiting(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), queue_size=3, batch_size=2) as stand:
            stand.handler.is_fast = False
            exchanges = [stand.post(i) for i in range(20)]  # none leaves the pool before the loop turns
            assert sum(not exchange.answered for exchange in exchanges) == 3 + 2
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            assert sum(answer.status == 200 for answer in stand.answers.values()) == 5

    run(test())


def test_requests_of_clients_that_have_gone_make_room(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), queue_size=2) as stand:
            gate.shut()
            runs = gate.runs
            stand.post(0)
            await stand.until(lambda: gate.runs > runs)
            waiting = [stand.post(1), stand.post(2)]
            assert stand.post(3).answered
            for exchange in waiting:
                exchange.disconnect()
            after = [stand.post(4), stand.post(5)]
            assert not any(exchange.answered for exchange in after)
            rows = gate.rows
            gate.open()
            await stand.until(lambda: all(exchange.answered for exchange in after))
            assert gate.rows == rows + 2
            assert not any(exchange.answered for exchange in waiting)

    run(test())


def test_without_a_worker_the_refusal_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), workers=0) as stand:
            answer = await stand.answer(1)
            body = error(answer)
            assert (body["code"], body["detail"]["reason"]) == (503, "no worker")
            assert "Retry-After" in answer.headers and "min_worker=1" in body["detail"]["fix"]
            stand.lane.set_workers(1)
            assert await stand.lane.settled(HANG_S) == ""
            assert (await stand.answer(1)).status == 200

    run(test())


# --- time limits ------------------------------------------------------------------------------------------------------


def test_a_request_that_waits_too_long_expires(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path))) as stand:
            gate.shut()
            runs, rows = gate.runs, gate.rows
            running = stand.post(0)
            await stand.until(lambda: gate.runs > runs)
            stand.lane.settings.client_timeout_ms = 1  # holds for what waits, not for what runs
            answer = await stand.answer(1)
            body = error(answer)
            assert (body["code"], body["detail"]["reason"]) == (503, "expired")
            assert body["detail"]["limit"] == "clientTimeoutInMills=0.001 s"
            assert "Retry-After" in answer.headers
            gate.open()
            await stand.until(lambda: running.answered)
            assert gate.rows - rows == 1
            assert stand.answers[running.request.id].status == 200

    run(test())


def test_a_batch_that_runs_too_long_is_answered_and_the_model_stays(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), response_timeout_s=1, client_timeout_ms=60_000) as stand:
            gate.shut()
            body = error(await stand.answer(1))
            assert (body["code"], body["detail"]["reason"]) == (504, "response_timeout")
            assert "response_timeout=1 s" in body["message"]
            gate.open()
            assert (await stand.answer(1)).status == 200
            assert stand.lane.ready_count == 1

    run(test())


def test_a_client_that_goes_while_its_request_runs_gets_nothing(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=2) as stand:
            gate.shut()
            runs = gate.runs
            exchange = stand.post(1)
            await stand.until(lambda: gate.runs > runs)
            exchange.disconnect()
            assert stand.lane.in_flight_count == 0
            gate.open()
            assert (await stand.answer(2)).status == 200
            assert exchange.request.id not in stand.answers

    run(test())


def test_a_client_that_goes_while_its_request_is_preprocessed_gets_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:
            stand.handler.is_fast = False
            exchange = stand.post(1)
            exchange.disconnect()
            assert (await stand.answer(2)).status == 200
            assert exchange.request.id not in stand.answers
            while stand.lane.waiting_count:  # noqa: ASYNC110 - the second may be back first, and nothing says so
                await asyncio.sleep(0.001)
            assert stand.lane.stats()["submitted"] == 1

    run(test())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_closing_answers_what_was_admitted_and_refuses_the_rest(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), workers=2, batch_size=2) as stand:
            gate.shut()
            exchanges = [stand.post(i) for i in range(9)]
            closing = asyncio.ensure_future(stand.lane.close())
            await asyncio.sleep(0)
            late = error(await stand.answer(1, id="late"))
            assert late["detail"]["reason"] == "draining"
            gate.open()
            await closing
            assert all(stand.answers[exchange.request.id].status == 200 for exchange in exchanges)
            assert stand.lane.core.workers() == []

    run(test())


def test_answering_all_at_once_ends_every_request(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=2) as stand:
            gate.shut()
            exchanges = [stand.post(i) for i in range(5)]
            stand.lane.answer_all(stand.lane.refusal("draining"))
            assert {stand.answers[exchange.request.id].status for exchange in exchanges} == {503}
            gate.open()

    run(test())


def test_scaling_while_closing_does_no_harm(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:
            stand.lane.set_workers(4)
            scaling = asyncio.ensure_future(stand.lane.settled(HANG_S))
            await asyncio.sleep(0)
            await stand.lane.close()
            await scaling
            assert stand.lane.core.workers() == []

    run(test())


def test_an_answer_that_cannot_be_delivered_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=2, min_batch=2, max_batch_delay_ms=60_000) as stand:
            first, second = stand.post(1, id="a"), stand.post(2, id="b")

            def fail_to_deliver(exchange: Exchange) -> None:
                raise OSError("gone")

            first._deliver = fail_to_deliver
            await stand.until(lambda: second.answered)
            assert stand.answers["b"].status == 200
            assert stand.lane.in_flight_count == 0

    with caplog.at_level(logging.CRITICAL, "pyserve.lanes.native"):
        run(test())


def test_a_lane_that_is_closed_is_let_go_of_without_a_garbage_collection(tmp_path: Path) -> None:
    """And the weights with it."""

    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:
            assert (await stand.answer(1)).status == 200
        gc.collect()
        gc.disable()
        try:
            lane = weakref.ref(stand.lane)
            del stand.lane
            await stand.until(lambda: lane() is None)
        finally:
            gc.enable()

    run(test())
