"""Continuous batching and coroutines over real sockets: requests that join, stream, fail and leave on their own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Server, at_once

pytestmark = pytest.mark.server

# Counts to "n", one number per step. With "wait_for" it tells "waiting" until as many requests are under way.
COUNTER = """
import time


class Counter:
    def initialize(self, context):
        context.cache = {}

    def handle(self, data, context):
        parts = []
        over = set(context.cache) - set(context.request_ids.values())
        if over:
            raise RuntimeError("kept what is over: %s" % over)
        for index, row in enumerate(data):
            id = context.get_request_id(index)
            if row:
                context.cache[id] = {**row["body"], "at": 0}
            state = context.cache[id]
            if state.get("fail_at") == state["at"] and len(data) >= state["wait_for"]:
                state["at"] = state["n"]
                parts.append(ValueError("no %d" % state["fail_at"]))
                continue
            state["met"] = state.get("met") or len(data) >= state.get("wait_for", 0)
            if state["met"]:
                state["at"] += 1
            else:
                time.sleep(0.001)
            parts.append("%s%d/%d;" % (state["name"], state["at"], len(data)))
        context.stopping_criteria = [self.criterion(context, index) for index in range(len(data))]
        return parts

    def criterion(self, context, index):
        id = context.get_request_id(index)

        def is_over(result):
            state = context.cache[id]
            if state["at"] >= state["n"]:
                del context.cache[id]
                return None if state.get("whole") else True
            return False

        return is_over
"""

# Answers when as many requests as "together" are there; "sleep" waits to be cancelled.
MEETING = """
import asyncio

from ts.handler_utils.utils import send_intermediate_predict_response


class Meeting:
    def initialize(self, context):
        self.waiting = []
        self.cancelled = 0

    async def handle(self, data, context):
        (row,) = data
        body = row["body"]
        if "fail" in body:
            await asyncio.sleep(0)
            raise ValueError(body["fail"])
        if "exit" in body:
            raise SystemExit(body["exit"])
        if "sleep" in body:
            send_intermediate_predict_response(["begun;"], context.request_ids, "", 200, context)
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if "together" in body:
            mine = asyncio.get_running_loop().create_future()
            self.waiting.append(mine)
            if len(self.waiting) == body["together"]:
                for each in self.waiting:
                    each.set_result(len(self.waiting))
                self.waiting = []
            return [{"name": body["name"], "met": await mine}]
        for part in body.get("parts", ()):
            send_intermediate_predict_response([part], context.request_ids, "", 200, context)
            await asyncio.sleep(0)
        return ["end" if "parts" in body else {"cancelled": self.cancelled}]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("modes"))
    write_handler(server.store, "counter", COUNTER, config={"continuousBatching": True, "batchSize": 4})
    write_handler(server.store, "meeting", MEETING, config={"asyncCommunication": True})
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, model: str, body: dict[str, Any]) -> Any:
    return server.ask("POST", f"/predictions/{model}", json.dumps(body).encode(), JSON)


def begin(server: Server, model: str, body: dict[str, Any]) -> socket.socket:
    """A request whose first part has come."""
    connection = server.connect()
    content = json.dumps(body).encode()
    connection.sendall(
        b"POST /predictions/%b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (model.encode(), len(content), content)
    )
    seen = b""
    while b"\r\n\r\n" not in seen or seen.endswith(b"\r\n\r\n"):
        got = connection.recv(65536)
        assert got, seen
        seen += got
    assert b"chunked" in seen
    return connection


def numbers(text: str, name: str) -> list[int]:
    """What was counted, each number once, of an answer that holds nothing but ``name``'s parts."""
    parts = text.removesuffix(";").split(";")
    assert all(part.startswith(name) for part in parts), text
    counted = [int(part.removeprefix(name).partition("/")[0]) for part in parts]
    assert counted == sorted(counted)
    return sorted(set(counted))


# --- continuous batching ----------------------------------------------------------------------------------------------


