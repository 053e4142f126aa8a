"""Faults that end leave no trace: workers, their zygote, descriptors, the cache and what handlers have started."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, LIMIT_S, Answer, Server

pytestmark = pytest.mark.server

# What `initialize` does is in the file named by the model, in the folder of the test: "exit", "raise", "kill".
FAULTY = """
import os
import signal
import time


class Faulty:
    def initialize(self, context):
        path = os.path.join(os.environ["FAULTS"], context.model_name)
        fault = open(path).read() if os.path.exists(path) else ""
        if fault == "exit":
            os._exit(3)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault:
            raise RuntimeError(fault)
        self.words = open(os.path.join(context.system_properties["model_dir"], "words.txt")).read()

    def handle(self, data, context):
        orders = [row.get("body") for row in data]
        for order in orders:
            if isinstance(order, dict) and "block" in order:
                while os.path.exists(order["block"]):
                    time.sleep(0.01)
        return [self.words] * len(data)
"""

# Starts processes that leave its group, by different ways; answers their ids.
PARENT = """
import os
import subprocess
import sys
import time

SLEEP = [sys.executable, "-c", "import time; time.sleep(1000)"]


def daemonized(run):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            for number in range(3):  # what it prints is nobody's
                os.close(number)
            os.close(read), os.close(write)
            run()
        os.write(write, b"%d" % pid)
        os._exit(0)
    os.close(write)
    pid = int(os.read(read, 100))
    os.close(read)
    os.wait()
    return pid


class Parent:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        plain = subprocess.Popen(SLEEP)
        session = subprocess.Popen(SLEEP, start_new_session=True)
        shell = int(subprocess.check_output("setsid sleep 1000 >/dev/null 2>&1 & echo $!", shell=True))
        forked = daemonized(lambda: time.sleep(1000))
        executed = daemonized(lambda: os.execv(SLEEP[0], SLEEP))
        return [{"pids": [plain.pid, session.pid, shell, forked, executed], "worker": os.getpid()}] * len(data)
"""


class Site(Server):
    def fault(self, model: str, text: str) -> None:
        """What its ``initialize`` does from now on; ``""`` for nothing."""
        path = self.folder / "faults" / model
        if text:
            path.write_text(text)
        else:
            path.unlink()

    def post(self, model: str, order: Any = None) -> Answer:
        return self.ask("POST", f"/predictions/{model}", json.dumps(order or {}).encode(), JSON)

    def pid(self, model: str) -> int:
        """Of its only worker."""
        (row,) = self.describe(model)["workers"]
        return int(row["pid"])

    def state(self, model: str) -> str:
        return str(self.describe(model)["state"])

    @property
    def zygote(self) -> psutil.Process:
        (found,) = [each for each in self.process.children() if "pyserve.worker.zygote" in each.cmdline()]
        return found

    def wait_until_ready(self, model: str) -> None:
        self.wait_for(lambda: self.state(model) == "READY" and self.post(model).status == 200, f"{model} to recover")

    def wait_for_server(self) -> None:
        """After `kill_server_process`."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.ask("GET", "/live")
                return
            assert time.monotonic() < deadline, "no server"

    @property
    def is_healthy(self) -> bool:
        return self.ask("GET", "/ping").status == 200


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("recovery"))
    (site.folder / "faults").mkdir()
    site.environment["FAULTS"] = str(site.folder / "faults")
    for name in ("faulty", "other"):
        write_handler(site.store, name, FAULTY, files={"words.txt": f"of {name}"})
    write_handler(site.store, "sequences", FAULTY, files={"words.txt": "one"},
                  config={"sequenceBatching": True, "maxNumSequence": 8, "maxSequenceJobQueueSize": 8})  # fmt: skip
    write_handler(site.store, "parent", PARENT)
    with site:
        site.start("--models", "all")
        yield site


def in_background(site: Site, model: str, order: Any = None) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(site.post(model, order)))
    thread.start()
    return thread, answers


def has_gone(pid: int) -> bool:
    """Also no zombie is left."""
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "fault, word",
    [("exit", "exit code 3"), ("boom", "RuntimeError: boom"), ("kill", "SIGKILL")],
    ids=["exit", "raise", "kill"],
)
def test_a_fault_in_initialize_is_shown_and_heals_by_itself(site: Site, fault: str, word: str) -> None:
    site.fault("faulty", fault)
    os.kill(site.pid("faulty"), signal.SIGKILL)
    site.wait_for(lambda: word in site.describe("faulty").get("error", ""), "the last error")
    assert site.state("faulty") == "FAILED" and not site.is_healthy
    waiting = [in_background(site, "faulty") for _ in range(5)]
    site.wait_for(lambda: site.post("faulty").status == 503, "a refusal")
    for thread, _ in waiting:
        thread.join(LIMIT_S)
    statuses = [answer.status for _, answers in waiting for answer in answers]
    assert statuses == [503] * 5  # at once: `response_timeout` is longer than this test may take
    refused = site.post("faulty")
    assert word in refused.detail["text"] and int(refused.headers["retry-after"]) >= 1
    assert site.post("other").body == b"of other"
    asked = site.ask("PUT", "/models/faulty?min_worker=1&synchronous=true", port="management")
    assert asked.status == 500 and word.rpartition(": ")[2] in asked.detail["text"]
    assert site.state("faulty") == "FAILED"
    site.fault("faulty", "")
    site.wait_until_ready("faulty")
    assert "error" not in site.describe("faulty") and site.is_healthy


