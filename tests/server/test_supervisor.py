"""The process tree, with a fake server: start, stop, status, crashes, signals, sockets and the pid file."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pyserve import launch
from pyserve.config.config import Config, load_config
from pyserve.errors import ConfigError, JsonObject
from pyserve.server import pid_file
from pyserve.server.kept_files import SharedMemory
from pyserve.server.listeners import Listeners
from pyserve.server.own_folder import PREFIX, OwnFolder
from pyserve.server.restarts import BACKOFF_MAX_S, NAMED_CAUSE_MAX_S, NamedCauses
from pyserve.server.supervisor import EXIT_FAILED, Supervisor
from tests.support.full_disk import in_full_disk
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "tests/support/services/pyserve_with_fake_server.py")]
LIMIT_S = 60.0


class Tree:
    """One pyserve with its own folder, ports and pid file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pid_path = folder / "pyserve.pid"
        self.store = folder / "store"
        self.store.mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LOG_LOCATION": str(folder / "logs"),
            "TMPDIR": str(folder),
            "XDG_STATE_HOME": str(folder / "state"),
        }
        self.environment.pop("XDG_RUNTIME_DIR", None)
        self.environment.pop("TS_CONFIG_FILE", None)

    def arguments(self, command: str, *more: str) -> list[str]:
        arguments = [*COMMAND, command, "--pid-file", str(self.pid_path)]
        if command == "start":
            arguments += ["--model-store", str(self.store)]
            for name in ("inference", "management", "metrics"):
                if f"--{name}-address" not in more:
                    arguments += [f"--{name}-address", "http://127.0.0.1:0"]
        return [*arguments, *more]

    def run(self, command: str, *more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command, *more),
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def foreground(self, **variables: str) -> AbstractContextManager[subprocess.Popen[str]]:
        return self._popen("--foreground", **variables)

    def background(self, **variables: str) -> AbstractContextManager[subprocess.Popen[str]]:
        return self._popen(**variables)

    @contextmanager
    def _popen(self, *more: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            self.arguments("start", *more),
            env=self.environment | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as popen:
            limit = threading.Timer(LIMIT_S, popen.kill)  # ends every wait for its output
            limit.start()
            try:
                yield popen
            finally:
                limit.cancel()
                popen.kill()

    @property
    def running(self) -> pid_file.RunningServer:
        running = pid_file.read(self.pid_path)
        assert running is not None, "no server is running"
        return running

    def connect(self, name: str = "inference") -> socket.socket:
        host, _, port = self.running.addresses[name].removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), timeout=LIMIT_S)

    def ask(self) -> dict[str, object]:
        with self.connect() as client:
            client.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
            return answer_of(client)

    def log(self) -> str:
        return (self.folder / "logs/pyserve.log").read_text()

    def kill(self) -> None:
        running = pid_file.read(self.pid_path)
        if running is not None:
            os.kill(running.pid, signal.SIGKILL)


def answer_of(client: socket.socket) -> dict[str, object]:
    answer = b""
    while chunk := client.recv(65536):
        answer += chunk
    body: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return body


def wait_until_gone(pidfd: int) -> None:
    try:
        assert select.select([pidfd], [], [], LIMIT_S)[0], "the process is still there"
    finally:
        os.close(pidfd)


def read_until(popen: subprocess.Popen[str], text: str) -> str:
    """Output lines up to the one with ``text``. The pipe ends, and so does this, when all writers are gone."""
    assert popen.stdout is not None
    seen = ""
    for line in popen.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} was never printed:\n{seen}")


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path)
    yield made
    made.kill()


server = pytest.mark.server


