"""Bodies that the engine takes as they lie in memory: the same answers as on the way through the handler."""

from __future__ import annotations

import asyncio
import gc
import json
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve import _core
from pyserve.config.config import Config
from pyserve.handlers.tensor import TensorHandler
from pyserve.request.messages import Headers, Request, Response
from tests.support.lane_bench import FAR, LaneBench
from tests.support.lane_stand import error, run, standing
from tests.support.networks import Affine, Gate, Gated, Identity, InPlace, Outputs, save_script

RAW = ("Content-Type", "application/octet-stream")
JSON = ("Content-Type", "application/json")
EXAMPLE = [torch.zeros(1, 16)]


class Plain(TensorHandler):
    """Not `TensorHandler` itself, so that its methods see every body, though checked as one of pyserve's."""

    __module__ = TensorHandler.__module__


class Owner:
    """What a weak reference can be made to."""


def floats(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()


def lane_of(tmp_path: Path, network: torch.nn.Module, **options: Any) -> LaneBench:
    return LaneBench(save_script(network, tmp_path / "m.pt"), EXAMPLE, **options)


def submit_bytes(lane: LaneBench, owner: object, body: Any) -> int:
    return lane.lane.submit_bytes(owner, body, _core.now_ns(), FAR)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bytes_of_every_kind_are_answered_as_tensors_are(tmp_path: Path, batch_size: int) -> None:
    network = Affine()
    xs = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
    lane = lane_of(tmp_path, network, batch=batch_size)
    lane.hold(batch_size)
    for i, x in enumerate(xs):
        numbers = x.numpy().tobytes()
        body: Any = (numbers, bytearray(numbers), memoryview(bytearray(b"!" + numbers))[1:])[i % 3]
        if i % 4 == 0:
            lane.submit(i, x.unsqueeze(0))
        else:
            submit_bytes(lane, i, body)
    lane.lane.announce()
    lane.wait_for(24)
    expected = network(xs)
    for completion in lane.completions:
        rows = completion.rows()
        assert rows is not None
        for i, row in zip(completion.owners, rows, strict=True):
            assert row is not None
            torch.testing.assert_close(torch.frombuffer(bytearray(row), dtype=torch.float32), expected[i],
                                       atol=1e-5, rtol=1e-5)  # fmt: skip
    lane.close()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_large_rows_are_views_that_keep_the_output(tmp_path: Path, batch_size: int) -> None:
    example = torch.zeros(1, 40_000)
    lane = LaneBench(save_script(Identity(), tmp_path / "m.pt"), [example], batch=batch_size)
    lane.hold(batch_size)
    xs = torch.randn(3, 40_000, generator=torch.Generator().manual_seed(6))
    for i, x in enumerate(xs):
        # At an odd address, as behind the JSON of a request.
        submit_bytes(lane, i, memoryview(bytearray(b"!" + x.numpy().tobytes()))[1:])
    lane.lane.announce()
    lane.wait_for(3)
    found = {i: row for done in lane.completions for i, row in zip(done.owners, done.rows() or [], strict=True)}
    lane.completions.clear()
    gc.collect()
    for i, expected in enumerate(xs):
        row = found[i]
        assert isinstance(row, memoryview) and row.readonly
        assert torch.equal(torch.frombuffer(bytearray(row), dtype=torch.float32), expected)


def test_a_tensor_at_an_odd_address_is_moved_before_it_runs(tmp_path: Path) -> None:
    lane = lane_of(tmp_path, Affine())
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(7))
    odd = torch.frombuffer(bytearray(b"!" + x.numpy().tobytes()), dtype=torch.uint8)[1:]
    tensor = torch.frombuffer(odd.numpy().data, dtype=torch.float32).view(1, 16)
    assert tensor.data_ptr() % 4
    lane.submit(0, tensor)
    lane.wait_for(1)
    assert torch.equal(lane.completions[0].output, Affine()(x))


def test_a_request_is_not_left_asleep_once_it_is_announced(tmp_path: Path) -> None:
    lane = lane_of(tmp_path, Identity(), batch=64)
    done = 0
    for burst in range(1, 60):
        for i in range(burst):
            submit_bytes(lane, (burst, i), bytes(64))
        lane.lane.announce()
        done += burst
        lane.wait_for(done)
    lane.close()


@pytest.mark.slow
def test_a_body_belongs_to_the_engine_until_it_is_answered(tmp_path: Path, gate: Gate) -> None:
    lane = lane_of(tmp_path, Gated(str(gate.path)))
    gate.shut()
    owner, body = Owner(), bytearray(64)
    seen = weakref.ref(owner)
    submit_bytes(lane, owner, body)
    lane.lane.announce()
    del owner
    gc.collect()
    assert seen() is not None
    with pytest.raises(BufferError):
        body.append(0)  # a worker may be reading it
    gate.open()
    lane.wait(lambda: len(lane.completions) == 1)
    body.append(0)
    lane.forget()
    gc.collect()
    assert seen() is None
    lane.close()


def test_a_model_that_writes_to_its_input_does_not_change_read_only_bytes(tmp_path: Path) -> None:
    lane = lane_of(tmp_path, InPlace())
    body = floats(*range(16))
    submit_bytes(lane, 0, body)
    lane.lane.announce()
    lane.wait_for(1)
    assert body == floats(*range(16)) and not torch.equal(lane.answers[0], torch.arange(16.0))
    lane.close()


def test_what_is_no_item_is_refused(tmp_path: Path) -> None:
    lane = lane_of(tmp_path, Identity())
    for size in (0, 60, 68):
        with pytest.raises(ValueError, match=f"64 bytes, not {size}"):
            submit_bytes(lane, 0, bytes(size))
    with pytest.raises(TypeError):
        submit_bytes(lane, 0, "text")
    lane.close()
    two = LaneBench(save_script(Identity(), tmp_path / "two.pt"), [], ready=False)
    with pytest.raises(ValueError, match="one tensor"):
        submit_bytes(two, 0, bytes(64))
    two.close()


