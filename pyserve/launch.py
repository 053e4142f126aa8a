"""How one pyserve process starts another: what is handed over, and what is reported back.

The launcher starts the supervisor and the supervisor starts the server in the same way. The starter puts a
JSON object, the *handover*, into an anonymous file whose descriptor the child inherits, together with the
write end of a pipe for reports. An environment variable tells the child the two numbers.

Reports are JSON objects, one a line, told apart by ``event``:

    progress    {"model": name, "text": "reading weights 40/110 MB"}
    ready       {"models": [row, ...], "not_loaded": [file, ...], "sample": "curl ...", "console": URL,
                 "grpc": {"grpc_inference": "127.0.0.1:7070", ...}, "notes": [[kind, text], ...]}; the supervisor has
                notes of its own to add
    failed      {"reason": text}
    held        {"models": [[model, version], ...], "failed": [[model, version], ...]}; changes of models are refused,
                those under way have ended
    loaded      {"models": [row, ...]}; a server that is to take a running one's place waits for the order to open

The supervisor has a pipe the other way to the server, for orders: a word a line, see `pyserve.server.orders`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from pyserve import __version__
from pyserve.cpu_budget import cpu_budget
from pyserve.cuda_environment import server_variables, without_own
from pyserve.errors import JsonObject

ROOT_DIR = Path(__file__).resolve().parent.parent  # where the package lies
COMPAT_DIR = str(ROOT_DIR / "pyserve" / "compat")  # what `import ts` finds in a worker process

# Ends the handler call that runs in a worker. None of those with a name, which handlers take for themselves.
INTERRUPT = signal.SIGRTMIN + 7

# A service manager such as systemd signals all processes of a service at once, and the supervisor, which is one of
# them, hands on to the server what it gets. What comes within this time is one signal.
SAME_SIGNAL_S = 0.25

# What a service manager says to the one process that it starts.
SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")

SERVER_VARIABLE = "PYSERVE_SERVER"
SUPERVISOR_VARIABLE = "PYSERVE_SUPERVISOR"
LIFELINE_VARIABLE = "PYSERVE_LIFELINE"
SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []  # the current folder's files are no modules of ours
SERVER_COMMAND = [sys.executable, *SAFE_PATH, "-m", "pyserve.server.main"]
FRONT_END_COMMAND = [sys.executable, *SAFE_PATH, "-m", "pyserve.server.front_end"]
SUPERVISOR_COMMAND = [sys.executable, *SAFE_PATH, "-m", "pyserve.server.supervise"]

EXIT_DRAINED = 0
EXIT_WILL_FAIL_AGAIN = 3
"""Exit code of a server whose start failed for a reason that will repeat; it has reported ``failed``."""

EXIT_REPLACED = 5
"""Exit code of a server that was drained because another process is to take its place."""

EXIT_DEVICE_LOST = 6
"""Exit code of a server that cannot use a device any more, and has answered whoever waited for it."""

REPORT_SIZE_MAX = 4 << 20
"""Bytes; a longer line is no report of ours and is dropped."""

_PR_SET_PDEATHSIG = 1
_PIPE_SIZE = 1 << 20


class Program(NamedTuple):
    """A build of pyserve that processes are started from.

    Attributes:
        supervisor, server, front_end: command lines.
        pythonpath: the PYTHONPATH that it is found with; None for none.
        version: as its package says.
    """

    supervisor: list[str]
    server: list[str]
    front_end: list[str]
    pythonpath: str | None
    version: str

    @classmethod
    def own(cls) -> Program:
        """That of this process."""
        found_with = child_environment().get("PYTHONPATH")
        return cls(SUPERVISOR_COMMAND, SERVER_COMMAND, FRONT_END_COMMAND, found_with, __version__)


class Process(Protocol):
    """A child, of any parent."""

    pid: int
    returncode: Any

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    def wait(self) -> int:
        """The same, when it has ended."""

    def kill(self) -> None:
        """Sends SIGKILL, unless it has ended."""

    def send_signal(self, sig: int) -> None:
        """Unless it has ended."""


class AdoptedProcess:
    """A child that this process had before it became another program by execve(2)."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody else has taken its exit code
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)


class Child(NamedTuple):
    """A started child and the read end of its reports (non-blocking)."""

    popen: subprocess.Popen[bytes]
    reports_fd: int


def spawn(
    command: list[str],
    variable: str,
    handover: JsonObject,
    *,
    sockets: Iterable[socket.socket] = (),
    files: Iterable[int] = (),
    output_fd: int | None = None,
    program: Program | None = None,
) -> Child:
    """Start ``command`` in a session of its own with ``handover``, inheriting ``sockets`` and ``files``.

    Args:
        variable: environment variable that tells the child where its handover is.
        output_fd: becomes the child's stdout and stderr; inherited if ``None``.
        program: which ``command`` is of; ``None`` for that of this process.

    Raises:
        OSError: the command cannot be started.
    """
    environment = child_environment() if program is None else environment_of(program)
    if variable == SERVER_VARIABLE:
        environment |= server_variables(environment)
    reports_fd, report_fd = os.pipe2(os.O_CLOEXEC)
    handover_fd = memory_file(handover)
    try:
        popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output_fd,
            stderr=output_fd,
            cwd=child_folder(),
            env=environment | {variable: json.dumps({"config_fd": handover_fd, "report_fd": report_fd})},
            pass_fds=[handover_fd, report_fd, *files, *(each.fileno() for each in sockets)],
            # Away from the terminal's process group: Ctrl-C reaches the starter only, which passes it on once.
            start_new_session=True,
        )
    except BaseException:
        os.close(reports_fd)
        raise
    finally:
        os.close(handover_fd)
        os.close(report_fd)
    os.set_blocking(reports_fd, False)
    return Child(popen, reports_fd)


