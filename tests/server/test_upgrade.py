"""`pyserve upgrade` with a fake server: each step, and what becomes of the old server when one goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve import __version__, launch
from pyserve.server import control
from pyserve.server.listeners import Listeners
from tests.server.test_supervisor import LIMIT_S, Tree, config_with, read_until, wait_until_gone

pytestmark = pytest.mark.server

FAKE_SERVER = [sys.executable, str(Path(__file__).parents[1] / "support/services/fake_server.py")]


class Upgraded(Tree):
    """A tree whose next server behaves as a file says."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._behaviour = folder / "successor"
        self.environment["FAKE_SUCCESSOR"] = str(self._behaviour)
        self.succeed_with("")

    def succeed_with(self, behaviour: str) -> None:
        self._behaviour.write_text(behaviour)

    def begun(self) -> subprocess.Popen[str]:
        """An upgrade that has begun."""
        return subprocess.Popen(
            self.arguments("upgrade"), env=self.environment, cwd=self.folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Upgraded]:
    made = Upgraded(tmp_path)
    yield made
    made.kill()


def wait_for_log(tree: Upgraded, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in tree.log():
        assert time.monotonic() < deadline, tree.log()
        time.sleep(0.02)


def test_another_server_serves_under_the_same_supervisor_process(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    before, old = tree.running, tree.ask()
    for _ in range(2):  # the second by what the first has made of the supervisor
        upgraded = tree.run("upgrade")
        assert upgraded.returncode == 0, upgraded.stderr + tree.log()
        assert upgraded.stdout == f"pyserve {__version__} serves (pid {before.pid})\n"
        new = tree.ask()
        assert new["pid"] != old["pid"] and new["sockets"] == old["sockets"]
        assert not Path(f"/proc/{old['pid']}").exists()
        old = new
    assert tree.running == before
    words = Path(f"/proc/{before.pid}/cmdline").read_bytes().split(b"\0")
    assert b"pyserve.server.supervise" in words
    assert "READY" in tree.run("status").stdout
    # What it has become still does what supervisors do.
    os.kill(int(str(new["pid"])), signal.SIGKILL)
    assert tree.ask()["pid"] != new["pid"]
    assert "restarting (1)" in tree.log()
    supervisor = os.pidfd_open(before.pid)
    assert tree.run("stop").returncode == 0
    wait_until_gone(supervisor)
    assert not tree.pid_path.exists()
    assert list(tree.folder.glob("pyserve-*")) == list((tree.folder / "state/pyserve").iterdir()) == []


def test_in_the_foreground_the_terminal_keeps_its_process(tree: Upgraded) -> None:
    with tree.foreground() as popen:
        read_until(popen, "Model server started.")
        assert tree.run("upgrade").returncode == 0
        os.killpg(popen.pid, signal.SIGINT)
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 0, rest
    assert "this is the supervisor of pyserve" in rest and "SIGINT: draining" in rest
    assert not tree.pid_path.exists()


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "the new server cannot serve: m.mar: the weights do not fit the model file"),
        ("crash", "the new server ended with exit code 1; the log has the reason"),
        ("failed_model", "cannot serve bad 1.0, which the old one serves: bad.mar: no MAR-INF/MANIFEST.json"),
        ("other_version", "the new server has no m 1.0, which the old one has: the archive's file has changed since"),
    ],
)
def test_one_that_cannot_serve_leaves_the_old_one_and_says_why(tree: Upgraded, behaviour: str, reason: str) -> None:
    assert tree.run("start").returncode == 0
    before, old = tree.running, tree.ask()
    tree.succeed_with(behaviour)
    upgraded = tree.run("upgrade")
    assert upgraded.returncode == 1
    last = upgraded.stderr.splitlines()[-1]
    assert last.startswith("pyserve: error: ") and reason in last and last.endswith("was left as it was")
    assert (tree.running, tree.ask()["pid"]) == (before, old["pid"])
    tree.succeed_with("")
    assert tree.run("upgrade").returncode == 0
    assert tree.ask()["pid"] != old["pid"]
    orders = [line for line in tree.log().splitlines() if line.startswith("order: ")]
    assert orders == ["order: hold", "order: release", "order: hold", "order: give way"]
    assert tree.run("stop").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_upgrade_whose_command_ends_is_taken_back(tree: Upgraded, number: signal.Signals) -> None:
    assert tree.run("start").returncode == 0
    old = tree.ask()
    tree.succeed_with("slow")
    with tree.begun() as popen:
        read_until(popen, "a new server loads")
        second = tree.run("upgrade")
        assert second.returncode == 1
        assert "an upgrade is in progress already; try again when it is over" in second.stderr
        popen.send_signal(number)
        popen.communicate(timeout=LIMIT_S)
    tree.succeed_with("")
    assert tree.run("upgrade").returncode == 0
    assert tree.ask()["pid"] != old["pid"]
    assert "the command that asked for it has gone; the old server continues" in tree.log()
    assert tree.run("stop").returncode == 0


