"""What systemd is told, and the sockets that it passes: with a socket of ours in its place, and its own activator."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve.config.address import Address
from pyserve.errors import ConfigError
from pyserve.server.passed_sockets import PassedSockets
from pyserve.server.systemd import Systemd
from tests.server.test_supervisor import LIMIT_S, Tree, answer_of, read_until
from tests.server.test_upgrade import Upgraded
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import ROOT, Server

ACTIVATED = [sys.executable, str(ROOT / "tests/support/services/socket_activated.py")]
PING = b"GET /ping HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Upgraded]:
    made = Upgraded(tmp_path)
    yield made
    made.kill()


class Manager:
    """In the place of a service manager."""

    def __init__(self, address: str):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(LIMIT_S)

    def heard(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().splitlines())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    yield made
    made.close()


@pytest.mark.server
def test_it_hears_of_readiness_upgrades_and_the_end(tree: Upgraded, manager: Manager) -> None:
    with tree.foreground(NOTIFY_SOCKET=str(tree.folder / "notify")) as popen:
        read_until(popen, "Model server started.")
        assert manager.heard() == {"READY": "1", "STATUS": "serving"}
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{tree.ask()['pid']}/environ").read_bytes()
        for _ in range(2):
            assert tree.run("upgrade").returncode == 0
            reloading = manager.heard()
            assert reloading["RELOADING"] == "1" and int(reloading["MONOTONIC_USEC"]) > 0
            assert manager.heard()["READY"] == "1"
        tree.succeed_with("fail")
        assert tree.run("upgrade").returncode == 1
        assert manager.heard()["RELOADING"] == "1"
        assert manager.heard() == {"READY": "1", "STATUS": "serving; an upgrade failed"}
        os.kill(popen.pid, signal.SIGTERM)
        assert manager.heard()["STOPPING"] == "1"
        popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 0


@pytest.mark.server
def test_the_watchdog_is_fed_from_the_loop(tree: Upgraded, manager: Manager) -> None:
    with tree.foreground(NOTIFY_SOCKET=str(tree.folder / "notify"), WATCHDOG_USEC="200000") as popen:
        heard = [manager.heard() for _ in range(6)]
        assert [each for each in heard if each != {"WATCHDOG": "1"}] in ([], [{"READY": "1", "STATUS": "serving"}])
        os.kill(popen.pid, signal.SIGSTOP)  # a supervisor that hangs says nothing
        while True:
            manager._socket.settimeout(1.0)
            try:
                manager.heard()
            except TimeoutError:
                break
        os.kill(popen.pid, signal.SIGCONT)
        popen.terminate()
        popen.communicate(timeout=LIMIT_S)


def test_abstract_addresses_and_nobody_there() -> None:
    name = f"pyserve-test-{os.getpid()}"
    manager = Manager("\0" + name)
    Systemd("@" + name).ready()
    assert manager.heard()["READY"] == "1"
    manager.close()
    Systemd("@" + name).ready()
    Systemd("/nowhere/notify").stopping()
    quiet = Systemd("", watchdog_s=0.1)
    quiet.look()
    assert quiet.deadline is None


@pytest.mark.server
@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is not installed")
def test_the_first_client_of_systemds_own_activator_is_answered(tree: Tree) -> None:
    port = free_port()
    command = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=inference",
               *(f"-E{name}={value}" for name, value in tree.environment.items()),
               *tree.arguments("start", "--foreground")]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tree.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as popen:
        read_until(popen, "Listening on")
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
            client.sendall(PING)
            assert answer_of(client)["sockets"] == ["inference", "management", "metrics"]
        assert tree.running.addresses["inference"] == f"http://127.0.0.1:{port}"
        popen.terminate()
        popen.communicate(timeout=LIMIT_S)


@pytest.mark.server
@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_clients_wait_in_a_passed_socket_from_one_start_to_the_next(tmp_path: Path, front_ends: str) -> None:
    server = Server(tmp_path)
    write_handler(server.store, "echo", "def handle(data, context): return data and [bytes(r['body']) for r in data]")
    ours = socket.create_server(("127.0.0.1", 0), backlog=64)
    fd, where = ours.fileno(), ours.getsockname()
    start = server.arguments("start", "--foreground", "--models", "echo.mar", "--front-ends", front_ends)
    command = [*ACTIVATED, "inference", str(fd), *start]
    ask = b"POST /predictions/echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    for _ in range(2):
        with socket.create_connection(where, timeout=LIMIT_S) as early:  # there is no server yet, or no more
            early.sendall(ask)
            with subprocess.Popen(command, env=server.environment, cwd=tmp_path, pass_fds=[fd],
                                  stdout=subprocess.DEVNULL, stderr=(tmp_path / "log").open("a")) as popen:  # fmt: skip
                try:
                    answer = b"".join(iter(lambda client=early: client.recv(4096), b""))  # type: ignore[misc]
                    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"hi"), answer
                    assert server.run("upgrade").returncode == 0, (tmp_path / "log").read_text()
                    assert server.run("stop").returncode == 0
                    assert popen.wait(LIMIT_S) == 0
                finally:
                    popen.kill()
    ours.close()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def test_sockets_are_taken_by_name_or_by_address(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    elsewhere, there = Address("127.0.0.1", 1, is_tls=True), Address("127.0.0.1", port)
    taken = PassedSockets([("inference", listening)]).take("inference", elsewhere)
    assert taken == (listening, Address("127.0.0.1", port, is_tls=True))
    passed = PassedSockets([("pyserve.socket", listening)])
    assert passed.take("inference", elsewhere) is None
    assert passed.take("management", there) == (listening, there)
    passed.check_all_taken([])
    with pytest.raises(ConfigError, match=r"which is none of ours .*FileDescriptorName= inference, management or"):
        PassedSockets([("web", listening)]).check_all_taken([there])


@pytest.mark.server
def test_what_is_no_listening_socket_is_named(tree: Tree, tmp_path: Path) -> None:
    with socket.socket() as sock:
        command = [*ACTIVATED, "inference", str(sock.fileno()), *tree.arguments("start", "--foreground")]
        started = subprocess.run(command, env=tree.environment, cwd=tmp_path, pass_fds=[sock.fileno()], text=True,
                                 capture_output=True, timeout=LIMIT_S, check=False)  # fmt: skip
    assert started.returncode == 1
    assert started.stderr.splitlines()[-1].startswith("pyserve: error: descriptor 3, which the service manager has")
