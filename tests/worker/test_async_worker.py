"""Handlers that are coroutines: many requests in flight in one worker, each with a task of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, LIMIT_S, Answer, Server, at_once

pytestmark = pytest.mark.server

HANDLER = """
import asyncio
import os
import sys
import time

from ts.handler_utils.utils import send_intermediate_predict_response


class Handler:
    def initialize(self, context):
        self.running = 0
        self.gates = {}
        self.cancelled = []

    def gate(self, name):
        return self.gates.setdefault(name, asyncio.Event())

    async def handle(self, data, context):
        (row,) = data
        order = row["body"]
        self.running += 1
        try:
            return await self.act(order, context)
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up takes its time
            self.cancelled.append(order["name"])
            raise
        finally:
            self.running -= 1

    async def act(self, order, context):
        if "meet" in order:
            if self.running == order["meet"]:
                self.gate("all").set()
            await self.gate("all").wait()
        if "part" in order:
            send_intermediate_predict_response([order["part"]], context.request_ids, "", 200, context)
        if "open" in order:
            self.gate(order["open"]).set()
        if "wait" in order:
            await self.gate(order["wait"]).wait()
        if "block" in order:
            time.sleep(order["block"])
        if "raise" in order:
            raise ValueError(order["raise"])
        if "exit" in order:
            sys.exit(order["exit"])
        if "cancel_itself" in order:
            raise asyncio.CancelledError
        if "rows" in order:
            return [1] * order["rows"]
        if "status" in order:
            context.set_response_status(order["status"], "So It Is", 0)
            context.set_response_header(0, "x-name", order["name"])
        return [{"name": order.get("name"), "id": context.get_request_id(0), "pid": os.getpid(),
                 "running": self.running, "cancelled": self.cancelled}]
"""

GENERATOR = """
async def handle(data, context):
    if data is not None:
        for number in range(data[0]["body"]):
            yield ["part %d;" % number]
"""

PLAIN = """
def handle(data, context):
    return data and [len(data)]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("async"))
    config = {"asyncCommunication": True}
    write_handler(server.store, "handler", HANDLER, config=config)
    write_handler(
        server.store, "slow", HANDLER, config={**config, "responseTimeout": 1, "clientTimeoutInMills": 60_000}
    )
    write_handler(server.store, "generator", GENERATOR, config=config)
    write_handler(server.store, "plain", PLAIN, config=config)
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, order: Any, model: str = "handler") -> Answer:
    return server.ask("POST", f"/predictions/{model}", json.dumps(order).encode(), JSON)


def asking(server: Server, order: Any) -> Callable[[], Answer]:
    return lambda: ask(server, order)


def seen(server: Server, model: str = "handler") -> dict[str, Any]:
    """What the handler says of itself; ``running`` counts the request that asks."""
    answer: dict[str, Any] = ask(server, {}, model).json
    return answer


def test_requests_are_all_in_flight_at_once(server: Server) -> None:
    """Each waits until all are there: one after the other they would wait for ever."""
    answers = at_once([asking(server, {"name": f"r{number}", "meet": 40}) for number in range(40)])
    for number, answer in enumerate(answers):
        assert (answer.status, answer.json["name"]) == (200, f"r{number}")
        assert answer.json["id"] == answer.headers["x-request-id"]
    assert seen(server)["running"] == 1


def test_a_later_request_overtakes_one_that_waits(server: Server) -> None:
    first = threading.Thread(target=ask, args=(server, {"wait": "overtaken"}))
    first.start()
    server.wait_for(lambda: seen(server)["running"] == 2, "the first")
    assert ask(server, {"name": "second", "open": "overtaken"}).json["running"] == 2
    first.join(LIMIT_S)
    assert seen(server)["running"] == 1


def test_parts_leave_while_the_handler_goes_on(server: Server) -> None:
    connection = http.client.HTTPConnection(*server.address(), timeout=LIMIT_S)
    order = {"name": "streamer", "part": "begun;", "wait": "the end", "status": 201}
    connection.request("POST", "/predictions/handler", json.dumps(order).encode(), JSON)
    response = connection.getresponse()
    assert response.headers["ts_stream_next"] == "true"
    assert response.read1() == b"begun;"
    assert seen(server)["running"] == 2
    ask(server, {"open": "the end"})
    assert json.loads(response.read())["name"] == "streamer"
    connection.close()


