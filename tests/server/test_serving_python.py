"""Archives with handler code of their own, served by a real server and asked over HTTP."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.handler_archives import ECHO, TUTORIAL, Doubler, write_handler
from tests.support.serving import JSON, LIMIT_S, RAW, SEED, Server, at_once

pytestmark = pytest.mark.server

EIGHT = {"batchSize": 8, "minBatch": 8, "maxBatchDelay": 10_000}

FUNCTION = """
calls = []


def handle(data, context):
    calls.append(data)
    if data is None:
        return None
    return [{"first": calls[0], "rows": len(data)} for _ in data]
"""

UTILS = """
from utils import NAME


class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return [NAME] * len(data)
"""

RELATIVE = """
class Handler:
    def initialize(self, context):
        with open("words.txt") as file:
            self.words = file.read()

    def handle(self, data, context):
        return [self.words] * len(data)
"""

STREAMER = """
import time

from ts.handler_utils.utils import send_intermediate_predict_response


class Streamer:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        for number in range(3):
            send_intermediate_predict_response(
                ["part %d;" % number] * len(data), context.request_ids, "Intermediate", 200, context
            )
        return ["end"] * len(data)
"""

BROKEN_IMPORT = "import no_such_package_at_all\n\ndef handle(data, context):\n    return data\n"
BROKEN_SYNTAX = "def handle(data, context)\n    return data\n"

SUBCLASS = """
from ts.torch_handler.base_handler import BaseHandler


class Tripler(BaseHandler):
    def preprocess(self, data):
        return super().preprocess(data).float()

    def postprocess(self, data):
        return [[1.5 * value for value in row] for row in data.tolist()]