def test_an_upgrade_ends_also_without_its_command_and_its_folder(tree: Upgraded) -> None:
    elsewhere = tree.folder / "elsewhere"
    elsewhere.mkdir()
    start = [*tree.arguments("start"), "--strict"]
    subprocess.run(start, env=tree.environment, cwd=elsewhere, check=True, timeout=LIMIT_S, capture_output=True)
    elsewhere.rmdir()
    old = tree.ask()
    with tree.begun() as popen:
        read_until(popen, "the new server serves")
        popen.kill()
        popen.communicate(timeout=LIMIT_S)
    wait_for_log(tree, "this is the supervisor of pyserve")
    assert tree.ask()["pid"] != old["pid"]
    assert tree.run("stop").returncode == 0


def test_a_command_that_ends_while_the_new_server_begins_to_accept_costs_no_request(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    old = tree.ask()
    tree.succeed_with("late")
    with tree.begun() as popen:
        read_until(popen, "begins to accept")
        popen.send_signal(signal.SIGINT)
        popen.communicate(timeout=LIMIT_S)
    tree.succeed_with("")
    wait_for_log(tree, "this is the supervisor of pyserve")
    assert "the old server continues" not in tree.log(), tree.log()
    assert tree.ask()["pid"] != old["pid"]
    assert tree.run("stop").returncode == 0


@pytest.mark.parametrize(("behaviour", "step", "accept_both"), [
    ("mute", "a new server loads", False),
    ("late", "begins to accept", True),
])  # fmt: skip
def test_a_stop_ends_an_upgrade(tree: Upgraded, behaviour: str, step: str, accept_both: bool) -> None:
    assert tree.run("start").returncode == 0
    supervisor = os.pidfd_open(tree.running.pid)
    tree.succeed_with(behaviour)
    with tree.begun() as popen:
        read_until(popen, step)
        assert tree.run("stop").returncode == 0
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1 and "pyserve is being stopped" in rest
    wait_until_gone(supervisor)
    if accept_both:  # and are drained
        assert tree.log().count("SIGTERM 1") == 2 and "SIGKILL" not in tree.log(), tree.log()


def test_a_new_server_that_begins_to_accept_takes_the_place_of_one_that_dies(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    old = tree.ask()
    tree.succeed_with("late")
    with tree.begun() as popen:
        read_until(popen, "begins to accept")
        os.kill(int(str(old["pid"])), signal.SIGKILL)
        wait_for_log(tree, "takes its place")
        tree.succeed_with("")
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 0, rest + tree.log()
    assert tree.ask()["pid"] != old["pid"] and "restarting" not in tree.log()
    assert tree.run("stop").returncode == 0


def test_where_both_servers_die_another_one_is_started(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    tree.succeed_with("late")
    with tree.begun() as popen:
        read_until(popen, "begins to accept")
        os.kill(int(str(tree.ask()["pid"])), signal.SIGKILL)
        wait_for_log(tree, "takes its place")
        os.kill(int(tree.log().rpartition("new server started (pid ")[2].partition(")")[0]), signal.SIGKILL)
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1 and "the new server was killed by SIGKILL" in rest
    assert tree.ask()["restart"] == 1
    assert tree.run("stop").returncode == 0


def test_an_old_server_that_dies_meanwhile_is_started_again(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    old = tree.ask()
    tree.succeed_with("slow")
    with tree.begun() as popen:
        read_until(popen, "a new server loads")
        os.kill(int(str(old["pid"])), signal.SIGKILL)
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1 and "the server that was to be replaced was killed by SIGKILL" in rest
    assert tree.ask()["restart"] == 1
    assert tree.run("stop").returncode == 0


def test_a_new_server_that_dies_before_the_supervisor_is_exchanged_is_started_again(tree: Upgraded) -> None:
    tree.environment["FAKE_SERVER"] = "fail_again"
    assert tree.run("start").returncode == 0
    script = tree.folder / "build.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom pyserve.server import supervise\n"
        f"folder = Path({str(tree.folder)!r})\n"
        "if (folder / 'first').exists():\n"
        "    (folder / 'second').touch()\n"
        "    while not (folder / 'go').exists():\n        time.sleep(0.01)\n"
        "(folder / 'first').touch()\nsys.exit(supervise.main())\n"
    )
    with control.connect(tree.running.control) as sock:
        program = launch.Program.own()._replace(supervisor=[sys.executable, str(script)], server=FAKE_SERVER)._asdict()
        sock.sendall(json.dumps({"do": "upgrade", "program": program}).encode() + b"\n")
        wait_for_file(tree.folder / "second")
        os.kill(int(str(tree.ask()["pid"])), signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while "restarting in" not in tree.log():  # there is no server until then
            assert time.monotonic() < deadline, tree.log()
            time.sleep(0.01)
        (tree.folder / "go").touch()
        events = [json.loads(line) for line in sock.makefile()]
    assert events[-1]["event"] == "upgraded" and not events[-1].get("note"), tree.log()
    assert tree.ask()["restart"] == 3
    assert tree.run("stop").returncode == 0


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("gone", ["server", "supervisor"])
def test_a_build_that_cannot_be_started_leaves_the_old_one(tree: Upgraded, gone: str) -> None:
    assert tree.run("start").returncode == 0
    old = tree.ask()
    commands = {gone: ["/nowhere/python"], "version": "9"}
    with control.connect(tree.running.control) as sock:
        program = launch.Program.own()._replace(**commands)._asdict()
        sock.sendall(json.dumps({"do": "upgrade", "program": program}).encode() + b"\n")
        events = [json.loads(line) for line in sock.makefile()]
    assert events[-1]["event"] == "failed" and "there is no such file or folder" in events[-1]["reason"]
    assert tree.ask()["pid"] == old["pid"]
    assert tree.run("stop").returncode == 0


def test_a_build_whose_supervisor_cannot_be_imported_is_named(tree: Upgraded) -> None:
    assert tree.run("start").returncode == 0
    with control.connect(tree.running.control) as sock:
        program = launch.Program.own()._replace(supervisor=[sys.executable, "-c", "import no_such_module"])._asdict()
        sock.sendall(json.dumps({"do": "upgrade", "program": program}).encode() + b"\n")
        events = [json.loads(line) for line in sock.makefile()]
    assert events[-1]["reason"] == (
        "the new build's supervisor cannot continue: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert tree.run("stop").returncode == 0


@pytest.mark.parametrize(
    "request_", [b"\n", b"[]\n", b'{"do": "upgrade"}\n', b'{"program": {"server": 1}}\n', b"[" * 9999 + b"\n"]
)
def test_rubbish_is_refused(tree: Upgraded, request_: bytes) -> None:
    assert tree.run("start").returncode == 0
    with control.connect(tree.running.control) as silent, control.connect(tree.running.control) as sock:
        sock.sendall(request_)
        events = [json.loads(line) for line in sock.makefile()]
        assert [event["event"] for event in events] == ["failed"]
        assert "no request for an upgrade" in events[0]["reason"]
        silent.close()
    assert tree.run("upgrade").returncode == 0
    assert tree.run("stop").returncode == 0


def test_without_a_server(tree: Upgraded) -> None:
    upgraded = tree.run("upgrade")
    assert (upgraded.returncode, upgraded.stdout) == (1, "pyserve is not currently running.\n")


def test_sockets_are_handed_on(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    config.front_ends = 2
    listeners = Listeners.open(config)
    try:
        handed = json.loads(json.dumps(listeners.to_json()))
        fds = {fd: os.dup(fd) for fd in listeners.descriptors}  # as if they were another process's
        handed["sockets"] = {name: fds[fd] for name, fd in handed["sockets"].items()}
        handed["copies"] = [[fds[fd], [fds[each] for each in copies]] for fd, copies in handed["copies"]]
        again = Listeners.adopt(handed)
        assert again.addresses == listeners.addresses
        for number in range(2):
            there, here = again.of_front_end(number), listeners.of_front_end(number)
            assert {name: each.getsockname() for name, each in there.items()} == {
                name: each.getsockname() for name, each in here.items()
            }
        assert not any(os.get_inheritable(fd) for fd in again.descriptors)
        again.release()
        with socket.create_connection(listeners.sockets["inference"].getsockname(), timeout=LIMIT_S):
            pass
    finally:
        listeners.close()