def test_only_one_tensor_has_rows_and_the_gone_have_none(tmp_path: Path, gate: Gate) -> None:
    several = lane_of(tmp_path, Outputs())
    submit_bytes(several, 0, bytes(64))
    several.lane.announce()
    several.wait_for(1)
    assert several.completions[0].rows() is None
    several.close()

    lane = lane_of(tmp_path, Gated(str(gate.path)), batch=2)
    lane.hold(2)
    gate.shut()
    runs = gate.runs
    gone = submit_bytes(lane, 0, bytes(64))
    submit_bytes(lane, 1, bytes(64))
    lane.lane.announce()
    lane.wait(lambda: gate.runs > runs)
    assert lane.lane.cancel(gone)
    gate.open()
    lane.wait(lambda: bool(lane.completions))
    assert [row is None for row in lane.completions[0].rows() or []] == [True, False]
    lane.close()


# --- the lane ---------------------------------------------------------------------------------------------------------

HEADS: list[Headers] = [
    [], [RAW], [("content-type", "application/octet-stream; x=y")], [("Content-Type", "image/png")], [JSON],
    [("Content-Type", "text/plain")], [RAW, ("Accept", "application/json")], [RAW, ("Accept", "*/*")],
    [("Accept", "application/octet-stream")], [("Accept", "application/json;q=0.1, application/octet-stream")],
    [("Content-Type", "application/x-www-form-urlencoded")], [RAW, ("ACCEPT", "application/json")],
]  # fmt: skip
# 16 bytes are an item, of numbers or of JSON.
BODIES = [floats(1, -2, 3.5, 4), b"[1.0,2.0,3,4.25]", b"[1, 2, 3, 4]", b"", bytes(17)]


def shape_of(answer: Response) -> tuple[Any, ...]:
    body = bytes(answer.body)
    if answer.status >= 400:  # the request's own id is in it
        told = json.loads(body)
        body = json.dumps({**told, "detail": {**told["detail"], "request_id": ""}}).encode()
    return answer.status, answer.reason, answer.content_type, dict(answer.headers), body


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_answer_is_the_one_that_the_handler_gives(tmp_path: Path, head: Headers) -> None:
    async def answers(handler: TensorHandler) -> list[tuple[Any, ...]]:
        async with standing(tmp_path, Identity(), handler=handler, batch_size=2) as stand:
            return [shape_of(await stand.answer(body=body, headers=head)) for body in BODIES]

    async def test() -> None:
        assert await answers(TensorHandler()) == await answers(Plain())

    run(test())


def test_raw_and_other_requests_share_a_batch(tmp_path: Path) -> None:
    async def test() -> None:
        settings = {"batch_size": 8, "min_batch": 8, "max_batch_delay_ms": 60_000}
        async with standing(tmp_path, Identity(), handler=TensorHandler(), **settings) as stand:
            exchanges = [
                stand.post(body=floats(i, 0, 0, 0), headers=[RAW], id=f"r{i}") if i % 3 else stand.post(i, id=f"r{i}")
                for i in range(8)
            ]
            await stand.until(lambda: all(exchange.answered for exchange in exchanges))
            for i in range(8):
                answer = stand.answers[f"r{i}"]
                expected = floats(i, 0, 0, 0) if i % 3 else json.dumps([float(i), 0.0, 0.0, 0.0], indent=2).encode()
                assert (answer.status, bytes(answer.body)) == (200, expected)
            assert stand.lane.stats()["batches"] == 1

    run(test())


def test_a_raw_answer_above_max_response_size_is_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        config = Config(max_response_size=15)
        async with standing(tmp_path, Identity(), config=config, handler=TensorHandler()) as stand:
            assert "max_response_size=15" in error(await stand.answer(body=bytes(16), headers=[RAW]))["message"]

    run(test())


def test_a_client_that_goes_gets_nothing_and_the_others_their_own(tmp_path: Path, gate: Gate) -> None:
    async def test() -> None:
        async with standing(tmp_path, Gated(str(gate.path)), handler=TensorHandler(), batch_size=4) as stand:
            gate.shut()
            runs = gate.runs
            first = stand.post(body=floats(9, 0, 0, 0), headers=[RAW])
            await stand.until(lambda: gate.runs > runs)
            others = [stand.post(body=floats(i, 0, 0, 0), headers=[RAW], id=f"r{i}") for i in range(4)]
            others[1].disconnect()
            gate.open()
            await stand.until(lambda: first.answered and all(others[i].answered for i in (0, 2, 3)))
            await asyncio.sleep(0)
            assert "r1" not in stand.answers and stand.lane.in_flight_count == 0
            for i in (0, 2, 3):
                assert bytes(stand.answers[f"r{i}"].body)[:4] == floats(2 * i)

    run(test())


# --- the request ------------------------------------------------------------------------------------------------------


def test_added_headers_are_seen_by_whoever_looks() -> None:
    from pyserve.request.messages import ExtraHeaders

    request = Request("POST", "/", headers=[("A", "1"), ("a", "2")])
    request.add_headers(ExtraHeaders(("explain", "False"), ("url_path", "")))
    request.add_headers(ExtraHeaders(("a", "3")))
    assert request.headers == [("A", "1"), ("a", "2"), ("explain", "False"), ("url_path", ""), ("a", "3")]
    assert request.header_text == "A\n1\na\n2\nexplain\nFalse\nurl_path\n\na\n3"
    assert (request.header("A"), request.header("Explain"), request.header("none", "-")) == ("3", "False", "-")
