"""Requests of rows in the native lane: one end for each, whatever becomes of its rows; one row needs no row object."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.api.kserve_requests import HandlerRowsPending, TensorsPending
from pyserve.api.open_inference import InferInput, InferOutput, InferRequest, InferResponse
from pyserve.api.open_inference_json import outputs_of_answers, request_as_json
from pyserve.api.transport import Transport
from pyserve.config.config import Config
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.lanes.pending import OVER, SUBMITTED, Pending
from pyserve.lanes.row_requests import RowPending
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Headers, Request, Response
from tests.support.lane_stand import SHAPE, Stand, error, run, standing
from tests.support.networks import Gate, Gated, Identity

RAW: Headers = [("Content-Type", "application/octet-stream")]
ITEM = bytes(4 * SHAPE[0])


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


class ShapeTransport(Transport):
    """Brings zeros, ``count`` rows of them, and answers with the shape of the first output."""

    is_read_quick = True

    def __init__(self, count: int):
        self._count = count

    def read(self) -> InferRequest:
        shape = (self._count, *SHAPE)
        return InferRequest([InferInput("x", "FP32", shape, memoryview(bytearray(ITEM * self._count)))])

    def is_encode_quick(self, request: InferRequest, outputs: list[InferOutput]) -> bool:
        return True

    def encode(self, request: InferRequest, response: InferResponse) -> Response:
        return Response(200, str(response.outputs[0].shape).encode())

    def of_copy(self, request: Request) -> ShapeTransport:
        return ShapeTransport(self._count)


class Rows(TensorsPending):
    """Of zeros; can be told to fail when outputs come."""

    failure: Exception | None = None

    def take_tensors(self, first: int, outputs: list[torch.Tensor], names: tuple[str, ...]) -> None:
        if self.failure is not None:
            raise self.failure
        super().take_tensors(first, outputs, names)


def post_rows(
    stand: Stand, count: int, *, id: str, limit_ms: int = 0, deadline: int = 0, failure: Exception | None = None
) -> Rows:
    headers = [("x-request-timeout-ms", str(limit_ms))] if limit_ms else []
    request = Request("POST", "/v2/models/m/infer", headers=headers, id=id, arrived_at=time.monotonic_ns())
    if deadline:
        request.deadline, request.has_timing = deadline, True

    def deliver(exchange: Exchange) -> None:
        assert exchange.response is not None and id not in stand.answers
        stand.answers[id] = exchange.response

    rows = Rows(stand.lane, Exchange(request, deliver), "1.0", "default", transport=ShapeTransport(count),
                specs=[TensorSpec("float32", SHAPE)], output_names=())  # fmt: skip
    rows.failure = failure
    stand.lane.predict(rows)
    return rows


def is_of(thing: object, stand: Stand) -> bool:
    # Not isinstance, which asks things that only pretend to be of another class.
    return issubclass(type(thing), Pending) and thing.lane is stand.lane  # type: ignore[attr-defined]


def test_what_is_answered_is_not_kept_until_a_garbage_collection(tmp_path: Path) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=4) as stand:
            gc.collect()
            gc.disable()
            try:
                for number in range(8):
                    post_rows(stand, 1 + 2 * (number % 2), id=str(number))
                await stand.until(lambda: len(stand.answers) == 8)
                await stand.until(lambda: not any(is_of(each, stand) for each in gc.get_objects()))
            finally:
                gc.enable()

    run(test())


COUNTS = pytest.mark.parametrize("count", [1, 8])


@COUNTS
def test_rows_of_a_client_that_waits_no_longer_do_not_run(tmp_path: Path, gate: Gate, count: int) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1) as stand:
            gate.shut()
            warmed = gate.runs
            first = stand.post(1.0, id="first")
            await stand.until(lambda: gate.runs > warmed)
            post_rows(stand, count, id="rows", limit_ms=50)
            await stand.until(lambda: "rows" in stand.answers)
            body = error(stand.answers["rows"])
            assert (body["code"], body["detail"]["reason"]) == (503, "expired")
            runs = gate.runs
            gate.open()
            await stand.until(lambda: first.answered)
            await stand.until(lambda: stand.lane.stats()["queue_size"] == 0)
            assert stand.lane.in_flight_count == 0 and gate.runs == runs

    run(test())


@COUNTS
def test_a_request_of_rows_whose_first_runs_has_begun(tmp_path: Path, gate: Gate, count: int) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1) as stand:
            gate.shut()
            runs = gate.runs
            post_rows(stand, count, id="rows", limit_ms=200)
            await stand.until(lambda: gate.runs > runs)
            await stand.until(lambda: "rows" in stand.answers)
            body = error(stand.answers["rows"])
            assert (body["code"], body["detail"]["reason"]) == (504, "x-request-timeout-ms")
            assert stand.lane.in_flight_count == 0
            gate.open()
            await stand.until(lambda: stand.lane.core.running == 0)
            assert gate.runs == runs + 1

    run(test())


@COUNTS
def test_a_client_that_hangs_up_takes_its_rows_with_it(tmp_path: Path, gate: Gate, count: int) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1) as stand:
            gate.shut()
            warmed = gate.runs
            first = stand.post(1.0, id="first")
            await stand.until(lambda: gate.runs > warmed)
            runs = gate.runs
            post_rows(stand, count, id="rows").exchange.disconnect()
            assert stand.lane.in_flight_count == 1
            gate.open()
            await stand.until(lambda: first.answered)
            await stand.until(lambda: stand.lane.stats()["queue_size"] == 0)
            assert gate.runs == runs and "rows" not in stand.answers

    run(test())


@pytest.mark.parametrize(
    ("failure", "status"), [(MemoryError(), 507), (RuntimeError("nobody expected this"), 500)], ids=str
)
@pytest.mark.parametrize("count", [1, 40])
def test_outputs_that_cannot_be_kept_end_the_request(
    tmp_path: Path, failure: Exception, status: int, count: int
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), batch_size=2) as stand:
            post_rows(stand, count, id="rows", failure=failure)
            await stand.until(lambda: "rows" in stand.answers)
            assert error(stand.answers["rows"])["code"] == status
            assert stand.lane.in_flight_count == 0
            post_rows(stand, 3, id="others")
            await stand.until(lambda: "others" in stand.answers)
            assert bytes(stand.answers["others"].body) == b"[3, 4]"

    run(test())


def test_one_row_needs_no_object_of_its_own(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1) as stand:
            gate.shut()
            rows = post_rows(stand, 1, id="rows")
            assert rows.stage == SUBMITTED and not rows._rows and stand.lane.in_flight_count == 1
            await stand.until(lambda: rows.began_at() > 0)
            gate.open()
            await stand.until(lambda: "rows" in stand.answers)
            assert (rows.stage, stand.lane.in_flight_count) == (OVER, 0)
            assert bytes(stand.answers["rows"].body) == b"[1, 4]"
            assert stand.metrics.request_totals("m", "1.0")[0]["count"] == 1

    run(test())


@pytest.mark.parametrize("count", [1, 2])
def test_of_rows_only_the_total_is_timed(tmp_path: Path, count: int) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity(), config=Config(server_timing=True)) as stand:
            post_rows(stand, count, id="rows")
            await stand.until(lambda: "rows" in stand.answers)
            assert re.fullmatch(r"total;dur=[0-9.]+", stand.answers["rows"].headers["Server-Timing"])

    run(test())


def test_requests_of_one_row_and_of_more_share_a_batch(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=8) as stand:
            gate.shut()
            runs = gate.runs
            stand.post(1.0, id="first")
            await stand.until(lambda: gate.runs > runs)
            counts = {"a": 1, "b": 2, "c": 1, "d": 1}
            for id, count in counts.items():
                post_rows(stand, count, id=id)
            plain = stand.post(2.0, id="plain")
            gate.open()
            await stand.until(lambda: len(stand.answers) == 6)
            assert stand.lane.stats()["batches"] == 2 and plain.answered
            assert {id: bytes(stand.answers[id].body) for id in counts} == {
                id: f"[{count}, 4]".encode() for id, count in counts.items()
            }

    run(test())


@COUNTS
def test_rows_over_the_models_own_limits(tmp_path: Path, gate: Gate, count: int) -> None:
    """What waits too long is 503, what runs too long 504, and only rows that were the reason are told."""

    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1, response_timeout_s=1) as stand:
            gate.shut()
            runs = gate.runs
            post_rows(stand, 1, id="running")
            await stand.until(lambda: gate.runs > runs)
            stand.lane.settings.client_timeout_ms = 50
            post_rows(stand, count, id="waiting")
            await stand.until(lambda: len(stand.answers) == 2)
            running, waiting = error(stand.answers["running"]), error(stand.answers["waiting"])
            assert (running["code"], running["detail"]["reason"]) == (504, "response_timeout")
            assert (waiting["code"], waiting["detail"]["reason"]) == (503, "expired")
            assert ("row" in waiting["detail"], "row" in running["detail"]) == (count > 1, False)
            gate.open()

    run(test())


def test_a_row_that_finds_the_ring_full_is_refused(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyserve.lanes.engine_lane.RING_CAPACITY_MIN", 8)

    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), queue_size=2) as stand:
            gate.shut()
            count = 4 * stand.lane.core.capacity
            stand.lane.settings.queue_size = 10 * count
            for index in range(count):
                post_rows(stand, 1, id=f"r{index}")
            gate.open()
            await stand.until(lambda: len(stand.answers) == count)
            refused = [answer for answer in stand.answers.values() if answer.status != 200]
            assert 0 < len(refused) < count and stand.lane.in_flight_count == 0
            assert all(error(each)["detail"]["reason"] == "queue full" for each in refused)

    run(test())


def test_a_batch_that_cannot_be_delivered_is_answered_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Identity()) as stand:

            def break_down(completion: Any) -> None:
                raise RuntimeError("nobody expected this")

            monkeypatch.setattr(stand.lane, "complete", break_down)
            answer = await stand.answer(1.0)
            assert error(answer)["code"] == 500 and b"nobody" not in bytes(answer.body)
            assert stand.lane.in_flight_count == 0

    run(test())


@pytest.mark.parametrize("headers", [RAW, [("Content-Type", "application/json")]], ids=["raw", "json"])
def test_a_ring_that_is_full_refuses(
    tmp_path: Path, gate: Gate, headers: Headers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many the settings let wait."""
    from pyserve.handlers.tensor import TensorHandler

    monkeypatch.setattr("pyserve.lanes.engine_lane.RING_CAPACITY_MIN", 8)

    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), handler=TensorHandler(), queue_size=2) as stand:
            capacity = stand.lane.core.capacity
            stand.lane.settings.queue_size = 10 * capacity
            body = ITEM if headers is RAW else b"[0, 0, 0, 0]"
            gate.shut()
            count = 4 * capacity
            for index in range(count):
                stand.post(body=body, id=f"r{index}", headers=headers)
            gate.open()
            await stand.until(lambda: len(stand.answers) == count)
            refused = [answer for answer in stand.answers.values() if answer.status != 200]
            assert refused and all(error(each)["detail"]["reason"] == "queue full" for each in refused)
            assert stand.lane.in_flight_count == 0

    run(test())