def test_requests_of_different_length_share_steps_and_get_their_own_parts(server: Server) -> None:
    wanted = {"a": 2, "b": 3, "c": 7, "d": 12}
    bodies = [{"name": name, "n": n, "wait_for": 4} for name, n in wanted.items()]
    calls = [lambda body=body: ask(server, "counter", body) for body in bodies]
    answers = at_once(calls)  # type: ignore[arg-type]
    for name, answer in zip(wanted, answers, strict=True):
        assert answer.headers["transfer-encoding"] == "chunked" and answer.headers["ts_stream_next"] == "true"
        text = answer.body.decode()
        assert [each for each in numbers(text, name) if each] == list(range(1, wanted[name] + 1))
        assert f"{name}1/4;" in text  # all four were in the step that began to count
    assert answers[3].body.decode().endswith("d12/1;")  # and the longest ended alone


def test_a_request_joins_one_that_is_under_way(server: Server) -> None:
    with begin(server, "counter", {"name": "long", "n": 2, "wait_for": 2}):
        answer = ask(server, "counter", {"name": "short", "n": 1, "wait_for": 2})
        assert answer.body == b"short1/2;"


def test_a_request_that_is_not_streamed_is_a_plain_answer(server: Server) -> None:
    answer = ask(server, "counter", {"name": "x", "n": 1, "whole": True})
    assert (answer.status, answer.body) == (200, b"x1/1;") and "transfer-encoding" not in answer.headers


def test_a_failing_request_fails_alone(server: Server) -> None:
    with begin(server, "counter", {"name": "good", "n": 3, "wait_for": 2}) as good:
        bad = ask(server, "counter", {"name": "bad", "n": 3, "wait_for": 2, "fail_at": 0, "whole": True})
        assert (bad.status, bad.detail["text"]) == (503, "no 0")
        seen = b""
        while not seen.endswith(b"0\r\n\r\n"):
            got = good.recv(65536)
            assert got, seen
            seen += got
        assert b"good3/1;" in seen


def test_a_client_that_hangs_up_leaves_the_batch(server: Server) -> None:
    before = server.metric("pyserve_cancelled_total", model="counter")
    begin(server, "counter", {"name": "gone", "n": 1, "wait_for": 3}).close()
    server.wait_for(lambda: server.metric("pyserve_cancelled_total", model="counter") == before + 1, "the cancellation")
    # The handler would raise if its context.cache still had the one that is gone.
    assert ask(server, "counter", {"name": "next", "n": 1}).body == b"next1/1;"


# --- coroutines -------------------------------------------------------------------------------------------------------


def test_requests_are_under_way_at_the_same_time(server: Server) -> None:
    calls = [lambda name=name: ask(server, "meeting", {"together": 12, "name": name}) for name in range(12)]
    answers = at_once(calls)  # type: ignore[arg-type]
    assert [answer.json for answer in answers] == [{"name": name, "met": 12} for name in range(12)]


def test_coroutines_stream_their_own_parts(server: Server) -> None:
    calls = [
        lambda name=name: ask(server, "meeting", {"parts": [f"{name}.{part};" for part in range(5)]}) for name in "ab"
    ]
    for name, answer in zip("ab", at_once(calls), strict=True):  # type: ignore[arg-type]
        assert answer.body.decode() == "".join(f"{name}.{part};" for part in range(5)) + "end"


@pytest.mark.parametrize("body", [{"fail": "boom"}, {"exit": "boom"}])
def test_a_failing_coroutine_costs_only_its_own_request(server: Server, body: dict[str, str]) -> None:
    with begin(server, "meeting", {"sleep": True}):
        answer = ask(server, "meeting", body)
        assert (answer.status, answer.detail["text"]) == (503, "boom")
        assert answer.detail["where"].startswith("handler.py:") and answer.detail["where"].endswith(" in handle")


def test_a_client_that_hangs_up_cancels_its_coroutine(server: Server) -> None:
    before = ask(server, "meeting", {}).json["cancelled"]
    with begin(server, "meeting", {"sleep": True}) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
    server.wait_for(lambda: ask(server, "meeting", {}).json["cancelled"] == before + 1, "the cancellation")


def test_a_coroutine_over_its_limit_is_cancelled_and_the_worker_lives(server: Server) -> None:
    (pid,) = [row["pid"] for row in server.describe("meeting")["workers"]]
    server.manage("PUT", "/models/meeting?response_timeout=1")
    answer = ask(server, "meeting", {"together": 2, "name": "alone"})
    assert answer.status == 504 and "response_timeout=1 s" in answer.json["message"]
    server.manage("PUT", "/models/meeting?response_timeout=120")
    ask(server, "meeting", {})
    assert [row["pid"] for row in server.describe("meeting")["workers"]] == [pid]