"""


def write_archives(store: Path) -> None:
    write_handler(store, "tutorial", TUTORIAL, network=Doubler(), config={"batchSize": 4})
    write_handler(store, "function", FUNCTION)
    write_handler(store, "named", FUNCTION.replace("def handle", "def entry"), handler="serve.py:entry")
    write_handler(store, "one", UTILS, files={"utils.py": "NAME = 'one'\n"})
    write_handler(store, "two", UTILS, files={"utils.py": "NAME = 'two'\n"})
    write_handler(store, "relative", RELATIVE, files={"words.txt": "near at hand"})
    write_handler(store, "echo", ECHO)
    write_handler(store, "eight", ECHO, config=EIGHT)
    write_handler(store, "slow", ECHO, config={"responseTimeout": 1, "clientTimeoutInMills": 60_000})
    write_handler(store, "streamer", STREAMER)
    write_handler(store, "broken", BROKEN_IMPORT)
    write_handler(store, "typo", BROKEN_SYNTAX)
    write_handler(store, "tripler", SUBCLASS, network=Doubler())
    write_handler(store, "thread", SUBCLASS, network=Doubler(),
                  config={"isolation": "thread", "input": {"dtype": "float32", "shape": [2]}})  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("python"))
    write_archives(server.store)
    with server:
        server.start("--models", "all")
        yield server


def post(server: Server, model: str, value: Any, path: str = "/predictions") -> Any:
    return server.ask("POST", f"{path}/{model}", json.dumps(value).encode(), JSON)


def pids(server: Server, model: str) -> list[int]:
    return [row["pid"] for row in server.describe(model)["workers"] if row["status"] == "READY"]


def wait_for_another_worker(server: Server, model: str, gone: set[int]) -> None:
    def is_back() -> bool:
        now = pids(server, model)
        return bool(now) and not set(now) & gone

    server.wait_for(is_back, f"another worker of {model}")


# --- handlers of every form -------------------------------------------------------------------------------------------


def test_the_tutorials_handler_runs_unmodified(server: Server) -> None:
    assert post(server, "tutorial", [1.0, 2.5]).json == [2.0, 5.0]
    raw = server.ask("POST", "/predictions/tutorial", b"[3, 4]", RAW)
    assert (raw.status, raw.json) == (200, [6.0, 8.0])
    form = b'--x\r\nContent-Disposition: form-data; name="data"\r\n\r\n[5, 6]\r\n--x--\r\n'
    answer = server.ask("POST", "/predictions/tutorial", form, {"Content-Type": "multipart/form-data; boundary=x"})
    assert answer.json == [10.0, 12.0]
    assert "content-type" not in answer.headers


def test_a_function_is_initialized_with_none(server: Server) -> None:
    assert post(server, "function", 1).json == {"first": None, "rows": 1}
    assert post(server, "named", 1).json == {"first": None, "rows": 1}


def test_two_archives_with_the_same_file_names_do_not_mix(server: Server) -> None:
    assert post(server, "one", 0).body == b"one"
    assert post(server, "two", 0).body == b"two"


def test_a_relative_path_is_found_in_the_archive(server: Server) -> None:
    assert post(server, "relative", 0).body == b"near at hand"


def test_a_subclass_of_the_base_handler_works_in_both_lanes(server: Server) -> None:
    assert post(server, "tripler", [1.0, 2.0]).json == [3.0, 6.0]
    assert post(server, "thread", [1.0, 2.0]).json == [3.0, 6.0]
    assert (server.describe("tripler")["lane"], server.describe("thread")["lane"]) == ("python", "native")


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failing_archive_is_shown_everywhere_with_its_reason(server: Server) -> None:
    for name, words in {
        "broken": ("ModuleNotFoundError", "no_such_package_at_all", "handler.py:1"),
        "typo": ("SyntaxError", "handler.py:1"),
    }.items():
        described = server.describe(name)
        assert described["state"] == "FAILED"
        assert all(word in described["error"] for word in words), described["error"]
        ready = server.ask("GET", "/ready")
        assert ready.status == 503 and ready.json["models"][name]["state"] == "FAILED"
        answer = post(server, name, 1)
        assert answer.status == 503 and words[0] in answer.detail["text"]
        started = [line for line in server.log().splitlines() if f"{name} 1.0" in line and words[0] in line]
        assert len(started) == 1, started


def test_the_answer_and_one_log_record_say_where_a_handler_failed(server: Server) -> None:
    answer = post(server, "echo", {"raise": "boom"})
    line = 1 + ECHO.splitlines().index('        raise ValueError(order["raise"])')
    assert (answer.status, answer.json["type"], answer.json["message"]) == (
        503, "InternalServerException", "Prediction failed",
    )  # fmt: skip
    assert answer.detail["where"] == f"handler.py:{line} in act"
    assert (answer.detail["exception"], answer.detail["text"]) == ("ValueError", "boom")
    request_id = answer.headers["x-request-id"]
    assert answer.detail["request_id"] == request_id
    server.wait_for(lambda: request_id in server.log(), "the log record")
    records = [line for line in server.log().splitlines() if request_id in line]
    assert len(records) == 1 and "[ERROR]" in records[0] and "boom" in records[0]


def test_only_the_guilty_item_of_a_batch_fails(server: Server) -> None:
    values: list[dict[str, Any]] = [{"id": number} for number in range(8)]
    values[5]["raise"] = "guilty"
    answers = at_once([lambda value=value: post(server, "eight", value) for value in values])  # type: ignore[misc]
    assert [answer.status for answer in answers] == [200] * 5 + [503] + [200] * 2
    assert [answer.json["id"] for number, answer in enumerate(answers) if number != 5] == [0, 1, 2, 3, 4, 6, 7]
    assert answers[5].detail["text"] == "guilty"


def test_a_batch_of_eight_is_one_call(server: Server) -> None:
    values = [{"id": number} for number in range(8)]
    answers = at_once([lambda value=value: post(server, "eight", value) for value in values])  # type: ignore[misc]
    assert [answer.json["batch"] for answer in answers] == [8] * 8
    assert [answer.json["id"] for answer in answers] == list(range(8))


@pytest.mark.parametrize("order", [{"kill": "SIGKILL"}, {"kill": "SIGSEGV"}, {"exit": 0}, {"exit": 3}], ids=str)
def test_a_worker_that_dies_costs_an_answer_and_is_back(server: Server, order: dict[str, Any]) -> None:
    before = set(pids(server, "echo"))
    answer = post(server, "echo", order)
    assert (answer.status, answer.json["message"]) == (500, "Worker died.")
    wait_for_another_worker(server, "echo", before)
    assert post(server, "echo", {"id": 1}).json["id"] == 1
    server.manage("PUT", "/models/echo?min_worker=1&synchronous=true")  # forgets the crashes of this test


def test_requests_that_wait_for_a_dying_worker_are_answered_by_the_next(server: Server) -> None:
    first = threading.Thread(target=post, args=(server, "echo", {"sleep": 0.3, "exit": 1}))
    first.start()
    server.wait_for(lambda: server.metric("pyserve_batches_running", model="echo") == 1, "the batch")
    answers = at_once([lambda number=number: post(server, "echo", {"id": number}) for number in range(10)])  # type: ignore[misc]
    first.join(LIMIT_S)
    assert [answer.json["id"] for answer in answers] == list(range(10))
    server.manage("PUT", "/models/echo?min_worker=1&synchronous=true")


def test_a_call_that_overruns_is_ended_and_the_model_stays_loaded(server: Server) -> None:
    (pid,) = pids(server, "slow")
    answer = post(server, "slow", {"sleep": 30})
    assert answer.status == 504 and "response_timeout=1 s" in answer.json["message"]
    assert post(server, "slow", {"id": 1}).json["pid"] == pid
    assert post(server, "slow", {"spin": 30}).status == 504
    assert post(server, "slow", {"id": 1}).json["pid"] == pid


def test_a_call_that_cannot_be_ended_costs_its_worker(server: Server) -> None:
    (pid,) = pids(server, "slow")
    assert post(server, "slow", {"hang": 60}).status == 504
    wait_for_another_worker(server, "slow", {pid})
    assert post(server, "slow", {"id": 2}).json["id"] == 2


def test_system_exit_in_a_handler_is_an_error_like_others(server: Server) -> None:
    (pid,) = pids(server, "echo")
    assert post(server, "echo", {"system_exit": 3}).status == 503
    assert post(server, "echo", {"id": 1}).json["pid"] == pid


def test_a_leaking_handler_does_not_make_the_server_grow(server: Server) -> None:
    server_before = server.process.memory_info().rss
    (worker,) = (psutil.Process(pid) for pid in pids(server, "echo"))
    worker_before = worker.memory_info().rss
    for _ in range(20):
        assert post(server, "echo", {"leak": 10_000_000}).status == 200
    assert worker.memory_info().rss - worker_before > 150e6
    assert server.describe("echo")["workers"][0]["memoryUsage"] > 150e6
    assert server.process.memory_info().rss - server_before < 50e6


# --- streaming, bodies, clients that go -------------------------------------------------------------------------------


def test_parts_are_streamed_as_chunks(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /predictions/streamer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1")
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            part = connection.recv(65536)
            assert part, received
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower() and b"content-length" not in head.lower()
    assert body == b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in
                            (b"part 0;", b"part 1;", b"part 2;", b"end")) + b"0\r\n\r\n"  # fmt: skip


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000, 6_000_000])
def test_bodies_of_all_sizes_come_back_as_they_were(server: Server, size: int) -> None:
    body = random.Random(SEED).randbytes(size)
    answer = server.ask("POST", "/predictions/echo", body, RAW)
    assert answer.status == 200 and answer.body == body


def test_a_client_that_hangs_up_cancels_what_waits(server: Server) -> None:
    before = server.metric("pyserve_cancelled_total", model="echo")
    blocker = threading.Thread(target=post, args=(server, "echo", {"sleep": 3}))
    blocker.start()
    server.wait_for(lambda: server.metric("pyserve_batches_running", model="echo") == 1, "the batch")
    with server.connect() as connection:
        connection.sendall(b"POST /predictions/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1")
        server.wait_for(lambda: server.metric("pyserve_queue_size", model="echo") == 1, "the request")
        connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: a reset
    blocker.join(LIMIT_S)
    server.wait_for(lambda: server.metric("pyserve_cancelled_total", model="echo") == before + 1, "the cancellation")


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_are_processes_and_can_be_changed_live(server: Server) -> None:
    server.manage("PUT", "/models/tutorial?min_worker=3&synchronous=true")
    assert len(set(pids(server, "tutorial"))) == 3
    server.manage("PUT", "/models/tutorial?min_worker=0&max_worker=0&synchronous=true")
    assert post(server, "tutorial", [1.0]).status == 503
    server.manage("PUT", "/models/tutorial?min_worker=1&synchronous=true")
    assert post(server, "tutorial", [1.0]).json == [2.0]


def test_an_idle_worker_that_is_killed_is_replaced(server: Server) -> None:
    (pid,) = pids(server, "two")
    os.kill(pid, signal.SIGKILL)
    wait_for_another_worker(server, "two", {pid})
    assert post(server, "two", 0).body == b"two"


def test_every_request_is_answered_once_and_with_its_own_while_workers_are_killed(server: Server) -> None:
    """10,000 requests with ids from 16 clients; the ledger is the clients'."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    server.manage("PUT", "/models/echo?min_worker=2&batch_size=4&job_queue_size=1000&synchronous=true")
    stop = threading.Event()
    generator = random.Random(SEED)

    def kill() -> None:
        while not stop.wait(generator.uniform(0.2, 0.6)):
            living = pids(server, "echo")
            if living:
                os.kill(generator.choice(living), signal.SIGKILL)
            # A crash loop would open the breaker, which is another test's matter.
            server.manage("PUT", "/models/echo?min_worker=2&synchronous=true")

    def ask(number: int) -> tuple[int, int]:
        right = died = 0
        with server.client() as client:
            for count in range(625):
                wanted = f"{number}-{count}"
                padding = "x" * random.Random(f"{SEED}-{wanted}").choice((0, 10, 5000))
                answer = client.ask("POST", "/predictions/echo",
                                    json.dumps({"id": wanted, "padding": padding}).encode(), JSON)  # fmt: skip
                if answer.status == 200:
                    assert answer.json["id"] == wanted
                    assert answer.json["request_id"] == answer.headers["x-request-id"]
                    right += 1
                else:
                    assert (answer.status, answer.json["message"]) == (500, "Worker died."), answer.body
                    died += 1
        return right, died

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        results = at_once([lambda number=number: ask(number) for number in range(16)])  # type: ignore[misc]
    finally:
        stop.set()
        killer.join(LIMIT_S)
    assert sum(right + died for right, died in results) == 10_000
    assert sum(right for right, _ in results) > 9_000
    server.manage("PUT", "/models/echo?min_worker=1&batch_size=1&synchronous=true")


