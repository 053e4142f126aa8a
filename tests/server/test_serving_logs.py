"""The log files of a running server: every answer and worker has its lines; files that cannot be written cost none."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.support import certificates
from tests.support.grpc_calls import PREDICTIONS, refused, stub
from tests.support.handler_archives import Doubler, write_handler
from tests.support.serving import LIMIT_S, RAW, Server
from tests.support.serving_models import write_linear

pytestmark = pytest.mark.server

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}"
NUMBERS = b"\0" * 16
TALKER = """
import logging
import os
import sys


def handle(data, context):
    if data is None:
        return None
    print("printed")
    print("complained", file=sys.stderr)
    logging.getLogger("mine").info("logged")
    if data[0].get("body") == b"fail":
        raise ValueError("asked for")
    if data[0].get("body") == b"die":
        print("last words")
        os._exit(7)
    return ["done"] * len(data)
"""
THREADED = """
import torch
from ts.torch_handler.base_handler import BaseHandler


class Mine(BaseHandler):
    def preprocess(self, data):
        print("printed in a thread")
        return torch.zeros(len(data), 4)

    def postprocess(self, output):
        return [0] * len(output)
"""
METHOD = f"{PREDICTIONS}/Predictions"


def read_when(path: Path, is_there: Callable[[str], bool]) -> str:
    """What is in a file, once it has what is waited for: it is written a moment after the answer."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        text = path.read_text() if path.exists() else ""
        if is_there(text):
            return text
        assert time.monotonic() < deadline, f"not in {path}: {text[-2000:]}"
        time.sleep(0.01)


def new_lines(server: Server, count: int, ask: Callable[[], Any]) -> list[str]:
    """Of the access log, after their times: those of ``ask``."""
    path = server.folder / "logs" / "access_log.log"
    mark = f"/mark-{secrets.token_hex(8)}"
    server.ask("GET", mark)  # answers before have their lines once this one has
    before = len(read_when(path, lambda text: mark in text and text.endswith("\n")))
    ask()
    lines = read_when(path, lambda text: text.count("\n", before) >= count)[before:].splitlines()
    assert len(lines) == count
    assert all(re.match(f"{TIME} - /127\\.0\\.0\\.1:\\d+ ", line) for line in lines), lines
    return [line.partition(" - ")[2].partition(" ")[2] for line in lines]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    write_linear(server.store)
    write_handler(server.store, "talker", TALKER)
    write_handler(server.store, "threaded", THREADED, network=Doubler(), config={"isolation": "thread"})
    with server:
        server.start("--grpc", "true", "--models", "linear.mar", "talker.mar", "threaded.mar")
        yield server


def send(server: Server, sent: bytes, port: str = "inference") -> bytes:
    with server.connect(port) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(4096), b""))


@pytest.mark.parametrize(
    "port, method, target, body, line",
    [
        ("inference", "POST", "/predictions/linear", NUMBERS, '"POST /predictions/linear HTTP/1.1" 200'),
        ("inference", "POST", "/predictions/talker?a=1", b"x", '"POST /predictions/talker?a=1 HTTP/1.1" 200'),
        ("inference", "POST", "/predictions/none", b"", '"POST /predictions/none HTTP/1.1" 404'),
        ("inference", "GET", "/no%20such", None, '"GET /no%20such HTTP/1.1" 404'),
        ("management", "GET", "/models?limit=1", None, '"GET /models?limit=1 HTTP/1.1" 200'),
        ("metrics", "GET", "/metrics", None, '"GET /metrics HTTP/1.1" 200'),
    ],
)
def test_every_listener_notes_its_answers(  # noqa: PLR0917
    server: Server, port: str, method: str, target: str, body: bytes | None, line: str
) -> None:
    (found,) = new_lines(server, 1, lambda: server.ask(method, target, body, RAW if body else None, port=port))
    assert re.fullmatch(re.escape(line) + r" \d+", found)


@pytest.mark.parametrize(
    "sent, line",
    [
        (b"nonsense\r\n\r\n", '"GET /bad-request HTTP/1.1" 400'),
        (b"POST /predictions/linear HTTP/1.1\r\nhost: h\r\ncontent-length: 99999999999\r\n\r\n",
         '"POST /predictions/linear HTTP/1.1" 413'),
        (b"GET /ping HTTP/1.0\r\n\r\n", '"GET /ping HTTP/1.0" 200'),
    ],
)  # fmt: skip
def test_answers_of_the_protocol_itself_are_noted(server: Server, sent: bytes, line: str) -> None:
    (found,) = new_lines(server, 1, lambda: send(server, sent))
    assert re.fullmatch(re.escape(line) + r" \d+", found)


