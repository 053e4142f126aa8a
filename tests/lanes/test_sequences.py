"""Sequences: their requests go to one worker, one after the other, and what ends a sequence is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.sequence_adder import ADDER
from tests.support.serving import JSON, LIMIT_S, Answer, Server

pytestmark = pytest.mark.server

ID, START, END = "ts_request_sequence_id", "ts_request_sequence_start", "ts_request_sequence_end"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sequences"))
    config = {"sequenceBatching": True, "sequenceMaxIdleMSec": 600_000, "batchSize": 4, "maxNumSequence": 100,
              "maxSequenceJobQueueSize": 20, "minWorkers": 2, "maxWorkers": 2}  # fmt: skip
    write_handler(server.store, "adder", ADDER, config=config)
    one = {"minWorkers": 1, "maxWorkers": 1}
    write_handler(server.store, "wide", ADDER, config={**config, **one})
    breaks = f"        if os.path.exists({str(server.folder / 'broken')!r}): raise FileNotFoundError('weights')\n"
    fragile = ADDER.replace("        self.sums", breaks + "        self.sums", 1)
    write_handler(server.store, "fragile", fragile, config=config)
    write_handler(server.store, "few", ADDER, config={**config, **one, "maxNumSequence": 2,
                                                      "maxSequenceJobQueueSize": 1})  # fmt: skip
    write_handler(server.store, "brief", ADDER, config={**config, **one, "sequenceMaxIdleMSec": 1})
    plain = "def handle(data, context):\n    return data and [1 for _ in data]\n"
    write_handler(server.store, "plain", plain, config=config)
    with server:
        server.start("--models", "all")
        yield server


@pytest.fixture
def id() -> str:
    return str(uuid.uuid4())


def ask(server: Server, id: str = "", model: str = "adder", start: bool = False, **order: Any) -> Answer:
    headers = {**JSON, **({ID: id} if id else {}), **({START: "true"} if start else {})}
    return server.ask("POST", f"/predictions/{model}", json.dumps(order).encode(), headers)


def wait_until_there(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        threading.Event().wait(0.005)


def test_a_sequence_stays_with_its_worker_and_others_go_to_the_other(server: Server) -> None:
    ids = [str(uuid.uuid4()) for _ in range(4)]
    answers = {id: [ask(server, id, add=number).json for number in range(5)] for id in ids}
    for id in ids:
        assert answers[id][-1]["numbers"] == [0, 1, 2, 3, 4]
        assert len({answer["pid"] for answer in answers[id]}) == 1
    assert len({answers[id][0]["pid"] for id in ids}) == 2
    ask(server, ids[0], end=";".join(ids))


def test_requests_that_come_together_are_handled_one_at_a_time(server: Server, tmp_path: Path, id: str) -> None:
    """In the order of their arrival, while the first is held back."""
    running, end = tmp_path / "running", tmp_path / "end"
    results: dict[int, Answer] = {}

    def add(number: int, **order: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: results.update({number: ask(server, id, add=number, **order)}))
        thread.start()
        return thread

    threads = [add(0, running=str(running), until=str(end))]
    wait_until_there(running)
    for number in range(1, 6):
        threads.append(add(number))
        server.wait_for(lambda number=number: server.describe("adder")["jobQueueStatus"]["pendingRequests"] == number,  # type: ignore[misc]
                        "the request to wait")  # fmt: skip
    end.touch()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [results[number].json["numbers"] for number in range(6)] == [list(range(size)) for size in range(1, 7)]


def test_requests_of_several_sequences_share_a_batch(server: Server, tmp_path: Path) -> None:
    """While one is held back the others gather, and go in two calls of at most four."""
    running, end = tmp_path / "running", tmp_path / "end"
    order = {"running": str(running), "until": str(end)}
    results: list[Answer] = []
    threads = [threading.Thread(target=ask, args=(server, "holder", "wide"), kwargs=order)]
    threads[0].start()
    wait_until_there(running)
    for number in range(6):
        threads.append(threading.Thread(target=lambda id=f"s{number}": results.append(ask(server, id, "wide", add=1))))  # type: ignore[misc]
        threads[-1].start()
    server.wait_for(lambda: server.describe("wide")["jobQueueStatus"]["pendingRequests"] == 6, "all")
    end.touch()
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(len(answer.json["batch"]) for answer in results) == [2, 2, 4, 4, 4, 4]
    assert all(answer.json["numbers"] == [1] for answer in results)


def test_a_request_without_an_id_gets_one_and_begins_a_sequence(server: Server) -> None:
    first = ask(server, add=7).json
    assert first["id"].startswith("ts-seq-") and first["start"] == "true"
    assert ask(server, first["id"], add=8).json["numbers"] == [7, 8]
    ask(server, first["id"], end=first["id"])


def test_a_parameter_that_names_another_sequence_than_the_header_is_refused(server: Server, id: str) -> None:
    def infer(parameter: str) -> Answer:
        tensor = {"name": "x", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}
        head = json.dumps({"parameters": {"sequence_id": parameter}, "inputs": [tensor]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head)), ID: id, START: "true"}
        return server.ask("POST", "/v2/models/plain/infer", head + bytes(8), headers)

    other = infer("other")
    assert other.status == 400 and f"send it as the header {ID}" in other.json["message"]
    assert infer(id).status == 200


def test_the_handler_ends_sequences_and_their_ids_are_free(server: Server) -> None:
    assert ask(server, "a", "few").status == ask(server, "b", "few").status == 200
    refused = ask(server, "c", "few")
    assert refused.status == 503 and "maxNumSequence=2" in refused.detail["limit"]
    assert ask(server, "a", "few", end="a;b").headers[END] == "a;b"
    assert ask(server, "a", "few", add=1).json["numbers"] == [1]
    assert ask(server, "c", "few", end="a;c").status == 200


def test_more_may_wait_than_the_limit_says_is_refused(server: Server, tmp_path: Path, id: str) -> None:
    running, end = tmp_path / "running", tmp_path / "end"
    first = threading.Thread(target=ask, args=(server, id, "few"), kwargs={"running": str(running), "until": str(end)})
    first.start()
    wait_until_there(running)
    second = threading.Thread(target=ask, args=(server, id, "few"))
    second.start()
    server.wait_for(lambda: server.describe("few")["jobQueueStatus"]["pendingRequests"] == 1, "the second")
    refused = ask(server, id, "few")
    assert refused.status == 503 and f"maxSequenceJobQueueSize=1, sequence {id}" in refused.detail["limit"]
    end.touch()
    first.join(LIMIT_S)
    second.join(LIMIT_S)
    assert len(ask(server, id, "few", end="none").json["numbers"]) == 3
    ask(server, id, "few", end=id)


def test_an_idle_sequence_ends_and_the_next_request_is_told_once(server: Server, id: str) -> None:
    ask(server, id, "brief", add=1)
    server.wait_for(lambda: f"sequence {id} ended" in server.log(), "the end")
    answer = ask(server, id, "brief", add=2)
    assert answer.status == 409 and "sequenceMaxIdleMSec=1" in answer.json["message"] and id in answer.json["message"]
    assert ask(server, id, "brief", add=3).status == 200


def test_strict_begins_another_sequence_with_another_worker_silently(tmp_path: Path) -> None:
    """As was measured: what the handler makes of it is the handler's, which has no state of it there."""
    server = Server(tmp_path)
    config_file = tmp_path / "strict.properties"
    config_file.write_text("compat=strict\n")
    config = {"sequenceBatching": True, "sequenceMaxIdleMSec": 1, "minWorkers": 2, "maxWorkers": 2}
    write_handler(server.store, "brief", ADDER, config=config)
    with server:
        server.start("--models", "brief.mar", "--disable-token-auth", "--ts-config", str(config_file))
        answers = []
        for number in range(3):
            answers.append(ask(server, "s", "brief", add=number))
            server.wait_for(lambda: server.log().count("sequence s ended") == len(answers), "the end")
        assert [answer.status for answer in answers] == [200, 200, 200]
        assert [answer.json["numbers"] for answer in answers] == [[0], [1], [0, 2]]
        assert answers[0].json["pid"] == answers[2].json["pid"] != answers[1].json["pid"]


