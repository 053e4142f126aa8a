"""What handlers do with their context, over HTTP: kept from initialize, in every mode and lane; and its refusals."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.handler_archives import write_handler
from tests.support.networks import Identity
from tests.support.serving import JSON, Server, at_once

pytestmark = pytest.mark.server

KEEPER = """
class Handler:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        kept = self.context
        kept.calls = getattr(kept, "calls", 0) + 1
        kept.set_response_content_type(0, "text/csv")
        return [f"{kept.get_request_header(0, 'X-Kind')} {kept is context} {kept.calls}"] * len(data)
"""
# Ends when the criterion says so that `initialize` has set once for all.
CONTINUOUS = """
class Handler:
    def initialize(self, context):
        context.cache = {}
        context.stopping_criteria = [lambda part: part.endswith("3 ")] * 8

    def handle(self, data, context):
        parts = []
        for index in range(len(data)):
            id = context.get_request_id(index)
            context.cache[id] = context.cache.get(id, 0) + 1
            parts.append(f"{context.cache[id]} ")
        return parts
"""
# TorchServe hands each call that overlaps others a copy of the context; the one of initialize has no requests.
COROUTINES = """
import asyncio, json

class Handler:
    def initialize(self, context):
        self.context = context
        context.note = "shared"
        self.waiting, self.gate = 0, None

    async def handle(self, data, context):
        context.mark = getattr(context, "mark", 0) + 1
        self.gate = self.gate or asyncio.Event()
        self.waiting += 1
        if self.waiting == 2:
            self.gate.set()
        await self.gate.wait()  # both are in here
        context.set_response_header(0, "X-Who", context.get_request_header(0, "X-Kind"))
        return [json.dumps([context is self.context, context.mark, context.note, self.context.request_ids])]
"""
# In the server's threads.
THREAD = """
from ts.torch_handler.base_handler import BaseHandler

class Handler(BaseHandler):
    def prepare(self, context):
        super().prepare(context)
        self.kept = context

    def preprocess(self, data):
        self.kept.set_response_header(0, "X-Seen", self.kept.get_request_header(0, "X-Kind"))
        return super().preprocess(data)

    def postprocess(self, data):
        kinds = [self.kept.get_request_header(i, "X-Kind") for i in range(len(self.kept.request_ids))]
        self.kept.set_all_response_status(201)
        return kinds
"""
ACTS = """
class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        order = data[0]["body"]
        if order == "space":
            context.set_response_header(0, "X A", "v")
        if order == "past":
            context.get_response_headers(0)["X A"] = "v"
        if order == "token":
            context.set_response_header(0, "X(A)", "a\\x01b")
        if order == "reset":
            context.set_response_status(205, "", 0)
        if order == "phrase":
            context.set_response_status(404, "a\\r\\nX: y", 0)
        return [order]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("contexts"))
    write_handler(server.store, "keeper", KEEPER)
    write_handler(server.store, "continuous", CONTINUOUS, config={"continuousBatching": True, "batchSize": 8})
    write_handler(server.store, "coroutines", COROUTINES, config={"asyncCommunication": True})
    write_handler(server.store, "thread", THREAD, network=Identity(),
                  config={"isolation": "thread", "input": {"dtype": "float32", "shape": [2]}})  # fmt: skip
    write_handler(server.store, "acts", ACTS)
    with server:
        server.start("--models", "all")
        yield server


def ask(server: Server, model: str, body: bytes = b"x", kind: str = "blue") -> Any:
    return server.ask("POST", f"/predictions/{model}", body, {"Content-Type": "text/plain", "X-Kind": kind})


def test_the_context_of_initialize_is_the_one_of_every_call(server: Server) -> None:
    for number, kind in ((1, "blue"), (2, "red")):
        answer = ask(server, "keeper", kind=kind)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/csv")
        assert answer.body.decode() == f"{kind} True {number}"


def test_stopping_criteria_stay_until_others_are_set(server: Server) -> None:
    assert [answer.body for answer in at_once([lambda: ask(server, "continuous")] * 3)] == [b"1 2 3 "] * 3


def test_calls_that_overlap_have_a_context_each(server: Server) -> None:
    answers = at_once([lambda: ask(server, "coroutines", kind="a"), lambda: ask(server, "coroutines", kind="b")])
    assert [answer.headers["x-who"] for answer in answers] == ["a", "b"]
    assert [answer.json for answer in answers] == [[False, 1, "shared", None]] * 2


def test_a_handler_in_the_servers_threads_keeps_its_context_too(server: Server) -> None:
    for kind in ("blue", "red"):
        answer = server.ask("POST", "/predictions/thread", b"[1, 2]", {**JSON, "X-Kind": kind})
        assert (answer.status, answer.body.decode(), answer.headers["x-seen"]) == (201, kind, kind)


@pytest.mark.parametrize("order", ["space", "past"])
def test_a_header_that_no_server_can_send_is_the_handlers_failure(server: Server, order: str) -> None:
    answer = ask(server, "acts", order.encode())
    assert answer.status == 503
    assert "'X A' is no name of a response header" in answer.json["detail"]["text"]
    assert answer.json["detail"]["where"].startswith("handler.py:")


def test_what_torchserve_sends_of_a_head_is_sent(server: Server) -> None:
    answer = ask(server, "acts", b"token")
    assert (answer.status, answer.headers["x(a)"], answer.body) == (200, "a\x01b", b"token")
    answer = ask(server, "acts", b"reset")
    assert (answer.status, answer.headers["content-length"], answer.body) == (205, "0", b"")
    assert ask(server, "acts", b"reset").body == b"", "also when its head is known"
    answer = ask(server, "acts", b"phrase")
    assert (answer.status, answer.body) == (404, b"phrase")
    assert "x" not in answer.headers


def test_a_server_whose_current_folder_is_deleted_continues_and_can_be_restarted(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (tmp_path / "store").mkdir()
    server = Server(folder, tmp_path / "store", tmp_path / "cache")
    server.pid_path = tmp_path / "pyserve.pid"
    server.environment["TMPDIR"] = str(tmp_path)
    del server.environment["LOG_LOCATION"]  # it is below the folder
    write_handler(server.store, "keeper", KEEPER)
    server.start("--models", "all")
    try:
        shutil.rmtree(folder)
        assert ask(server, "keeper").status == 200
        pid = server.running.pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        server.wait_for(lambda: _answers(server), "another server")
        assert (folder / "logs" / "model_log.log").exists(), "where they were before"
    finally:
        folder.mkdir(exist_ok=True)  # for the commands
        server.run("stop")
        server.kill()


def _answers(server: Server) -> bool:
    try:
        return ask(server, "keeper").status == 200
    except OSError:
        return False