def test_an_asynchronous_generator_streams_what_it_yields(server: Server) -> None:
    assert ask(server, 3, "generator").body == b"part 0;part 1;part 2;"
    one = ask(server, 1, "generator")
    assert (one.body, "transfer-encoding" in one.headers) == (b"part 0;", False)
    assert ask(server, 0, "generator").body == b""


def test_a_plain_handle_is_called_too(server: Server) -> None:
    assert [answer.json for answer in at_once([lambda: ask(server, 1, "plain")] * 8)] == [1] * 8


def test_a_client_that_hangs_up_cancels_its_task_and_no_other(server: Server) -> None:
    results: list[Answer] = []
    other = threading.Thread(target=lambda: results.append(ask(server, {"name": "stays", "wait": "after all"})))
    other.start()
    connection = server.connect()
    body = json.dumps({"name": "goes", "wait": "never"}).encode()
    connection.sendall(b"POST /predictions/handler HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
    server.wait_for(lambda: seen(server)["running"] == 3, "both")
    connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: a reset
    connection.close()
    server.wait_for(lambda: seen(server)["running"] == 2, "the task to end")
    assert seen(server)["cancelled"] == ["goes"]
    ask(server, {"open": "after all"})
    other.join(LIMIT_S)
    assert results[0].json["name"] == "stays"


def test_a_failure_is_its_own_requests_alone(server: Server) -> None:
    line = 1 + HANDLER.splitlines().index('            raise ValueError(order["raise"])')
    orders: list[dict[str, Any]] = [
        {"raise": "boom"}, {"exit": 3}, {"rows": 2}, {"cancel_itself": 1, "name": "x"}, {"name": "good"},
    ]  # fmt: skip
    answers = at_once([asking(server, order) for order in orders])
    assert [answer.status for answer in answers] == [503, 503, 503, 503, 200]
    assert answers[0].detail["where"] == f"handler.py:{line} in act" and answers[0].detail["text"] == "boom"
    assert answers[1].detail["exception"] == "SystemExit"
    assert answers[2].json["message"] == "number of batch response mismatched"
    assert answers[3].detail["exception"] == "CancelledError"
    request_id = answers[0].headers["x-request-id"]
    server.wait_for(lambda: request_id in server.log(), "the log record")


def test_status_and_headers_are_the_handlers(server: Server) -> None:
    answer = ask(server, {"name": "x", "status": 207})
    assert (answer.status, answer.headers["x-name"]) == (207, "x")


def test_a_task_over_response_timeout_is_cancelled_and_the_others_go_on(server: Server) -> None:
    pid = seen(server, "slow")["pid"]
    answer = ask(server, {"name": "late", "wait": "never"}, "slow")
    assert answer.status == 504 and "response_timeout=1 s" in answer.json["message"]
    server.wait_for(lambda: seen(server, "slow")["cancelled"] == ["late"], "the task to end")
    assert (seen(server, "slow")["pid"], seen(server, "slow")["running"]) == (pid, 1)


def test_a_call_that_holds_up_the_loop_is_ended_and_the_model_stays_loaded(server: Server) -> None:
    pid = seen(server, "slow")["pid"]
    assert ask(server, {"block": 60}, "slow").status == 504
    assert seen(server, "slow")["pid"] == pid


def test_a_worker_that_dies_costs_what_was_in_flight_an_answer_each(server: Server) -> None:
    """Once they have been run again, as a group, and have ended another worker."""
    waiting = [{"wait": "never"}] * 5
    over = threading.Event()

    def kill() -> None:
        server.wait_for(lambda: seen(server)["running"] == 6, "all")
        while not over.wait(0.2):
            for row in server.describe("handler")["workers"]:
                if row["status"] == "READY":
                    os.kill(row["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answers = at_once([asking(server, order) for order in waiting])
    over.set()
    killer.join(LIMIT_S)
    assert [(answer.status, answer.json["message"]) for answer in answers] == [(500, "Worker died.")] * 5
    server.wait_for(lambda: ask(server, {}).status == 200, "another worker")