def test_a_short_fault_in_initialize_fails_no_request(site: Site) -> None:
    site.fault("faulty", "exit")
    os.kill(site.pid("faulty"), signal.SIGKILL)
    site.wait_for(lambda: "exit code 3" in site.describe("faulty").get("error", ""), "a failed load")
    thread, answers = in_background(site, "faulty")
    site.fault("faulty", "")
    thread.join(LIMIT_S)
    assert [answer.status for answer in answers] == [200]
    site.wait_until_ready("faulty")


def test_sequences_are_refused_while_their_workers_are_down_and_go_on_after(site: Site) -> None:
    site.fault("sequences", "exit")
    os.kill(site.pid("sequences"), signal.SIGKILL)
    waiting = [in_background(site, "sequences") for _ in range(4)]
    site.wait_for(lambda: site.post("sequences").status == 503, "a refusal")
    for thread, _ in waiting:
        thread.join(LIMIT_S)
    assert all(answer.status in (200, 503) for _, answers in waiting for answer in answers)
    assert site.state("sequences") == "FAILED"
    site.fault("sequences", "")
    site.wait_until_ready("sequences")


def test_what_waits_is_refused_when_the_last_worker_is_taken_away(site: Site) -> None:
    blocker = site.folder / "block"
    blocker.touch()
    running, answered = in_background(site, "faulty", {"block": str(blocker)})
    site.wait_for(lambda: site.metric("pyserve_batches_running", model="faulty") == 1, "the batch")
    waiting, refused = in_background(site, "faulty")
    site.wait_for(lambda: site.metric("pyserve_queue_size", model="faulty") == 1, "the request")
    site.ask("PUT", "/models/faulty?min_worker=0&max_worker=0", port="management")
    waiting.join(LIMIT_S)
    assert [answer.status for answer in refused] == [503]
    assert not answered  # what runs is finished
    blocker.unlink()
    running.join(LIMIT_S)
    assert [answer.status for answer in answered] == [200]
    assert site.state("faulty") == "READY" and site.is_healthy
    site.manage("PUT", "/models/faulty?min_worker=1&synchronous=true")
    assert site.post("faulty").status == 200


def test_a_killed_zygote_is_nobodys_fault(site: Site) -> None:
    for _ in range(5):
        zygote = site.zygote
        zygote.kill()
        site.wait_for(lambda zygote=zygote: has_gone(zygote.pid), "the zygote's end")  # type: ignore[misc]
        site.wait_for(lambda: any("zygote" in " ".join(each.cmdline()) for each in site.process.children()), "another")
    for model in ("faulty", "other", "sequences", "parent"):
        site.wait_for(lambda model=model: site.state(model) == "READY", model)  # type: ignore[misc]
    assert site.post("faulty").status == 200 and site.post("other").status == 200
    assert site.is_healthy


def test_a_zygote_without_descriptors_lives_on_and_forks_again(site: Site) -> None:
    zygote = site.zygote
    soft, hard = resource.prlimit(zygote.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(zygote.pid, resource.RLIMIT_NOFILE, (zygote.num_fds() + 2, hard))
    try:
        os.kill(site.pid("faulty"), signal.SIGKILL)
        site.wait_for(lambda: "open files" in site.describe("faulty").get("error", ""), "the error")
        assert site.post("other").status == 200  # its worker is alive
    finally:
        resource.prlimit(zygote.pid, resource.RLIMIT_NOFILE, (soft, hard))
    site.wait_until_ready("faulty")
    assert site.zygote.pid == zygote.pid


def test_a_server_without_descriptors_has_its_workers_again_once_there_are_some(site: Site) -> None:
    server = site.process
    before = server.num_fds()
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    with site.client("management") as management:  # connections that are there stay
        assert management.ask("GET", "/models/faulty").status == 200
        pid = site.pid("faulty")
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (20, hard))
        try:
            os.kill(pid, signal.SIGKILL)
            while True:
                described = management.ask("GET", "/models/faulty").json[0]
                if "open files" in described.get("error", ""):
                    break
        finally:
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
    site.wait_until_ready("faulty")
    site.wait_for(lambda: server.num_fds() <= before, "as many descriptors as before")


def test_a_cache_that_was_removed_is_unpacked_again(site: Site) -> None:
    shutil.rmtree(site.folder / "cache")
    for model in ("faulty", "other"):
        os.kill(site.pid(model), signal.SIGKILL)
    for model in ("faulty", "other"):
        site.wait_until_ready(model)
        assert site.post(model).body == f"of {model}".encode()


