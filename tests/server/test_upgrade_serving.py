"""A real server is upgraded while clients ask it all the time: none of them notices."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.handler_archives import write_handler
from tests.support.serving import LIMIT_S, ROOT, Server
from tests.support.serving_models import write_linear
from tests.support.steady_load import ECHO, SteadyLoad

pytestmark = pytest.mark.server

SLOW = """
import os, time

def handle(data, context):
    if data is None:
        return None
    path = bytes(data[0].get("body")).decode()
    open(path + ".begun", "w").close()
    while not os.path.exists(path):
        time.sleep(0.01)
    return [b"done"] * len(data)
"""
PATH = "/predictions/echo"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.environment["PYSERVE_DRAIN_DELAY_S"] = "1"
    write_linear(made.store, "linear")
    write_handler(made.store, "echo", ECHO)
    yield made
    made.run("stop")
    made.kill()


def other_build(folder: Path, version: str) -> Path:
    """A copy of this build that says another version."""
    shutil.copytree(ROOT / "pyserve", folder / "pyserve", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in (ROOT / "pyserve").glob("*.so"):
        (folder / "pyserve" / library.name).symlink_to(library)
    init = folder / "pyserve/__init__.py"
    init.write_text(re.sub('__version__ = ".*"', f'__version__ = "{version}"', init.read_text()))
    return folder


def upgrade_to(server: Server, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyserve", "upgrade", "--pid-file", str(server.pid_path)],
        env=server.environment | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def loaded_on(load: SteadyLoad) -> None:
    """Returns when clients were answered a hundred times more."""
    before = load.count
    wait_until(lambda: load.count >= before + 100 or len(load.answers) > 1, "a hundred answers")


@pytest.mark.parametrize("front_ends", [1, 2])
def test_no_request_is_lost_and_all_is_as_it_was(server: Server, tmp_path: Path, front_ends: int) -> None:
    server.start("--models", "echo.mar", "--front-ends", str(front_ends))
    server.manage("POST", "/models?url=linear.mar&model_name=mine&initial_workers=2&batch_size=4")
    server.manage("PUT", "/models/echo?min_worker=2&synchronous=true")
    before = server.running
    old, old_fronts = server.process, server.front_ends
    with SteadyLoad(server.address(), PATH) as load:
        loaded_on(load)
        upgraded = upgrade_to(server, other_build(tmp_path / "next", "7.7.7"))
        assert upgraded.returncode == 0, upgraded.stderr + server.log()
        assert upgraded.stdout == f"pyserve 7.7.7 serves (pid {before.pid})\n"
        loaded_on(load)
        second = upgrade_to(server, ROOT)
        assert second.returncode == 0, second.stderr + server.log()
        loaded_on(load)
    assert set(load.answers) == {"200"}, load.answers
    assert load.closed > 0  # those that were kept learned of it by an answer
    assert server.running == before
    assert not old.is_running() and not any(each.is_running() for each in old_fronts)
    assert len(server.front_ends) == (front_ends if front_ends > 1 else 0)
    assert {name: server.describe(name)["minWorkers"] for name in ("echo", "mine")} == {"echo": 2, "mine": 2}
    assert server.describe("mine")["batchSize"] == 4
    assert server.describe("echo")["loadedAtStartup"] and not server.describe("mine")["loadedAtStartup"]
    # What a restart needs is the new server's by now.
    server.manage("DELETE", "/models/mine")
    server.kill_server_process()
    wait_until(lambda: server.ask("GET", "/models", port="management").status == 200, "the next server")
    assert [each["modelName"] for each in server.manage("GET", "/models")["models"]] == ["echo"]


def test_unix_sockets_stay(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "inference.sock"
    server.start("--models", "echo.mar", "--inference-address", f"unix:{path}")
    inode = path.stat().st_ino
    with SteadyLoad(str(path), PATH) as load:
        loaded_on(load)
        upgraded = server.run("upgrade")
        assert upgraded.returncode == 0, upgraded.stderr + server.log()
        loaded_on(load)
    assert set(load.answers) == {"200"}, load.answers
    assert path.stat().st_ino == inode
    assert server.run("stop").returncode == 0
    assert not path.exists()


def test_a_long_request_is_answered_by_the_old_server_and_changes_wait(server: Server, tmp_path: Path) -> None:
    write_handler(server.store, "slow", SLOW)
    server.start("--models", "echo.mar", "slow.mar")
    old = server.process.pid
    gate = tmp_path / "gate"
    with server.client() as waiting, server.client("management") as managing:
        waiting._connection.request("POST", "/predictions/slow", str(gate).encode(), {"Content-Type": "a/b"})
        wait_until(gate.with_name("gate.begun").exists, "the request to begin")
        with subprocess.Popen(server.arguments("upgrade"), env=server.environment, cwd=server.folder) as upgrading:
            refused = managing.ask("PUT", "/models/echo?batch_size=2")
            while refused.status == 202:  # it has not come as far
                refused = managing.ask("PUT", "/models/echo?batch_size=2")
            assert refused.status == 503 and refused.headers["retry-after"] == "5", refused.body
            assert refused.detail["reason"] == "upgrade"
            assert managing.ask("GET", "/models/echo").status == 200
            wait_until(lambda: "the new server serves" in server.log(), "the new server")
            assert server.ask("POST", PATH, b"x").body == b"x"
            assert server.manage("PUT", "/models/echo?batch_size=3")
            assert psutil.pid_exists(old)
            gate.touch()
            answer = waiting._connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"done")
            assert upgrading.wait(LIMIT_S) == 0
    assert server.describe("echo")["batchSize"] == 3


def test_a_build_that_cannot_load_a_model_leaves_the_old_one_and_changes_are_taken(server: Server) -> None:
    server.start("--models", "all")
    old = server.process.pid
    away = server.store.with_name("away")
    os.rename(server.store / "linear.mar", away)
    with SteadyLoad(server.address(), PATH) as load:
        failed = server.run("upgrade")
        assert failed.returncode == 1
        assert "linear" in failed.stderr.splitlines()[-1] and "was left as it was" in failed.stderr, failed.stderr
        loaded_on(load)
    assert set(load.answers) == {"200"}, load.answers
    assert server.process.pid == old
    os.rename(away, server.store / "linear.mar")
    server.manage("PUT", "/models/echo?batch_size=2")
    assert server.run("upgrade").returncode == 0
    assert server.describe("echo")["batchSize"] == 2 and server.predict("linear", [1.0, 2.0, 3.0, 4.0]).status == 200


def test_a_file_that_has_another_version_now_leaves_the_old_one(server: Server, tmp_path: Path) -> None:
    server.start("--models", "echo.mar")
    server.manage("POST", "/models?url=linear.mar&model_name=mine&initial_workers=1")
    write_linear(tmp_path, "linear", version="2.0")
    os.replace(tmp_path / "linear.mar", server.store / "linear.mar")
    upgraded = server.run("upgrade")
    assert upgraded.returncode == 1 and "has no mine 1.0, which the old one has" in upgraded.stderr, upgraded.stderr
    assert server.describe("mine")["modelVersion"] == "1.0"


def test_a_file_that_was_replaced_by_another_of_its_version_is_loaded_and_said(server: Server, tmp_path: Path) -> None:
    server.start("--models", "linear.mar", "echo.mar")
    before = server.predict("linear", [1.0, 2.0, 3.0, 4.0]).json
    assert server.run("upgrade").stderr.count("has changed since") == 0
    write_linear(tmp_path, "linear", seed=5)
    os.replace(tmp_path / "linear.mar", server.store / "linear.mar")
    upgraded = server.run("upgrade")
    assert upgraded.returncode == 0, upgraded.stderr
    said = "linear 1.0: linear.mar has changed since it was loaded"
    assert f"pyserve: warning: {said}" in upgraded.stderr and said in server.log()
    assert upgraded.stderr.count("has changed since") == 1
    assert server.predict("linear", [1.0, 2.0, 3.0, 4.0]).json != before


def test_a_broken_build_leaves_the_old_one(server: Server, tmp_path: Path) -> None:
    server.start("--models", "echo.mar")
    old = server.process.pid
    broken = other_build(tmp_path / "next", "7.7.8")
    (broken / "pyserve/server/server.py").write_text("raise ImportError('half a build')")
    failed = upgrade_to(server, broken)
    assert failed.returncode == 1
    assert "half a build" in failed.stderr.splitlines()[-1], failed.stderr
    assert server.process.pid == old and server.ask("POST", PATH, b"x").body == b"x"


def test_keys_stay(server: Server) -> None:
    server.start("--models", "echo.mar", "--management-address", "http://0.0.0.0:0")
    key = server.key()
    assert server.ask("GET", "/models", headers=key, port="management").status == 200
    assert server.run("upgrade").returncode == 0
    assert server.key() == key
    assert server.ask("GET", "/models", headers=key, port="management").status == 200
    assert server.ask("GET", "/models", port="management").status == 401
    assert server.run("stop").returncode == 0
    assert not (server.folder / "key_file.json").exists()


def test_a_stop_while_the_old_server_drains_loses_nothing(server: Server, tmp_path: Path) -> None:
    write_handler(server.store, "slow", SLOW)
    server.start("--models", "slow.mar")
    gate, pid = tmp_path / "gate", server.running.pid
    with server.client() as waiting:
        waiting._connection.request("POST", "/predictions/slow", str(gate).encode(), {"Content-Type": "a/b"})
        wait_until(gate.with_name("gate.begun").exists, "the request to begin")
        with subprocess.Popen(server.arguments("upgrade"), env=server.environment, cwd=server.folder) as upgrading:
            wait_until(lambda: "the new server serves" in server.log(), "the new server")
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: "SIGTERM: draining" in server.log(), "the stop")
            gate.touch()
            answer = waiting._connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"done")
            upgrading.wait(LIMIT_S)
    wait_until(lambda: not psutil.pid_exists(pid), "the end")


def test_a_stop_in_the_moment_when_the_new_server_begins_to_accept_loses_nothing(
    server: Server, tmp_path: Path
) -> None:
    write_handler(server.store, "slow", SLOW)
    server.start("--models", "slow.mar")
    gate, accepts, hold = (tmp_path / name for name in ("gate", "accepts", "hold"))
    build = other_build(tmp_path / "next", "7.7.9")
    program = build / "pyserve/server/main.py"
    report = "        start.report.ready(**await server.report())\n"
    before, after = program.read_text().split(report)
    waits = f"        open({str(accepts)!r}, 'w').close()\n        while not os.path.exists({str(hold)!r}):\n"
    program.write_text(f"{before}{waits}            await asyncio.sleep(0.01)\n{report}{after}")
    pid, old = server.running.pid, server.process
    arguments = [sys.executable, "-m", "pyserve", "upgrade", "--pid-file", str(server.pid_path)]
    environment = server.environment | {"PYTHONPATH": str(build)}
    with server.client() as waiting, subprocess.Popen(arguments, env=environment, cwd=build) as upgrading:
        wait_until(accepts.exists, "the new server to accept")
        old.suspend()  # so that the new one takes it
        waiting._connection.request("POST", "/predictions/slow", str(gate).encode(), {"Content-Type": "a/b"})
        wait_until(gate.with_name("gate.begun").exists, "the request to begin")
        old.resume()
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: "SIGTERM: draining" in server.log(), "the stop")
        hold.touch()
        gate.touch()
        answer = waiting._connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"done"), server.log()
        assert upgrading.wait(LIMIT_S) == 1
    wait_until(lambda: not psutil.pid_exists(pid), "the end")


def test_grpc_keeps_its_port_and_health_stays_on(server: Server) -> None:
    grpc = pytest.importorskip("grpc")
    from tests.support.grpc_calls import stub

    server.start("--models", "echo.mar", "--grpc", "true")
    address = server.grpc()
    ends, ended, again, health = threading.Event(), Counter[str](), Counter[str](), Counter[int]()
    policy = re.search(r"```json\n(.*?)```", (ROOT / "docs/grpc.md").read_text(), re.DOTALL)
    assert policy is not None

    def call(ended: Counter[str], **options: Any) -> None:
        with stub(server, **options) as service:
            while not ends.is_set():
                try:
                    service.Predictions(model_name="echo", input={"body": b"x"})
                    ended["OK"] += 1
                except grpc.RpcError as error:
                    ended[error.code().name] += 1

    def call_again() -> None:
        call(again, **{"grpc.service_config": policy[1], "grpc.use_local_subchannel_pool": 1})

    def look() -> None:  # over connections that are kept as long as the server lets them
        while not ends.is_set():
            with server.client() as client:
                while not ends.is_set():
                    answer = client.ask("GET", "/ready")
                    health[answer.status] += 1
                    if answer.headers.get("connection") == "close":
                        break

    calls = [lambda: call(ended)] * 2 + [call_again] * 4
    threads = [threading.Thread(target=each) for each in (*calls, look)]
    for thread in threads:
        thread.start()
    try:
        assert server.run("upgrade").returncode == 0, server.log()
        before, before_again = ended["OK"], again["OK"]
        wait_until(lambda: ended["OK"] > before + 20 and again["OK"] > before_again + 20, "calls to the new server")
    finally:
        ends.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert server.grpc() == address
    assert health.keys() == {200}
    # What crosses the old server's GOAWAY.
    assert ended.keys() <= {"OK", "CANCELLED", "UNAVAILABLE"} and ended.total() - ended["OK"] <= 2 * len(threads), ended
    assert again.keys() == {"OK"}, again