def test_pipelined_requests_have_a_line_each(server: Server) -> None:
    sent = b"GET /ping HTTP/1.1\r\nhost: h\r\n\r\n" * 3 + b"GET /live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    targets = [line.split()[1] for line in new_lines(server, 4, lambda: send(server, sent))]
    assert targets == ["/ping", "/ping", "/ping", "/live"]


def test_signatures_of_urls_are_not_written_down(server: Server) -> None:
    signed = "/models?url=https%3A%2F%2Fexample.com%2Fm.mar%3Fsig%3Dsecret&synchronous=true"
    (line,) = new_lines(server, 1, lambda: server.ask("POST", signed, b"", port="management"))
    assert "secret" not in line
    assert "/models?url=https%3A%2F%2Fexample.com%2Fm.mar%3Fsig%3D%2A%2A%2A&synchronous=true" in line


def test_grpc_calls_are_noted_with_their_codes(server: Server) -> None:
    codes = [grpc.StatusCode.OK]

    def ask() -> None:
        with stub(server) as service:
            service.Predictions(model_name="talker", input={"data": b"x"})
            codes.append(refused(service.Predictions, model_name="none").code())
            codes.append(refused(service.Predictions, model_name="talker", input={"body": b"fail"}).code())

    lines = new_lines(server, 3, ask)
    assert grpc.StatusCode.OK not in codes[1:]
    for line, code in zip(lines, codes, strict=True):
        assert re.fullmatch(rf'"gRPC {re.escape(METHOD)} HTTP/2\.0" {code.value[0]} \d+', line)


def test_what_workers_print_is_in_the_model_log_and_on_the_console(server: Server) -> None:
    server.ask("POST", "/predictions/talker", b"x")
    for line in (  # each comes by a way of its own
        r"\[INFO \] W-9000-talker_1\.0-stdout MODEL_LOG - printed",
        r"\[WARN \] W-9000-talker_1\.0-stderr MODEL_LOG - complained",
        r"\[INFO \] W-9000-talker_1\.0-stdout MODEL_LOG - mine: logged",
    ):
        said = re.compile(f"^{TIME} {line}$", re.MULTILINE)
        for file in ("model_log.log", "pyserve.log"):
            read_when(server.folder / "logs" / file, lambda text, said=said: said.search(text) is not None)  # type: ignore[misc]
    assert "MODEL_LOG" not in (server.folder / "logs" / "ts_log.log").read_text()


def test_what_a_worker_printed_before_it_died_is_in_the_model_log(server: Server) -> None:
    assert server.ask("POST", "/predictions/talker", b"die").status == 500
    read_when(server.folder / "logs" / "model_log.log", lambda text: "MODEL_LOG - last words" in text)


def test_what_a_handler_in_a_thread_prints_is_on_the_console_at_once(server: Server) -> None:
    assert server.ask("POST", "/predictions/threaded", b"x").status == 200
    read_when(server.folder / "logs" / "pyserve.log", lambda text: "printed in a thread" in text)


def test_states_of_workers_are_told_in_torchserves_words(server: Server) -> None:
    for model in ("linear", "talker"):
        server.manage("PUT", f"/models/{model}?min_worker=2&synchronous=true")
        server.manage("PUT", f"/models/{model}?min_worker=1&max_worker=1&synchronous=true")
        last = f"W-9001-{model}_1.0 State change WORKER_MODEL_LOADED -> WORKER_SCALED_DOWN"
        log = read_when(server.folder / "logs" / "ts_log.log", lambda text, last=last: last in text)  # type: ignore[misc]
        told = re.findall(rf"^{TIME} \[INFO \] W-9001-{model}_1\.0 \S+ - (.*)$", log, re.MULTILINE)
        assert told == [
            f"W-9001-{model}_1.0 State change {change}"
            for change in (
                "null -> WORKER_STARTED",
                "WORKER_STARTED -> WORKER_MODEL_LOADED",
                "WORKER_MODEL_LOADED -> WORKER_SCALED_DOWN",
            )
        ]