@server
def test_start_status_and_stop_in_the_background(tree: Tree) -> None:
    started = tree.run("start")
    assert started.returncode == 0, started.stderr
    lines = started.stdout.splitlines()
    assert lines[0] == f"log: {tree.folder / 'logs/pyserve.log'}"
    assert lines[1].split() == ["MODEL", "VERSION", "STATE", "WORKERS", "DEVICE", "BATCH", "URL"]
    assert lines[2].split() == ["m", "1.0", "READY", "1", "cpu", "4", "U"]
    assert lines[3].startswith("found in model store, not loaded: dog.mar (start with --models dog.mar or POST")
    assert lines[4] == "Model server started."
    assert lines[5].startswith("curl ")
    assert "m: reading weights 40/110 MB" in started.stderr
    assert tree.ask()["sockets"] == ["inference", "management", "metrics"]

    status = tree.run("status")
    assert status.returncode == 0, status.stderr
    assert f"pid {tree.running.pid}" in status.stdout
    assert ["m", "1.0", "READY", "2/2", "cpu", "4"] in [line.split()[:6] for line in status.stdout.splitlines()]

    supervisor = os.pidfd_open(tree.running.pid)
    stopped = tree.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "pyserve has stopped.\n")
    wait_until_gone(supervisor)
    assert not tree.pid_path.exists()
    assert list(tree.folder.glob("pyserve-*")) == list((tree.folder / "state/pyserve").iterdir()) == []


@pytest.mark.server
def test_stop_and_status_without_a_server(tree: Tree) -> None:
    stopped, status = tree.run("stop"), tree.run("status")
    assert (stopped.returncode, stopped.stdout) == (1, "pyserve is not currently running.\n")
    assert (status.returncode, status.stdout) == (3, "pyserve is not currently running.\n")


@server
def test_what_a_killed_supervisor_left_is_removed_at_the_next_start(tree: Tree) -> None:
    base = tree.folder / "state" / "pyserve"
    base.mkdir(parents=True)
    other = base / f"{PREFIX}other"  # a folder of that name that others could read is none of ours
    other.mkdir(mode=0o755)
    tree.run("start")
    (first,) = set(base.glob(f"{PREFIX}*")) - {other}
    supervisor = os.pidfd_open(tree.running.pid)
    tree.kill()
    wait_until_gone(supervisor)
    assert first.exists()
    started = tree.run("start")
    assert started.returncode == 0, started.stderr
    (second,) = set(base.glob(f"{PREFIX}*")) - {other}
    assert second != first
    OwnFolder(environ={"XDG_STATE_HOME": str(tree.folder / "state")}).remove()
    assert second.exists(), "its supervisor lives"
    assert tree.run("stop").returncode == 0
    assert list(base.glob(f"{PREFIX}*")) == [other]


@server
def test_interrupt_in_the_foreground_drains(tree: Tree) -> None:
    with tree.foreground() as popen:
        seen = read_until(popen, "Model server started.")
        assert "[INFO ] pyserve.supervisor - server ready" in seen
        os.killpg(popen.pid, signal.SIGINT)  # as a terminal sends Ctrl-C: to the whole foreground group
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 0, rest
    assert "SIGINT: draining" in rest
    assert rest.count("SIGINT 1") == 1  # not SIGTERM, at which the server would wait for load balancers
    assert "SIGINT 2" not in rest and "SIGTERM" not in rest
    assert not tree.pid_path.exists()


@server
def test_client_that_connects_while_the_server_is_dead_is_answered_by_the_next_one(tree: Tree) -> None:
    gate = tree.folder / "gate"
    os.mkfifo(gate)
    assert tree.run("start", FAKE_SERVER_GATE=str(gate)).returncode == 0
    before = tree.ask()
    first = os.pidfd_open(int(str(before["pid"])))
    signal.pidfd_send_signal(first, signal.SIGKILL)
    wait_until_gone(first)
    with tree.connect() as client:
        client.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n")
        with open(gate, "wb"):  # returns once the next server waits there
            pass
        after = answer_of(client)
    assert after["pid"] != before["pid"]
    assert (before["restart"], after["restart"]) == (0, 1)
    assert "server was killed by SIGKILL after" in tree.log()
    assert "restarting (1)" in tree.log()
    assert tree.run("stop").returncode == 0


@server
def test_killing_the_supervisor_takes_the_server_with_it(tree: Tree) -> None:
    assert tree.run("start").returncode == 0
    server_process = os.pidfd_open(int(str(tree.ask()["pid"])))
    os.kill(tree.running.pid, signal.SIGKILL)
    wait_until_gone(server_process)