def test_a_request_that_begins_a_sequence_is_not_told_of_an_old_one(server: Server, id: str) -> None:
    ask(server, id, "brief", add=1)
    server.wait_for(lambda: f"sequence {id} ended" in server.log(), "the end")
    assert ask(server, id, "brief", start=True).status == 200


def test_a_killed_worker_ends_its_sequences_and_no_other(server: Server, tmp_path: Path) -> None:
    ids = [str(uuid.uuid4()) for _ in range(4)]
    pids = {id: ask(server, id, add=1).json["pid"] for id in ids}
    lost = [id for id in ids if pids[id] == pids[ids[0]]]
    kept = [id for id in ids if id not in lost]
    assert lost and kept
    running = tmp_path / "running"
    results: list[Answer] = []
    orders: list[dict[str, Any]] = [{"running": str(running), "until": "/never"}, {"add": 2}]
    threads = [threading.Thread(target=lambda order=order: results.append(ask(server, lost[0], **order)))  # type: ignore[misc]
               for order in orders]  # fmt: skip
    threads[0].start()
    wait_until_there(running)
    threads[1].start()
    server.wait_for(lambda: server.describe("adder")["jobQueueStatus"]["pendingRequests"] == 1, "the second")
    os.kill(pids[lost[0]], signal.SIGKILL)
    for thread in threads:
        thread.join(LIMIT_S)
    assert [(answer.status, answer.json["message"]) for answer in results] == [(500, "Worker died.")] * 2
    for id in lost[1:]:
        answer = ask(server, id, add=2)
        assert answer.status == 500 and id in answer.detail["text"] and "its worker ended" in answer.detail["text"]
        assert ask(server, id, add=3).json["numbers"] == [3]
    for id in kept:
        assert ask(server, id, add=2).json["numbers"] == [1, 2]
    server.wait_for(lambda: ask(server, lost[0], add=4).status == 200, "another worker")


