"""Requests that end or hold up their worker in a batch of several, served by a real server."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import ECHO, write_handler
from tests.support.serving import JSON, LIMIT_S, Server, at_once

pytestmark = pytest.mark.server

EIGHT = {"batchSize": 8, "minBatch": 8, "maxBatchDelay": 10_000}
ALL = range(8)

# As ECHO; it notes each request that it is given in a file.
NOTING = ECHO.replace(
    "        for index, row in enumerate(data):\n",
    """        with open(NOTES, "a") as file:
            file.write("".join("%s\\n" % row["body"]["id"] for row in data))
        for index, row in enumerate(data):
""",
)
SIDE_EFFECTS = NOTING.replace("class Echo:\n", "class Echo:\n    has_side_effects = True\n\n")
# A part of each answer leaves before the handler acts.
STREAMING = NOTING.replace(
    "        answers = []\n",
    """        answers = []
        from ts.handler_utils.utils import send_intermediate_predict_response

        send_intermediate_predict_response(["part"] * len(data), context.request_ids, "OK", 200, context)
""",
)
# Ends its worker where it is by itself.
SINGLY = NOTING.replace(
    "        for index, row in enumerate(data):\n",
    """        if len(data) == 1 and data[0]["body"].get("exit_alone"):
            os._exit(1)
        for index, row in enumerate(data):
""",
)
COROUTINE = """
import asyncio
import os


class Handler:
    def initialize(self, context):
        self.count = 0

    async def handle(self, data, context):
        value = data[0]["body"]
        with open(NOTES, "a") as file:
            file.write("%s\\n" % value["id"])
        self.count += 1
        while not os.path.exists(NOTES + ".died"):
            if value.get("kill") and self.count == 8:
                open(NOTES + ".died", "w").close()
                break
            await asyncio.sleep(0.01)
        if value.get("kill"):
            os._exit(1)
        return [value["id"]]