def test_a_workers_death_is_told_in_torchserves_words(server: Server) -> None:
    path = server.folder / "logs" / "ts_log.log"
    before = len(path.read_text())
    assert server.ask("POST", "/predictions/talker", b"die", RAW).status >= 500
    log = read_when(path, lambda text: "Auto recovery succeeded, reset recoveryStartTS" in text[before:])[before:]
    name = r"W-9000-talker_1\.0"
    assert [line.partition(" - ")[2] for line in log.splitlines() if " pyserve.telemetry.worker_log - " in line] == [
        Matching(rf"{name} Worker disconnected\. WORKER_MODEL_LOADED"),
        Matching(rf"{name} State change WORKER_MODEL_LOADED -> WORKER_STOPPED"),
        Matching(r"Auto recovery start timestamp: \d{13}"),
        Matching(r"Retry worker: 9000 in \d+ seconds\..*"),
        Matching(rf"{name} State change WORKER_STOPPED -> WORKER_STARTED"),
        Matching(rf"{name} State change WORKER_STARTED -> WORKER_MODEL_LOADED"),
        Matching("Auto recovery succeeded, reset recoveryStartTS"),
    ]


class Matching:
    """Equal to every text of a form."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, form: str):
        self._form = form

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and re.fullmatch(self._form, other) is not None

    def __repr__(self) -> str:
        return self._form


def test_json_records_over_tls(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "talker", TALKER)
    certificates.self_signed(tmp_path)
    (tmp_path / "config.properties").write_text(
        "private_key_file=server.key\ncertificate_file=server.pem\nlog_format=json\n"
    )
    with server:
        server.start("--models", "talker.mar", "--inference-address", "https://127.0.0.1:0")
        failed = server.ask("POST", "/predictions/talker", b"fail", RAW | {"x-request-id": "request-1"})
        assert failed.status == 503
        assert server.ask("GET", "/ping").status == 200
        logs = tmp_path / "logs"
        access = records(read_when(logs / "access_log.log", lambda text: text.count("\n") == 2))
        assert [(each["method"], each["uri"], each["protocol"], each["status"]) for each in access] == [
            ("POST", "/predictions/talker", "HTTP/1.1", 503), ("GET", "/ping", "HTTP/1.1", 200),
        ]  # fmt: skip
        assert access[0]["request_id"] == "request-1"
        told = records(read_when(logs / "model_log.log", lambda text: "asked for" in text))
        about = {"model": "talker", "version": "1.0", "worker": "W-9000-talker_1.0"}
        (logged,) = [each for each in told if each["message"] == "mine: logged"]
        assert logged.items() >= {**about, "level": "INFO", "stream": "stdout", "request_id": "request-1"}.items()
        (failure,) = [each for each in told if "ValueError: asked for" in each["message"]]
        assert failure.items() >= {**about, "level": "ERROR", "request_id": "request-1"}.items()
        assert failure["message"].endswith('\n    raise ValueError("asked for")\nValueError: asked for')
        states = records((logs / "ts_log.log").read_text())
        assert any(each.get("worker") == "W-9000-talker_1.0" for each in states)
        # The console's log is the supervisor's too.
        assert {each["logger"] for each in records(server.log())} >= {"pyserve.supervisor", failure["logger"]}


def records(text: str) -> list[dict[str, Any]]:
    """Each line by itself."""
    made: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    for each in made:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", each["time"])
        assert each["level"] in ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL") and each["logger"] and each["message"]
    return made


def test_a_full_disk_disturbs_nobody(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("access_log.log", "ts_log.log", "model_log.log", "ts_metrics.log", "model_metrics.log"):
        (logs / name).symlink_to("/dev/full")
    server = Server(tmp_path)
    write_linear(server.store)
    write_handler(server.store, "talker", TALKER)
    server.start("--models", "linear.mar", "talker.mar")
    try:
        with server.client() as client:
            for _ in range(200):
                assert client.ask("POST", "/predictions/linear", NUMBERS, RAW).status == 200
                assert client.ask("POST", "/predictions/talker", b"x").status == 200
        told = read_when(logs / "pyserve.log", lambda text: "lines of log files were lost" in text)
        assert re.search(rf"were lost: \d+ of {logs}/\w+\.log \(No space left on device\)", told)
        assert told.count("lines of log files were lost") == 1  # the next one, of all files, comes a minute later
        assert server.ask("GET", "/ping").status == 200
        assert server.run("stop").returncode == 0
    finally:
        server.kill()


def test_a_folder_that_cannot_be_written_disturbs_nobody(tmp_path: Path) -> None:
    server = Server(tmp_path)
    write_linear(server.store)
    server.environment["LOG_LOCATION"] = "/proc/none"
    started = server.start("--models", "linear.mar", "--no-config-snapshots")
    try:
        assert "cannot be written" in started.stderr and "LOG_LOCATION" in started.stderr
        for _ in range(20):
            assert server.predict("linear", [1.0, 2.0, 3.0, 4.0]).status == 200
        assert server.run("stop").returncode == 0
    finally:
        server.kill()