def memory_file(handover: JsonObject) -> int:
    """A descriptor of an anonymous file with ``handover``, to be read from its begin; closed by execve(2)."""
    descriptor = os.memfd_create("pyserve-handover", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(json.dumps(handover).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def environment_of(program: Program) -> dict[str, str]:
    """Our environment, with what ``program`` is found with."""
    environment = child_environment()
    environment.pop("PYTHONPATH", None)
    return environment if program.pythonpath is None else environment | {"PYTHONPATH": program.pythonpath}


def child_environment() -> dict[str, str]:
    """Our environment; a checkout that is found through the current folder only is named to the child."""
    hidden = (SERVER_VARIABLE, SUPERVISOR_VARIABLE, *SERVICE_VARIABLES)
    environment = {name: value for name, value in without_own(os.environ).items() if name not in hidden}
    # How long threads of one operation spin while they wait for each other. GNU OpenMP's default is milliseconds:
    # as soon as anything else wants a core, whole time slices are spun away (bench/README.md has the figures).
    # Not spinning at all makes a network of many small operations slower than one thread would be.
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "5000")
    root = str(ROOT_DIR)
    if sys.path and sys.path[0] in ("", root) and root not in sys.path[1:]:
        inherited = environment.get("PYTHONPATH", "").split(os.pathsep)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys([root, *inherited])))
    # Every thread would get a heap of its own, and each keeps what a batch once needed: with four workers that was a
    # fifth more memory. As many heaps as threads can run at once are enough.
    environment.setdefault("MALLOC_ARENA_MAX", str(max(2, cpu_budget())))
    return environment


def child_folder() -> str | None:
    """Where a child starts: here, or in the root where this folder is gone, in which torch cannot be imported."""
    try:
        os.getcwd()
    except OSError:
        return "/"
    return None


def stderr_file() -> BinaryIO:
    """An empty file without a name, for what a child prints; in memory where the temporary folder is gone or full."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.memfd_create("stderr", os.MFD_CLOEXEC), "w+b")


def receive(variable: str, environ: Mapping[str, str] | None = None) -> tuple[JsonObject, Reporter]:
    """The child's side of ``spawn``: the handover, and where to report to.

    Raises:
        RuntimeError: the process was not started through ``spawn``.
    """
    place = (os.environ if environ is None else environ).get(variable)
    if place is None:
        raise RuntimeError(f"this program is started by `pyserve start`, which sets {variable}")
    descriptors = json.loads(place)
    os.environ.pop(variable, None)
    os.set_inheritable(descriptors["report_fd"], False)
    with open(descriptors["config_fd"], "rb") as file:
        return json.load(file), Reporter(descriptors["report_fd"])


def end_with_caller() -> None:
    """SIGTERM when the program that started us has gone, where it holds a pipe for that (`pyserve.serve`)."""
    descriptor = os.environ.pop(LIFELINE_VARIABLE, "")
    if not descriptor:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(int(descriptor), 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    os.set_inheritable(int(descriptor), False)
    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone (prctl(2), PR_SET_PDEATHSIG)."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it went before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def describe_exit(code: int) -> str:
    """``"ended with exit code 1"`` or ``"was killed by SIGKILL"``, from a Popen's return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


class Reporter:
    """Writes reports. A reader that is gone is no error: the command may have been interrupted."""

    def __init__(self, fd: int):
        self._fd = fd

    def send(self, event: str, **members: Any) -> None:
        """Write one report; members must fit JSON."""
        line = memoryview(json.dumps({"event": event, **members}).encode() + b"\n")
        try:
            while line and self._fd >= 0:
                line = line[os.write(self._fd, line) :]
        except OSError:
            self.close()

    def never_wait(self) -> None:
        """From now on a reader that does not read is taken for one that is gone."""
        os.set_blocking(self._fd, False)
        fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    def progress(self, model: str, text: str) -> None:
        self.send("progress", model=model, text=text)

    def ready(self, models: list[JsonObject], not_loaded: list[str], sample: str, **more: Any) -> None:
        """``models``: rows with model, version, state, workers, device, batch, url and error."""
        self.send("ready", models=models, not_loaded=not_loaded, sample=sample, **more)

    def failed(self, reason: str) -> None:
        self.send("failed", reason=reason)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ReportReader:
    """Cuts what comes through a report pipe into events."""

    def __init__(self, fd: int):
        self.fd = fd
        self.at_end = False
        self._rest = b""

    def read(self) -> list[JsonObject]:
        """The events that are complete by now. Sets ``at_end`` once the writer is gone."""
        while True:
            try:
                chunk = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                self.at_end = True
                break
            self._rest += chunk
            if len(self._rest) > REPORT_SIZE_MAX:
                break
        *lines, self._rest = self._rest.split(b"\n")
        if len(self._rest) > REPORT_SIZE_MAX:
            self._rest = b""
        return [event for event in map(_event, lines) if event is not None]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _event(line: bytes) -> JsonObject | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
