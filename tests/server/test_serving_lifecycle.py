"""A real server as it starts, is stopped, is killed, and as it is started with what cannot be served."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import threading
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.archive_files import write_plain_mar
from tests.support.serving import LIMIT_S, Server, at_once
from tests.support.serving_models import Linear, write_eager, write_linear

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

ITEM = [1.0, 2.0, 3.0, 4.0]
LINEAR_CONFIG = {"input": {"dtype": "float32", "shape": [4]}}
LINEAR_FILE = """
import torch


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4, 3))
        self.bias = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.weight + self.bias
"""


def request_of(path: str, numbers: Any) -> bytes:
    body = json.dumps(numbers).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def read_answer(client: socket.socket, rest: bytearray) -> tuple[int, bytes]:
    """Status and body of the next answer; what comes after it stays in ``rest``.

    Raises:
        EOFError: the connection ended before.
    """
    while (end := rest.find(b"\r\n\r\n")) < 0:
        _receive(client, rest)
    length = re.search(rb"content-length: (\d+)", rest[:end])
    assert length is not None
    size = end + 4 + int(length[1])
    while len(rest) < size:
        _receive(client, rest)
    status, body = int(rest[9:12]), bytes(rest[end + 4 : size])
    del rest[:size]
    return status, body


def _receive(client: socket.socket, rest: bytearray) -> None:
    chunk = client.recv(65536)
    if not chunk:
        raise EOFError
    rest += chunk


def suspend(process: psutil.Process) -> None:
    """Returns once it stands still: until then a signal with a lower number would be handled first."""
    process.suspend()
    deadline = time.monotonic() + LIMIT_S
    while any(psutil.Process(thread.id).status() != psutil.STATUS_STOPPED for thread in process.threads()):
        assert time.monotonic() < deadline, "it was never stopped"


def wait_for_pending_signal(pid: int, number: signal.Signals) -> None:
    """Returns when a stopped process has been sent the signal."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        pending = re.search(r"^ShdPnd:\t([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        assert pending is not None
        if int(pending[1], 16) >> (number - 1) & 1:
            return
        assert time.monotonic() < deadline, "the signal was never sent"


class Ledger:
    """Clients with kept connections that write down what they sent and what was answered; a context.

    Each request bears its own number, which is the answer.
    """

    def __init__(self, server: Server, count: int, pipelined: int = 1):
        self.lock = threading.Lock()
        self.sent: set[int] = set()
        self.answered: dict[int, tuple[int, bytes]] = {}
        self.enough = threading.Event()
        self._address = server.address()
        self._pipelined = pipelined
        self._threads = [threading.Thread(target=self._ask, args=(1000 * number,)) for number in range(count)]

    def _ask(self, first: int) -> None:
        numbers = range(first, first + 1000)
        rest = bytearray()
        try:
            with socket.create_connection(self._address, timeout=LIMIT_S) as client:
                # Else our own kernel would keep back what follows a request that is not acknowledged yet.
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(0, len(numbers), self._pipelined):
                    group = numbers[start : start + self._pipelined]
                    for number in group:
                        client.sendall(request_of("/predictions/burn", [number, 20]))
                        with self.lock:
                            self.sent.add(number)
                    for number in group:
                        answer = read_answer(client, rest)
                        with self.lock:
                            self.answered[number] = answer
                            if len(self.answered) >= 100:
                                self.enough.set()
        except (OSError, EOFError):
            return  # the server has gone; the ledger says whether it was allowed to

    def __enter__(self) -> Ledger:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(LIMIT_S)


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_sigterm_under_load_loses_no_request_that_was_sent(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "burn.mar", server.store)
    with server.foreground("--models", "burn.mar") as popen:
        with Ledger(server, 6) as kept, Ledger(server, 2, pipelined=5) as pipelined:
            assert kept.enough.wait(LIMIT_S)
            assert pipelined.enough.wait(LIMIT_S)
            # A connection that nobody may have accepted yet.
            with server.connect() as late:
                late.sendall(request_of("/predictions/burn", [5, 1]))
                with kept.lock, pipelined.lock:
                    os.kill(popen.pid, signal.SIGTERM)
                    sent = [set(kept.sent), set(pipelined.sent)]
                assert read_answer(late, bytearray()) == (200, b"[\n  5.0\n]")
        assert popen.wait(LIMIT_S) == 0
    for ledger, due in zip((kept, pipelined), sent, strict=True):
        lost = due - ledger.answered.keys()
        assert not lost, f"{len(lost)} of {len(due)} requests were not answered: {sorted(lost)}"
        wrong = {n: a for n, a in ledger.answered.items() if a[0] != 200 or json.loads(a[1]) != [n]}
        assert not wrong
    assert not server.pid_path.exists()


def test_requests_that_wait_in_the_kernel_when_the_server_is_told_to_stop_are_answered(
    server: Server, session_store: Path
) -> None:
    shutil.copy(session_store / "burn.mar", server.store)
    with ExitStack() as stack:
        popen = stack.enter_context(server.foreground("--models", "burn.mar"))
        process = server.process
        kept = [stack.enter_context(server.connect()) for _ in range(5)]
        for client in kept:
            client.sendall(request_of("/predictions/burn", [0, 1]))
            assert read_answer(client, bytearray())[0] == 200
        suspend(process)
        fresh = [stack.enter_context(server.connect()) for _ in range(5)]
        for number, client in enumerate([*kept, *fresh]):
            client.sendall(request_of("/predictions/burn", [number, 1]))
        os.kill(popen.pid, signal.SIGTERM)
        wait_for_pending_signal(process.pid, signal.SIGTERM)
        process.resume()
        answers = [read_answer(client, bytearray()) for client in (*kept, *fresh)]
        assert [(status, json.loads(body)) for status, body in answers] == [(200, [number]) for number in range(10)]
        assert popen.wait(LIMIT_S) == 0


def test_health_says_that_the_server_drains_and_a_second_sigterm_ends_it(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "burn.mar", server.store)
    with ExitStack() as stack:
        popen = stack.enter_context(server.foreground("--models", "burn.mar"))
        busy, idle, *halves = (stack.enter_context(server.connect()) for _ in range(5))
        address = server.address()
        busy.sendall(request_of("/predictions/burn", [1, 10_000_000]))
        server.wait_for(lambda: server.metric("pyserve_batches_running", model="burn") == 1, "the request to run")
        for half, path in zip(halves, ("ready", "ping", "live"), strict=True):
            half.sendall(f"GET /{path} HTTP/1.1\r\nho".encode())
        os.kill(popen.pid, signal.SIGTERM)
        assert idle.recv(1) == b""  # an idle connection is closed when the draining begins
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=LIMIT_S)
        answers = []
        for half in halves:
            half.sendall(b"st: x\r\n\r\n")
            answers.append(read_answer(half, bytearray()))
        assert [status for status, _ in answers] == [503, 500, 200]
        assert json.loads(answers[0][1])["reason"] == "the server is starting or stopping"
        os.kill(popen.pid, signal.SIGTERM)
        status, body = read_answer(busy, bytearray())
        assert (status, json.loads(body)["detail"]["reason"]) == (503, "draining")
        assert popen.wait(LIMIT_S) == 1
    assert "SIGTERM again: stopping without waiting for requests" in (server.folder / "foreground.log").read_text()


def test_for_a_while_after_sigterm_all_is_answered_and_health_is_off(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    server.environment["PYSERVE_DRAIN_DELAY_S"] = "3600"
    path = server.folder / "socket"
    with (
        server.foreground("--models", "linear.mar", "--metrics-address", f"unix:{path}") as popen,
        server.client() as kept, server.connect() as idle,
    ):  # fmt: skip
        assert kept.predict("linear", [1, 2, 3, 4]).headers["connection"] == "keep-alive"
        os.kill(popen.pid, signal.SIGTERM)
        server.wait_for(lambda: server.ask("GET", "/ready").status == 503, "readiness to go off")
        assert server.ask("GET", "/ping").status == 500
        assert server.ask("GET", "/v2/health/ready").status == 503
        assert server.ask("GET", "/live").status == 200
        answer = kept.predict("linear", [1, 2, 3, 4])
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        with server.client() as fresh:
            assert fresh.predict("linear", [1, 2, 3, 4]).headers["connection"] == "close"
        with socket.socket(socket.AF_UNIX) as by_file:
            by_file.connect(str(path))
            by_file.sendall(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
            assert read_answer(by_file, bytearray())[0] == 200
        assert not select.select([idle], [], [], 0)[0]  # it is left open
        idle.sendall(request_of("/predictions/linear", [1, 2, 3, 4]))
        assert read_answer(idle, bytearray())[0] == 200
        os.kill(popen.pid, signal.SIGTERM)  # a second one ends the wait
        popen.wait(LIMIT_S)
    assert "SIGTERM: draining, in 3600 s" in (server.folder / "foreground.log").read_text()
    assert not path.exists()


def test_a_signal_to_all_processes_of_a_service_is_one(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    server.environment["PYSERVE_DRAIN_DELAY_S"] = "1"
    with server.foreground("--models", "linear.mar") as popen, server.client() as kept:
        os.kill(server.process.pid, signal.SIGTERM)
        os.kill(popen.pid, signal.SIGTERM)
        answer = kept.predict("linear", [1, 2, 3, 4])
        while answer.headers["connection"] != "close":  # it was faster than the signals
            assert answer.status == 200
            answer = kept.predict("linear", [1, 2, 3, 4])
        assert answer.status == 200
        assert popen.wait(LIMIT_S) == 0


def test_somebody_who_presses_ctrl_c_does_not_wait_for_load_balancers(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    server.environment["PYSERVE_DRAIN_DELAY_S"] = "3600"
    with server.foreground("--models", "linear.mar") as popen, server.connect() as idle:
        os.kill(popen.pid, signal.SIGINT)
        assert idle.recv(1) == b""
        assert popen.wait(LIMIT_S) == 0


# --- a killed server --------------------------------------------------------------------------------------------------


def test_a_killed_server_is_back_with_all_it_served(server: Server, session_store: Path) -> None:
    for name in ("linear.mar", "linear-2.mar", "burn.mar"):
        shutil.copy(session_store / name, server.store)
    started = server.start("--models", "linear.mar")
    assert started.stdout.splitlines()[-2] == "Model server started."
    server.manage("POST", "/models?url=linear-2.mar&initial_workers=1")
    server.manage("PUT", "/models/linear/2.0/set-default")
    server.manage("POST", "/models?url=burn.mar&model_name=other&initial_workers=2&batch_size=4&max_batch_delay=7")
    server.manage("PUT", "/models/linear/1.0?batch_size=3&response_timeout=50&job_queue_size=77")
    server.manage("PUT", "/models/linear/1.0?min_worker=3&synchronous=true")
    server.manage("PUT", "/models/linear/1.0?min_worker=2&max_worker=3&synchronous=true")
    server.manage("POST", "/models?url=burn.mar&model_name=idle&initial_workers=0")

    def served() -> list[dict[str, Any]]:
        changing = ("workers", "jobQueueStatus", "batchSizeHistogram", "meanQueueMs")
        found = []
        for name in ("linear", "other", "idle"):
            for version in server.manage("GET", f"/models/{name}/all"):
                count = len(version["workers"])
                found.append({k: v for k, v in version.items() if k not in changing} | {"worker count": count})
        return sorted(found, key=lambda each: (each["modelName"], each["modelVersion"]))

    before, addresses, pid = served(), server.running.addresses, server.process.pid
    with torch.inference_mode():
        expected = Linear(2)(torch.tensor([ITEM]))[0].tolist()
    for _ in range(3):
        server.kill_server_process()
        # Nobody serves now: these wait, and are answered.
        answers = at_once([lambda: server.predict("linear", ITEM)] * 3)
        assert [answer.json == pytest.approx(expected, abs=1e-5) for answer in answers] == [True] * 3
        assert served() == before
        assert server.running.addresses == addresses
        assert server.process.pid != pid
        pid = server.process.pid
    assert server.predict("other", [3, 1]).json == [3]
    assert server.manage("DELETE", "/models/other")["status"] == 'Model "other" unregistered'

    status = server.run("status")
    assert status.returncode == 0
    lines = [line for line in status.stdout.splitlines() if line.startswith(("linear", "idle"))]
    assert [line.split()[1] for line in lines if "(default)" in line and line.startswith("linear")] == ["2.0"]
    assert sorted(line.replace("(default)", "").split()[:4] for line in lines) == [
        ["idle", "1.0", "NO", "WORKERS"],
        ["linear", "1.0", "READY", "3/2"],
        ["linear", "2.0", "READY", "1/1"],
    ]
    stopped = server.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "pyserve has stopped.\n")
    assert server.run("status").returncode == 3
    again = server.run("stop")
    assert (again.returncode, again.stdout) == (1, "pyserve is not currently running.\n")


# --- starts that go wrong, in part or as a whole ----------------------------------------------------------------------


@pytest.fixture
def bad_store(server: Server, session_store: Path) -> Path:
    """``good.mar`` among archives that cannot be served, and ``spare.mar``."""
    store = server.store
    write_linear(store, "good")
    write_linear(store, "spare")
    (store / "damaged.mar").write_bytes((store / "good.mar").read_bytes()[:-100])
    state = Linear().state_dict()
    write_eager(store, "misfit", LINEAR_FILE, {**state, "weight": torch.zeros(4, 5)}, config=LINEAR_CONFIG)
    needy = LINEAR_FILE.replace("import torch", "import no_such_module")
    write_eager(store, "lost", needy, state, config=LINEAR_CONFIG)
    return store


def test_what_cannot_be_served_is_named_with_its_reason_and_the_others_serve(server: Server, bad_store: Path) -> None:
    started = server.start("--models", "good.mar", "damaged.mar", "misfit.mar", "lost.mar", "absent.mar", "goode.mar")
    lines = started.stdout.splitlines()
    reasons = {
        line.split()[0]: (line.split()[2], lines[number + 1].strip())
        for number, line in enumerate(lines[:-1])
        if " FAILED " in line
    }
    assert [line.split()[2] for line in lines if line.startswith("good ")] == ["READY"]
    assert set(reasons) == {"damaged.mar", "misfit", "lost", "absent.mar", "goode.mar"}
    assert reasons["absent.mar"][1] == "Model not found at: absent.mar"
    assert reasons["goode.mar"][1] == "Model not found at: goode.mar; did you mean good.mar?"
    assert "weight" in reasons["misfit"][1]
    assert "does not fit" in reasons["misfit"][1]
    assert "no_such_module" in reasons["lost"][1]
    assert "damaged.mar" in reasons["damaged.mar"][1]
    assert any(line.startswith("found in model store, not loaded: spare.mar (") for line in lines)
    assert "Model server started." in lines

    assert server.predict("good", ITEM).status == 200
    refused = server.predict("misfit", ITEM)
    assert (refused.status, refused.detail["state"]) == (503, "FAILED")
    assert "does not fit" in refused.detail["text"]
    assert server.predict("damaged", ITEM).status == 404
    assert (server.ask("GET", "/ping").status, server.ask("GET", "/live").status) == (500, 200)
    ready = server.ask("GET", "/ready")
    assert ready.status == 503
    assert set(ready.json["models"]) == {"damaged.mar", "misfit", "lost", "absent.mar", "goode.mar"}
    assert all(row["error"] for row in ready.json["models"].values())

    status = server.run("status").stdout
    assert {line.split()[0] for line in status.splitlines() if " FAILED " in line} == set(ready.json["models"])

    # Still so after a crash: what an operator was told must not change by itself.
    server.kill_server_process()
    again = server.ask("GET", "/ready")
    assert (again.status, set(again.json["models"])) == (503, set(ready.json["models"]))
    assert server.predict("good", ITEM).status == 200

    # Mended and registered, as the message said.
    refused = server.ask("POST", "/models?url=misfit.mar&initial_workers=1", port="management")
    assert refused.status == 500
    assert "misfit" in server.ask("GET", "/ready").json["models"]
    for name in ("damaged", "misfit", "lost", "absent", "goode"):
        write_linear(bad_store, name)
        server.manage("POST", f"/models?url={name}.mar&initial_workers=1")
        assert server.predict(name, ITEM).status == 200
    assert server.ask("GET", "/ready").json == {"status": "Ready"}
    assert server.ask("GET", "/ping").status == 200


def test_strict_does_not_serve_when_a_model_fails(server: Server, bad_store: Path) -> None:
    started = server.run("start", "--strict", "--models", "good.mar", "damaged.mar")
    assert started.returncode == 3
    assert "FAILED" in started.stderr
    assert "--strict: not loaded: damaged.mar; the server is stopped" in started.stderr
    assert "Model server started." not in started.stdout
    assert server.run("status").returncode == 3


def test_without_models_the_server_starts_empty_and_takes_one(server: Server) -> None:
    write_linear(server.store, "later")
    started = server.start()
    assert started.stdout.splitlines()[1:5] == [
        "no model is loaded",
        "found in model store, not loaded: later.mar (start with --models later.mar or POST /models?url=later.mar)",
        f"console: {server.url('management')}/",
        "Model server started.",
    ]
    assert server.ask("GET", "/ping").json == {"status": "Healthy"}
    assert server.manage("GET", "/models")["models"] == []
    assert "no model is loaded" in server.run("status").stdout
    server.manage("POST", "/models?url=later.mar&initial_workers=1")
    assert server.predict("later", ITEM).status == 200


def test_a_port_in_use_is_named_with_its_owner(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = server.run("start", "--inference-address", f"http://127.0.0.1:{port}")
    assert started.returncode == 1
    last = started.stderr.splitlines()[-1]
    assert last.startswith("pyserve: error: inference_address (--inference-address): cannot listen on http://127.0.0.1")
    assert f":{port}: the port is in use by " in last
    assert f"(pid {os.getpid()})" in last
    assert last.endswith("choose another with inference_address in config.properties, "
                         "or with `pyserve start --inference-address`")  # fmt: skip


def test_a_missing_model_store_is_named(server: Server) -> None:
    started = server.run("start", "--model-store", "nowhere")
    assert started.returncode == 1
    assert f"--model-store directory not found: {server.folder}/nowhere" in started.stderr


def test_a_missing_handler_is_named(server: Server) -> None:
    write_linear(server.store, "m")
    with zipfile.ZipFile(server.store / "m.mar") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    # The archiver would refuse to write this.
    files["MAR-INF/MANIFEST.json"] = files["MAR-INF/MANIFEST.json"].replace(b'"tensor"', b'"tenser"')
    write_plain_mar(server.store / "m.mar", files)
    started = server.start("--models", "m.mar")
    assert "FAILED" in started.stdout
    assert "tenser" in started.stdout
    assert "tensor" in started.stdout  # the nearest there is