"""


class Stand:
    """A server, and what its handlers have noted."""

    def __init__(self, folder: Path):
        self.server = Server(folder)
        self._folder = folder

    def add(self, name: str, source: str, config: dict[str, Any]) -> None:
        """An archive whose handler notes what it is given."""
        source = f"NOTES = {str(self._folder / name)!r}\n{source}"
        write_handler(self.server.store, name, source, config=config)

    def runs(self, name: str) -> Counter[int]:
        """How often each request was given to the handler, by its id."""
        path = self._folder / name
        return Counter(map(int, path.read_text().split())) if path.exists() else Counter()

    def ask(self, model: str, orders: dict[int, dict[str, Any]]) -> list[Any]:
        """The answers to eight requests at once, some of which order what is to happen."""
        (self._folder / model).unlink(missing_ok=True)
        self.server.manage("PUT", f"/models/{model}?min_worker=1&synchronous=true")  # forgets crashes before
        bodies = [json.dumps({"id": number, **orders.get(number, {})}).encode() for number in ALL]
        return at_once(
            [lambda body=body: self.server.ask("POST", f"/predictions/{model}", body, JSON) for body in bodies]
        )  # type: ignore[misc]


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    stand = Stand(tmp_path_factory.mktemp("crashes"))
    stand.add("eight", NOTING, EIGHT)
    stand.add("singly", SINGLY, EIGHT)
    stand.add("declared", NOTING, {**EIGHT, "sideEffects": True})
    stand.add("effects", SIDE_EFFECTS, EIGHT)
    stand.add("short", NOTING, {**EIGHT, "responseTimeout": 1})
    stand.add("patient", NOTING, {**EIGHT, "responseTimeout": 1, "clientTimeoutInMills": 100_000})
    stand.add("parts", STREAMING, EIGHT)
    stand.add("coroutine", COROUTINE, {"asyncCommunication": True, "batchSize": 1})
    with stand.server:
        stand.server.start("--models", "all")
        yield stand


def check_others(answers: list[Any], guilty: set[int], *, batch: int = 1) -> None:
    for number in set(ALL) - guilty:
        assert answers[number].status == 200, answers[number]
        assert (answers[number].json["id"], answers[number].json["batch"]) == (number, batch)


@pytest.mark.parametrize("order", [{"kill": "SIGSEGV"}, {"kill": "SIGKILL"}, {"exit": 0}], ids=str)
def test_only_the_request_that_ends_its_worker_fails(stand: Stand, order: dict[str, Any]) -> None:
    answers = stand.ask("eight", {3: order})
    check_others(answers, {3})
    assert (answers[3].status, answers[3].json["message"]) == (500, "Worker died.")
    detail = answers[3].detail
    assert detail["exception"] == "WorkerDied" and "another one, run by itself" in detail["text"] and detail["fix"]
    assert stand.runs("eight") == dict.fromkeys(ALL, 2)


def test_several_of_one_batch_fail_each_by_itself(stand: Stand) -> None:
    guilty = {0, 3, 7}
    answers = stand.ask("eight", {number: {"exit": 1} for number in guilty})
    check_others(answers, guilty)
    assert {answers[number].status for number in guilty} == {500}
    assert set(stand.runs("eight").values()) == {2}


def test_one_that_ends_its_worker_when_its_batch_is_run_one_by_one_is_not_run_a_third_time(stand: Stand) -> None:
    # The batch fails first, because of number 1, which costs the others a second run.
    answers = stand.ask("singly", {1: {"raise": "wrong"}, 3: {"exit_alone": 1}})
    check_others(answers, {1, 3})
    assert (answers[1].status, answers[1].json["message"]) == (503, "Prediction failed")
    assert (answers[3].status, answers[3].json["message"]) == (500, "Worker died.")
    assert "this request and no other" in answers[3].detail["text"]
    assert stand.runs("singly") == dict.fromkeys(ALL, 2)


def test_one_that_is_alone_is_told_so_and_not_run_again(stand: Stand) -> None:
    stand.ask("short", {})
    server = stand.server
    server.manage("PUT", "/models/short?min_worker=1&batch_size=1&min_batch=1&synchronous=true")
    answer = server.ask("POST", "/predictions/short", b'{"id": 50, "exit": 1}', JSON)
    server.manage("PUT", "/models/short?batch_size=8&min_batch=8")
    assert answer.status == 500 and "this request and no other" in answer.detail["text"]
    assert stand.runs("short")[50] == 1


@pytest.mark.parametrize("model", ["declared", "effects"])
@pytest.mark.parametrize(("order", "status"), [({"exit": 1}, 500), ({"raise": "wrong"}, 503)], ids=str)
def test_what_has_side_effects_is_never_run_again(stand: Stand, model: str, order: dict[str, Any], status: int) -> None:
    answers = stand.ask(model, {3: order})
    assert [answer.status for answer in answers] == [status] * 8
    assert stand.runs(model) == dict.fromkeys(ALL, 1)


@pytest.mark.parametrize("order", [{"sleep": 60}, {"hang": 60}], ids=str)
def test_a_call_over_its_time_costs_its_neighbours_nothing_that_have_time_left(
    stand: Stand, order: dict[str, Any]
) -> None:
    answers = stand.ask("patient", {3: order})
    check_others(answers, {3})
    assert answers[3].status == 504 and "response_timeout=1 s" in answers[3].json["message"]
    assert stand.runs("patient") == dict.fromkeys(ALL, 2)


def test_without_time_left_none_is_run_again(stand: Stand) -> None:
    answers = stand.ask("short", {3: {"hang": 60}})
    assert [answer.status for answer in answers] == [504] * 8
    assert stand.runs("short") == dict.fromkeys(ALL, 1)


def test_an_answer_that_has_begun_is_not_begun_again(stand: Stand) -> None:
    answers = []

    def ask(body: bytes) -> None:
        with socket.create_connection(stand.server.address(), LIMIT_S) as peer:
            head = (
                f"POST /predictions/parts HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            peer.sendall(head.encode() + body)
            answers.append(b"".join(iter(lambda: peer.recv(65536), b"")))

    bodies = [json.dumps({"id": number, "exit": 1} if number == 3 else {"id": number}).encode() for number in ALL]
    threads = [threading.Thread(target=ask, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert len(answers) == 8 and all(b"part" in answer and not answer.endswith(b"0\r\n\r\n") for answer in answers)
    assert stand.runs("parts") == dict.fromkeys(ALL, 1)


def test_a_client_that_hung_up_is_not_run_again(stand: Stand) -> None:
    server = stand.server
    body = b'{"id": 60, "sleep": 1.5}'
    peer = socket.create_connection(server.address(), LIMIT_S)
    peer.sendall(b"POST /predictions/eight HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n%b" % (len(body), body))  # fmt: skip
    server.wait_for(lambda: server.metric("pyserve_queue_size", model="eight") == 1, "the first of the batch")
    bodies = [b'{"id": 61, "exit": 1}', *(b'{"id": %d}' % number for number in range(62, 68))]
    threads = [threading.Thread(target=server.ask, args=("POST", "/predictions/eight", each, JSON)) for each in bodies]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: stand.runs("eight")[60] == 1, "the batch")
    peer.close()
    for thread in threads:
        thread.join(LIMIT_S)
    runs = stand.runs("eight")
    assert runs[60] == 1 and {runs[number] for number in range(61, 68)} == {2}


def test_of_requests_that_overlap_in_one_worker_only_the_guilty_one_fails(stand: Stand) -> None:
    answers = stand.ask("coroutine", {3: {"kill": True}})
    assert [answer.status for answer in answers] == [200] * 3 + [500] + [200] * 4
    assert [answer.json for number, answer in enumerate(answers) if number != 3] == [0, 1, 2, 4, 5, 6, 7]
    assert stand.runs("coroutine") == dict.fromkeys(ALL, 2)