def test_a_cache_and_an_archive_that_were_removed_are_named_until_the_archive_is_back(site: Site) -> None:
    archive = site.store / "faulty.mar"
    archive.rename(site.folder / "away.mar")
    shutil.rmtree(site.folder / "cache")
    os.kill(site.pid("faulty"), signal.SIGKILL)
    site.wait_for(lambda: "faulty.mar" in site.describe("faulty").get("error", ""), "the error")
    assert "put it back" in site.describe("faulty")["error"]
    shutil.copy(site.folder / "away.mar", archive)
    site.wait_until_ready("faulty")


def test_a_file_that_was_cleared_from_a_models_folder_is_put_back(site: Site) -> None:
    (words,) = [each for each in (site.folder / "cache/models").glob("*/words.txt") if each.read_text() == "of faulty"]
    words.unlink()
    os.kill(site.pid("faulty"), signal.SIGKILL)
    site.wait_until_ready("faulty")
    assert words.read_text() == "of faulty" == site.post("faulty").body.decode()


@pytest.mark.parametrize("end", ["worker", "zygote", "scale", "server"])
def test_what_a_handler_has_started_ends_with_its_worker(site: Site, end: str) -> None:
    foreign = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    try:
        started = site.post("parent").json
        assert all(psutil.pid_exists(pid) for pid in started["pids"]), started
        if end == "worker":
            os.kill(started["worker"], signal.SIGKILL)
        elif end == "zygote":
            site.zygote.kill()
        elif end == "server":
            site.kill_server_process()
            site.wait_for_server()
        else:
            site.manage("PUT", "/models/parent?min_worker=0&max_worker=0&synchronous=true")
        site.wait_for(lambda: all(map(has_gone, [started["worker"], *started["pids"]])), "the end of all")
        assert foreign.poll() is None
        assert not [each for each in site.zygote.children() if each.status() == psutil.STATUS_ZOMBIE]
    finally:
        foreign.kill()
        foreign.wait()
    site.manage("PUT", "/models/parent?min_worker=1&synchronous=true")
    site.wait_until_ready("parent")


def test_a_server_that_is_started_again_while_faults_last_has_its_models_once_they_are_over(site: Site) -> None:
    archive = site.store / "other.mar"
    archive.rename(site.folder / "away.mar")
    site.fault("faulty", "exit")
    site.kill_server_process()
    site.wait_for_server()
    site.wait_for(lambda: "exit code 3" in site.describe("faulty").get("error", ""), "the error")
    ready = site.ask("GET", "/ready")
    assert ready.status == 503 and {"faulty", "other"} <= set(ready.json["models"])
    assert "other.mar" in ready.json["models"]["other"]["error"]
    site.fault("faulty", "")
    shutil.copy(site.folder / "away.mar", archive)
    for model in ("faulty", "other"):
        site.wait_for(lambda model=model: site.post(model).body == f"of {model}".encode(), model)  # type: ignore[misc]
    assert site.is_healthy
    rows = site.describe("faulty")
    assert (rows["state"], rows["minWorkers"], len(rows["workers"])) == ("READY", 1, 1)


OPEN_FILES = 256
FEW_FILES = b"as many connections as the limit of open files allows"


def received(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except ConnectionError:
        return b""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Site]:
    """A server that may have few open files: a soft limit below the hard one, which is low too."""
    site = Site(tmp_path)
    (site.folder / "faults").mkdir()
    site.environment["FAULTS"] = str(site.folder / "faults")
    write_handler(site.store, "faulty", FAULTY, files={"words.txt": "of faulty"})
    started = subprocess.run(
        ["prlimit", f"--nofile={OPEN_FILES // 2}:{OPEN_FILES}", *site.arguments("start", "--models", "all")],
        env=site.environment, cwd=site.folder, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    with site:
        assert started.returncode == 0, started.stderr
        yield site


def test_connections_leave_descriptors_for_workers_and_the_operator(small: Site) -> None:
    limit = resource.RLIMIT_NOFILE
    assert resource.prlimit(small.process.pid, limit) == (OPEN_FILES, OPEN_FILES)  # raised by itself
    assert resource.prlimit(small.pid("faulty"), limit)[0] == OPEN_FILES // 2  # as handlers know it
    small.wait_for_log(f"this process may have {OPEN_FILES} open files")
    before = small.process.num_fds()
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(small.connect()) for _ in range(OPEN_FILES)]
        # The first that are too many are told so, the others are only let go of.
        told = [each for each in select.select(clients, [], [], LIMIT_S)[0] if FEW_FILES in received(each)]
        assert told and clients[0] not in told
        pid = small.pid("faulty")  # the operator is let in
        assert small.process.num_fds() > OPEN_FILES // 2
        os.kill(pid, signal.SIGKILL)
        with small.client("management") as management:
            while True:
                (row,) = management.ask("GET", "/models/faulty").json[0]["workers"]
                if row["status"] == "READY" and row["pid"] != pid:
                    break
    small.wait_until_ready("faulty")
    assert "Errno 24" not in small.log()
    small.wait_for(lambda: small.process.num_fds() <= before, "as many descriptors as before")