@server
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "m.mar: the weights do not fit the model file"),
        ("crash", "the server never became ready in 3 attempts; the last one ended with exit code 1"),
    ],
)
def test_failed_start_says_why_and_leaves_nothing_running(tree: Tree, behaviour: str, reason: str) -> None:
    started = tree.run("start", FAKE_SERVER=behaviour)
    assert started.returncode == 1
    assert reason in started.stderr.splitlines()[-1]
    assert started.stderr.splitlines()[-1].startswith("pyserve: error: ")
    if behaviour == "crash":
        assert "Traceback: the fake server crashes" in started.stderr
    assert "Model server started." not in started.stdout
    assert not tree.pid_path.exists()


@server
@pytest.mark.parametrize("foreground", [False, True])
def test_failed_model_under_strict_stops_with_3(tree: Tree, foreground: bool) -> None:
    more = ["--strict", *(["--foreground"] if foreground else [])]
    started = tree.run("start", *more, FAKE_SERVER="failed_model")
    assert started.returncode == 3
    assert "bad.mar: no MAR-INF/MANIFEST.json" in started.stderr
    assert "Model server started." not in started.stdout
    assert not tree.pid_path.exists()


@server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_start_leaves_nothing_running(tree: Tree, number: signal.Signals) -> None:
    with tree.background(FAKE_SERVER="slow") as popen:
        read_until(popen, "reading weights")
        supervisor = os.pidfd_open(tree.running.pid)
        popen.send_signal(number)
        popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 130
    wait_until_gone(supervisor)
    assert not tree.pid_path.exists()


@server
def test_supervisor_that_dies_during_the_start_is_reported(tree: Tree) -> None:
    with tree.background(FAKE_SERVER="slow") as popen:
        read_until(popen, "reading weights")
        os.kill(tree.running.pid, signal.SIGKILL)
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1
    last = rest.splitlines()[-1]
    assert last == "pyserve: error: the supervisor was killed by SIGKILL before the server was ready"


@server
def test_stop_that_runs_out_of_time_says_so_and_a_second_one_ends_the_drain(tree: Tree) -> None:
    assert tree.run("start", FAKE_SERVER="stubborn").returncode == 0
    supervisor = os.pidfd_open(tree.running.pid)
    stopped = tree.run("stop", "--timeout", "0")
    assert stopped.returncode == 1
    assert "is still draining after 0 s; a second `pyserve stop` ends it at once" in stopped.stderr
    assert tree.run("stop").returncode == 0
    wait_until_gone(supervisor)


@server
def test_failed_model_is_shown_with_its_reason_beneath(tree: Tree) -> None:
    started = tree.run("start", FAKE_SERVER="failed_model")
    assert started.returncode == 0
    lines = started.stdout.splitlines()
    row = next(number for number, line in enumerate(lines) if line.startswith("bad"))
    assert "FAILED" in lines[row]
    assert lines[row + 1].strip() == "bad.mar: no MAR-INF/MANIFEST.json"
    assert tree.run("stop").returncode == 0


@server
def test_second_start_leaves_the_running_server_alone(tree: Tree) -> None:
    assert tree.run("start").returncode == 0
    pid, content = tree.ask()["pid"], tree.pid_path.read_bytes()
    again = tree.run("start")
    assert again.returncode == 1
    assert again.stderr == (
        f"pyserve: error: pyserve is already running (pid {tree.running.pid}, "
        f"{tree.running.addresses['inference']}); stop it with `pyserve stop`\n"
    )
    assert (tree.ask()["pid"], tree.pid_path.read_bytes()) == (pid, content)
    assert tree.run("stop").returncode == 0