def test_one_worker_in_trouble_is_none_of_the_models(server: Server) -> None:
    """Workers that end cannot be loaded again for a while: the model has failed when the last one has."""
    broken = server.folder / "broken"
    first, second = (row["pid"] for row in server.describe("fragile")["workers"])
    broken.touch()
    os.kill(first, signal.SIGKILL)
    server.wait_for(lambda: "failed 2 times in a row while loading" in server.log(), "the first to fail")
    assert server.describe("fragile")["state"] == "READY"
    assert {ask(server, model="fragile").json["pid"] for _ in range(4)} == {second}
    os.kill(second, signal.SIGKILL)
    server.wait_for(lambda: ask(server, model="fragile").status == 503, "the second to fail")
    assert server.describe("fragile")["state"] == "FAILED"
    broken.unlink()
    server.wait_for(lambda: server.describe("fragile")["state"] == "READY", "one of them")
    assert ask(server, model="fragile").status == 200
    server.wait_for(
        lambda: [row["status"] for row in server.describe("fragile")["workers"]] == ["READY", "READY"], "the other one"
    )


def test_what_waits_in_a_sequence_is_answered_when_draining_is_cut_short(tmp_path: Path, id: str) -> None:
    """Not by a connection that breaks."""
    server = Server(tmp_path)
    write_handler(server.store, "adder", ADDER, config={"sequenceBatching": True, "maxSequenceJobQueueSize": 20})
    (tmp_path / "config.properties").write_text("drain_timeout_s=1\n")
    server.start("--models", "all", "--ts-config", "config.properties")
    running, results = tmp_path / "running", dict[int, Answer]()
    try:

        def add(number: int, **order: Any) -> threading.Thread:
            thread = threading.Thread(target=lambda: results.update({number: ask(server, id, add=number, **order)}))
            thread.start()
            return thread

        threads = [add(0, running=str(running), until=str(tmp_path / "never"))]
        wait_until_there(running)
        threads += [add(1), add(2)]
        server.wait_for(lambda: server.describe("adder")["jobQueueStatus"]["pendingRequests"] == 2, "both to wait")
        server.run("stop")
        for thread in threads:
            thread.join(LIMIT_S)
        assert [results[number].status for number in range(3)] == [503] * 3
        assert all(results[number].detail["reason"] == "draining" for number in range(3))
    finally:
        server.kill()
