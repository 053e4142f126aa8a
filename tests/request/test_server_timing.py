"""``Server-Timing``: the stages of an answer and why its batch was released, for those who ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pyserve.errors import BadRequestError
from pyserve.request.messages import ASK_HEADER, Request, Response
from pyserve.request.stages import Stages, asked_stages, worker_note
from tests.support import serving_models
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Answer, Server

ASKED = {**JSON, ASK_HEADER: "1"}
METRIC = re.compile(r'([a-z-]+)(?:;dur=([0-9]+\.[0-9]{3}))?((?:;[a-z]+=(?:"[a-z_ ]*"|[0-9]+))*)')

HANDLER = """
import time


def handle(data, context):
    if data is None:
        return None
    time.sleep(0.02)
    if data[0]["body"] == "stream":
        return stream()
    if data[0]["body"] == "fail":
        raise ValueError("asked for")
    context.set_response_header(0, "server-timing", 'tokens;desc="mine"')
    return ["done"] * len(data)


def stream():
    yield ["a"]
    yield ["b"]
"""


def parsed(text: str) -> dict[str, tuple[float, str]]:
    """Name -> (duration in ms, the other parameters)."""
    found = {}
    for each in text.split(", "):
        match = METRIC.fullmatch(each)
        assert match, each
        assert match[1] not in found
        found[match[1]] = (float(match[2] or -1), match[3])
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("timing"))
    serving_models.write_linear(server.store)
    serving_models.write_pictures(server.store)
    serving_models.write_torchscript(server.store, serving_models.Linear(), "batched", config={
        "input": serving_models.LINEAR_INPUT, "batchSize": 4, "minBatch": 3, "maxBatchDelay": 200,
    })  # fmt: skip
    write_handler(server.store, "handler", HANDLER)
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


def ask(server: Server, model: str, value: object, headers: dict[str, str] | None = None) -> Answer:
    return server.ask("POST", f"/predictions/{model}", json.dumps(value).encode(), headers or ASKED)


def of(value: str | None) -> Request:
    return Request("POST", "/", headers=[] if value is None else [("X-Server-Timing", value)])


def test_the_header_says_yes_or_no_or_is_refused() -> None:
    for value, expected in (("1", True), ("true", True), ("TRUE", True), ("0", False), ("false", False)):
        stages = asked_stages(of(value))
        assert stages is not None and stages.is_told is expected
    assert asked_stages(of(None)) is None
    for value in ("", "2", "yes please", "1, 1"):
        with pytest.raises(BadRequestError, match=f"{ASK_HEADER} must be 1 or 0"):
            asked_stages(of(value))


def completion(**times: int) -> SimpleNamespace:
    return SimpleNamespace(release="idle", batch_size=2, staged_at=0, **times)


def test_what_a_worker_notes_is_taken_out_of_its_answers_head() -> None:
    for head in (b"", b"OK", b"OK\ncontent-type\ntext/plain"):
        stages = Stages(is_told=True)
        noted = worker_note(head, 20, 30, 60, 70)
        assert stages.note_python(completion(started_at=15, finished_at=80), 10, noted) == head
        delivery = stages.times.pop("delivery")
        assert delivery[0] == 70
        assert stages.times == {
            "queue": (10, 15), "staging": (15, 20), "preprocess": (20, 30), "inference": (30, 60),
            "postprocess": (60, 70),
        }  # fmt: skip
        assert (stages.release, stages.batch_size) == ("idle", 2)


@pytest.mark.parametrize("noted", [b"OK", b"", b"OK\nx-pyserve-stages\n1,2,3", b"OK\nx-pyserve-stages\na,b,c,d"])
def test_without_a_workers_note_the_lanes_own_times_count(noted: bytes) -> None:
    stages = Stages(is_told=True)
    assert stages.note_python(completion(started_at=15, finished_at=80), 10, noted) in (b"OK", b"")
    assert stages.times == {"queue": (10, 15), "inference": (15, 80)}


def test_the_answers_own_metrics_stay_in_front_and_others_headers_are_not_touched() -> None:
    shared = {"server-timing": "db;dur=1", "Retry-After": "1"}
    response = Response(503, headers=shared)
    stages = Stages(is_told=True)
    stages.times["queue"] = (2_000_000, 1_000_000)  # a clock that seems to go back is no negative time
    stages.tell(response, 0)
    assert response.headers["Server-Timing"].startswith("db;dur=1, queue;dur=0.000, total;dur=")
    assert set(response.headers) == {"Retry-After", "Server-Timing"}
    assert shared == {"server-timing": "db;dur=1", "Retry-After": "1"}


@pytest.mark.server
def test_nobody_is_told_who_does_not_ask(server: Server) -> None:
    for headers in (JSON, {**JSON, ASK_HEADER: "0"}):
        answer = ask(server, "linear", [1, 2, 3, 4], headers)
        assert answer.status == 200 and "server-timing" not in answer.headers


@pytest.mark.server
def test_a_value_that_is_neither_is_a_400(server: Server) -> None:
    answer = ask(server, "linear", [1, 2, 3, 4], {**JSON, ASK_HEADER: "verbose"})
    assert answer.status == 400 and ASK_HEADER in answer.json["message"]


@pytest.mark.server
def test_the_native_lanes_stages_add_up(server: Server) -> None:
    found = parsed(ask(server, "linear", [1, 2, 3, 4]).headers["server-timing"])
    assert list(found) == [
        "admission", "preprocess", "queue", "staging", "inference", "delivery", "postprocess", "batch", "total",
    ]  # fmt: skip
    assert found["batch"][1] == ';desc="full";size=1'
    stages = sum(time for name, (time, _) in found.items() if name not in ("total", "batch"))
    assert 0 < stages <= found["total"][0] + 0.01


@pytest.mark.server
def test_the_batcher_says_why_it_released_a_batch(server: Server) -> None:
    lone = parsed(ask(server, "batched", [1, 2, 3, 4]).headers["server-timing"])
    assert lone["batch"][1] == ';desc="delay";size=1'
    assert lone["queue"][0] >= 200
    server.manage("PUT", "/models/batched?max_batch_delay=60000")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: ask(server, "batched", [1, 2, 3, 4]), range(3)))
    assert [parsed(each.headers["server-timing"])["batch"][1] for each in answers] == [';desc="min_batch";size=3'] * 3
    server.manage("PUT", "/models/batched?min_batch=1")
    assert parsed(ask(server, "batched", [1, 2, 3, 4]).headers["server-timing"])["batch"][1] == ';desc="idle";size=1'


@pytest.mark.server
def test_a_worker_process_tells_its_own_times_beside_the_handlers_metrics(server: Server) -> None:
    answer = ask(server, "handler", "plain")
    found = parsed(answer.headers["server-timing"])
    assert list(found) == [
        "tokens", "queue", "staging", "preprocess", "inference", "postprocess", "delivery", "batch", "total",
    ]  # fmt: skip
    assert found["inference"][0] >= 20
    assert sum(time for name, (time, _) in found.items() if time > 0 and name != "total") <= found["total"][0] + 0.01
    plain = ask(server, "handler", "plain", JSON)
    assert plain.headers["server-timing"] == 'tokens;desc="mine"'
    assert plain.body == answer.body == b"done"


@pytest.mark.server
def test_errors_and_streams_tell_what_they_can(server: Server) -> None:
    failed = ask(server, "handler", "fail")
    assert failed.status == 503 and parsed(failed.headers["server-timing"])["inference"][0] >= 20
    streamed = ask(server, "handler", "stream")
    assert streamed.body == b"ab" and list(parsed(streamed.headers["server-timing"])) == ["queue", "total"]
    picture = server.ask("POST", "/predictions/pictures", b"no picture", {ASK_HEADER: "1"})
    assert picture.status == 400
    assert list(parsed(picture.headers["server-timing"])) == ["admission", "preprocess", "total"]


@pytest.mark.server
def test_the_configuration_can_ask_for_all(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    all_told = Server(tmp_path_factory.mktemp("all"), server.store)
    config = all_told.folder / "config.properties"
    config.write_text("server_timing=true\n")
    all_told.start("--models", "linear.mar", "handler.mar", "--ts-config", str(config))
    try:
        for model, value in (("linear", [1, 2, 3, 4]), ("handler", "plain")):
            assert "inference" in parsed(ask(all_told, model, value, JSON).headers["server-timing"])
        declined = ask(all_told, "linear", [1, 2, 3, 4], {**JSON, ASK_HEADER: "0"})
        assert "server-timing" not in declined.headers
    finally:
        all_told.kill()