@server
def test_port_in_use_names_the_owner_and_the_mend(tree: Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = tree.run("start", "--inference-address", f"http://127.0.0.1:{port}")
    assert started.returncode == 1
    error = started.stderr.splitlines()[-1]
    assert started.stderr.count("cannot listen") == 1, started.stderr
    assert f"inference_address (--inference-address): cannot listen on http://127.0.0.1:{port}" in error
    assert f"(pid {os.getpid()})" in error
    assert "choose another with inference_address in config.properties, or with `pyserve start --inf" in error
    assert not tree.pid_path.exists()


@server
def test_stale_pid_file_is_replaced(tree: Tree) -> None:
    started = pid_file.start_time(os.getpid())
    assert started is not None
    pid_file.write(tree.pid_path, pid_file.RunningServer(os.getpid(), started))
    content = tree.pid_path.read_text().replace(f'"started": {started}', f'"started": {started - 1}')
    tree.pid_path.write_text(content)  # this process's pid, but a process that started earlier
    assert tree.run("stop").returncode == 1
    assert tree.run("start").returncode == 0
    assert tree.running.pid != os.getpid()
    assert tree.run("stop").returncode == 0


@server
@pytest.mark.parametrize("behaviour", ["stubborn", "deaf"])
def test_second_sigterm_ends_a_drain_at_once(tree: Tree, behaviour: str) -> None:
    with tree.foreground(FAKE_SERVER=behaviour) as popen:
        read_until(popen, "Model server started.")
        popen.send_signal(signal.SIGTERM)
        read_until(popen, "SIGTERM 1")
        popen.send_signal(signal.SIGTERM)
        read_until(popen, "SIGTERM 2")
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 1, rest
    assert ("killing it" in rest) == (behaviour == "deaf")


@server
def test_sigterm_during_back_off_ends_at_once(tree: Tree) -> None:
    with tree.foreground() as popen:
        read_until(popen, "Model server started.")
        seen = ""
        while " in " not in seen.rpartition("restarting")[2]:
            os.kill(int(str(tree.ask()["pid"])), signal.SIGKILL)
            seen = read_until(popen, "restarting")
        popen.send_signal(signal.SIGTERM)
        rest, _ = popen.communicate(timeout=LIMIT_S)
    assert popen.returncode == 0, rest
    assert not tree.pid_path.exists()


@server
def test_unix_socket_is_served_and_removed(tree: Tree) -> None:
    path = tree.folder / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert tree.run("start", "--management-address", f"unix:{path}").returncode == 0
    assert tree.run("status").returncode == 0
    assert tree.run("stop").returncode == 0
    assert not path.exists()


@server
def test_log_that_cannot_be_kept_does_not_hinder_the_start(tree: Tree) -> None:
    (tree.folder / "file").touch()
    started = tree.run("start", LOG_LOCATION=str(tree.folder / "file"))
    assert started.returncode == 0, started.stderr
    assert "no log is kept" in started.stderr
    assert tree.run("stop").returncode == 0


def config_with(tmp_path: Path, **addresses: str) -> Config:
    flags = {key: (text, f"--{key.replace('_', '-')}") for key, text in addresses.items()}
    free = {f"{name}_address": ("http://127.0.0.1:0", "test") for name in ("inference", "management", "metrics")}
    return load_config(free | flags | {"model_store": (str(tmp_path), "test")}, environ={})


def test_equal_addresses_share_one_socket(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    same = address.replace("127.0.0.1", "localhost")
    listeners = Listeners.open(config_with(tmp_path, inference_address=address, management_address=same))
    try:
        assert listeners.sockets["inference"] is listeners.sockets["management"]
        assert listeners.sockets["metrics"] is not listeners.sockets["inference"]
        assert listeners.addresses["metrics"].port not in (0, listeners.addresses["inference"].port)
    finally:
        listeners.close()


def test_one_port_speaks_tls_or_not(tmp_path: Path) -> None:
    port = free_port()
    config = config_with(
        tmp_path, inference_address=f"https://127.0.0.1:{port}", management_address=f"http://127.0.0.1:{port}"
    )
    with pytest.raises(ConfigError, match="is inference_address too, but one of the two speaks TLS only"):
        Listeners.open(config)
    socket.create_server(("127.0.0.1", port)).close()  # nothing stayed open


def test_live_unix_socket_and_other_files_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(ConfigError, match="another server is listening"):
            Listeners.open(config_with(tmp_path, inference_address=f"unix:{path}"))
    assert path.exists()
    path.unlink()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Listeners.open(config_with(tmp_path, inference_address=f"unix:{path}"))
    assert path.read_text() == "precious"


def test_failed_address_leaves_no_socket_open(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"http://127.0.0.1:{taken.getsockname()[1]}"
        config = config_with(tmp_path, inference_address=f"unix:{path}", management_address=busy)
        with pytest.raises(ConfigError, match="management_address"):
            Listeners.open(config)
    assert not path.exists()


def test_pid_file_is_given_to_one_starter_only(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    started = pid_file.start_time(os.getpid())
    assert started is not None
    running = pid_file.RunningServer(os.getpid(), started, {"inference": "http://127.0.0.1:8080"})
    pid_file.write(path, running)
    assert pid_file.read(path) == running
    assert path.read_text().splitlines()[0] == str(os.getpid())
    with pytest.raises(ConfigError, match="already running"):
        pid_file.write(path, running)
    pid_file.remove(path, os.getpid() + 1)
    assert path.exists()
    pid_file.remove(path, os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_pid_file_that_was_cleared_away_is_made_again_unless_another_server_has_it(tmp_path: Path) -> None:
    started = pid_file.start_time(os.getpid())
    assert started is not None
    running = pid_file.RunningServer(os.getpid(), started, {"inference": "http://127.0.0.1:8080"})
    path, plain = tmp_path / "pid", tmp_path / "plain"
    inner = tmp_path / "session" / "pid"
    inner.parent.mkdir()
    inside = pid_file.PidFiles(inner, None)
    assert inside.write(running) == []
    shutil.rmtree(inner.parent)
    inside.look()
    assert pid_file.read(inner) == running, "with its folder"
    shutil.rmtree(inner.parent)
    files = pid_file.PidFiles(path, plain)
    assert files.write(running) == []
    path.unlink()
    plain.unlink()
    files.look()
    assert pid_file.read(path) == running and plain.read_text() == f"{os.getpid()}\n"
    os.unlink(path)
    os.mkfifo(path)  # nothing of ours, and nothing to wait for
    files.look()
    files.remove(os.getpid())
    assert [each.name for each in tmp_path.iterdir()] == ["pid"]
    files.look()
    with pytest.raises(ConfigError, match="it is not a regular file"):
        pid_file.read(path)


def test_pid_file_waits_for_room_on_a_full_disk(tmp_path: Path) -> None:
    told = in_full_disk("tests.support.pid_file_on_full_disk", tmp_path)
    [[kind, text]] = told["notes"]
    assert kind == "warning" and "the disk is full (ENOSPC: No space left on device)" in text
    assert "`pyserve stop` and `pyserve status` do not find this server (pid " in text
    assert told["while full"] == ["full"]
    assert told["after"] == ["pid"]
    assert told["default"] == [".pyserve.pid"] * 2, "commands look in the same place, full or not"


@pytest.mark.parametrize("content", ["", "x", "1\n", "1\n{", '1\n{"a": 2}\n', "\0" * 100])
def test_damaged_pid_file_counts_as_stale(tmp_path: Path, content: str) -> None:
    path = tmp_path / "pid"
    path.write_text(content)
    assert pid_file.read(path) is None
    pid_file.write(path, pid_file.RunningServer(os.getpid(), pid_file.start_time(os.getpid()) or 0))
    assert pid_file.read(path) is not None


@server
def test_a_cause_that_passes_does_not_end_a_server_that_has_served(tree: Tree) -> None:
    assert tree.run("start", FAKE_SERVER="fail_again").returncode == 0
    first = tree.ask()
    os.kill(int(str(first["pid"])), signal.SIGKILL)
    assert tree.ask()["restart"] == 3
    assert tree.log().count("m.mar: the weights do not fit the model file; restarting in") == 2
    assert tree.run("stop").returncode == 0


def test_a_cause_that_stays_ends_the_restarts_with_its_name(tmp_path: Path) -> None:
    now, events = [0.0], list[JsonObject]()
    supervisor = Supervisor(
        config_with(tmp_path), Listeners(), OwnFolder(str(tmp_path)), SharedMemory(), events.append,
        program=launch.Program.own()._replace(server=["/nowhere/python"]), drains_on_hangup=False,
    )  # fmt: skip
    supervisor._named_causes = NamedCauses(lambda: now[0])
    supervisor._has_served = True
    while supervisor._exit_code is None:
        assert now[0] <= NAMED_CAUSE_MAX_S
        supervisor._start_server()
        now[0] += BACKOFF_MAX_S
    assert supervisor._exit_code == EXIT_FAILED
    [event] = events
    assert event["event"] == "failed"
    assert "there is no such file or folder (ENOENT: No such file or directory)" in event["reason"]
    assert "300 s in vain" in event["reason"]