def test_no_process_outlives_a_killed_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "echo", ECHO)
    server.start("--models", "all")
    try:
        family = server.process.children(recursive=True)
        assert len(family) >= 2
        os.kill(server.running.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
        assert not alive
    finally:
        server.kill()


def test_strict_start_fails_with_the_handlers_reason(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "broken", BROKEN_IMPORT)
    started = server.run("start", "--models", "all", "--strict")
    assert started.returncode == 3
    assert "no_such_package_at_all" in started.stderr and "handler.py:1" in started.stderr
    assert "Traceback" not in started.stderr


def test_more_workers_share_the_weights(tmp_path: Path) -> None:
    server = Server(tmp_path)
    source = "import torch\n\n\nclass Big(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n" \
             "        self.weight = torch.nn.Parameter(torch.zeros(5000, 5000))\n\n" \
             "    def forward(self, x):\n        return x @ self.weight[:2, :2]\n"  # fmt: skip
    write_handler(server.store, "big", SUBCLASS, model_file=source, state={"weight": torch.eye(5000)})
    with server:
        server.start("--models", "all")
        assert post(server, "big", [1.0, 2.0]).json == [1.5, 3.0]
        server.manage("PUT", "/models/big?min_worker=3&synchronous=true")
        deadline = time.monotonic() + LIMIT_S
        private = 0
        for pid in pids(server, "big"):
            assert time.monotonic() < deadline
            memory = psutil.Process(pid).memory_full_info()
            private += memory.uss
        assert private < 3 * 100e6, "each worker has a copy of its own"