def test_rows_of_a_call_with_a_deadline_have_it_too(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), batch_size=1) as stand:
            gate.shut()
            stand.post(1.0)
            await stand.until(lambda: stand.lane.core.running == 1)
            deadline = time.monotonic_ns() + 60_000_000_000
            rows = post_rows(stand, 2, id="rows", deadline=deadline)
            asked = HandlerRowsPending(
                stand.lane, rows.exchange, "1.0", "default", transport=ShapeTransport(1), headers=[]
            )
            own = asked.row_request(bytearray(), "")
            assert (own.deadline, own.has_timing) == (deadline, True)
            own_rows = rows._rows.values()
            assert all(isinstance(each, RowPending) and each.client_deadline == deadline for each in own_rows)
            gate.open()
            await stand.until(lambda: "rows" in stand.answers)

    run(test())


def test_numbers_of_a_handlers_json_keep_all_their_digits() -> None:
    answers = [Response(200, b"[0.1, 2]"), Response(200, b"[1e-300, 0.3]")]
    (output,) = outputs_of_answers(answers)
    assert isinstance(output, InferOutput) and output.datatype == "FP64"
    assert output.values() == [0.1, 2.0, 1e-300, 0.3]


@pytest.mark.parametrize(("elements", "data", "parameters"), [
    (["a", b"\xc3\xbc"], ["a", "\u00fc"], None),
    (["a", b"\xff"], ["YQ==", "/w=="], {"content_type": "base64"}),
])  # fmt: skip
def test_bytes_reach_an_own_handler_as_text_or_all_as_base64(
    elements: list[Any], data: list[str], parameters: dict[str, str] | None
) -> None:
    told = json.loads(request_as_json(InferRequest([InferInput("x", "BYTES", (2,), elements)]), "m", as_base64=False))
    (entry,) = told["inputs"]
    assert (entry["data"], entry.get("parameters")) == (data, parameters)
