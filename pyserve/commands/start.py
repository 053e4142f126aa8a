"""``pyserve start``: in the background, waiting until the server answers or says why not; or in the foreground."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pyserve import launch, log
from pyserve.commands import terminal as console
from pyserve.commands.model_table import print_models, print_ready
from pyserve.config.config import Config
from pyserve.errors import ConfigError, JsonObject
from pyserve.server import pid_file

LOG_FILE = "pyserve.log"
LOG_TAIL_LINE_COUNT = 20
LOG_TAIL_SIZE_MAX = 64 << 10
INTERRUPTED_WAIT_S = 10.0


@dataclass
class LogFile:
    """The log of a background server.

    Attributes:
        path: absolute; ``None`` if no log can be kept.
        fd: open for appending.
        start: size at the beginning of this start, in bytes.
    """

    path: Path | None
    fd: int
    start: int

    @classmethod
    def open(cls) -> LogFile:
        """``$LOG_LOCATION/pyserve.log`` or ``./logs/pyserve.log``. One that cannot be written is done without."""
        path = Path(os.environ.get("LOG_LOCATION") or "logs", LOG_FILE).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A pipe that nobody reads must not hold the start.
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
            os.set_blocking(fd, True)
        except OSError as error:
            console.warn([f"no log is kept: {path} cannot be written: {error.strerror}; set LOG_LOCATION to a folder"])
            return cls(None, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 0)
        return cls(path, fd, os.fstat(fd).st_size)

    @classmethod
    def stdout(cls) -> LogFile:
        """Our own standard output, which the process that started us reads."""
        return cls(None, os.dup(1), 0)

    def tail(self) -> list[str]:
        """The last lines written since the start."""
        if self.path is None:
            return []
        with open(self.path, "rb") as file:
            file.seek(max(self.start, file.seek(0, io.SEEK_END) - LOG_TAIL_SIZE_MAX))
            return file.read(LOG_TAIL_SIZE_MAX).decode(errors="replace").splitlines()[-LOG_TAIL_LINE_COUNT:]


def start_server(config: Config, *, pid_path: Path, foreground: bool, like_torchserve: bool = False) -> int:
    """Start, and return the exit code of the command: 0 ready, 1 failed, 3 a model failed under ``strict``.

    Args:
        like_torchserve: log to our standard output, and be found where TorchServe is looked for.

    Raises:
        ConfigError: it is running already, or (in the foreground) an address cannot be had.
    """
    running = pid_file.read(pid_path)
    if running is not None:
        raise ConfigError(running.sentence)
    console.warn(config.notices, kind="note")
    plain_pid_path = pid_file.torchserve_path() if like_torchserve else None
    if foreground:
        return _run_in_foreground(config, pid_path, plain_pid_path)
    return _start_in_background(config, pid_path, plain_pid_path)


def _run_in_foreground(config: Config, pid_path: Path, plain_pid_path: Path | None) -> int:
    from pyserve.server.supervise import supervise

    launch.end_with_caller()
    if plain_pid_path is not None:
        os.dup2(1, 2)  # the server's, too
    log.configure(config.log_level.upper(), as_json=config.log_format == "json")
    failures: list[str] = []

    def on_event(event: JsonObject) -> None:
        if event["event"] == "ready":
            _print_outcome(event, config)
        elif event["event"] == "failed":
            failures.append(str(event["reason"]))

    code = supervise(
        config, on_event, pid_path=pid_path, plain_pid_path=plain_pid_path, log_file="",
        program=launch.Program.own(), drains_on_hangup=True,
    )  # fmt: skip
    if failures:
        print(f"{console.program()}: error: {failures[-1]}", file=sys.stderr)
    return code


def _start_in_background(config: Config, pid_path: Path, plain_pid_path: Path | None) -> int:
    log_file = LogFile.open() if plain_pid_path is None else LogFile.stdout()
    command = launch.SUPERVISOR_COMMAND + ([pid_file.TORCHSERVE_WORD] if plain_pid_path is not None else [])
    handover = {
        "config": config.to_json(),
        "pid_file": str(pid_path.absolute()),
        "plain_pid_file": str(plain_pid_path or ""),
        "log_file": str(log_file.path or ""),
        "program": launch.Program.own()._asdict(),
    }
    child = launch.spawn(command, launch.SUPERVISOR_VARIABLE, handover, output_fd=log_file.fd)
    os.close(log_file.fd)
    reader = launch.ReportReader(child.reports_fd)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout 60 pyserve start` leaves nothing half-started
    try:
        outcome = _wait_for_outcome(reader)
    except KeyboardInterrupt:
        child.popen.send_signal(signal.SIGTERM)
        _wait_for_exit(child.popen)
        raise
    finally:
        reader.close()
    if outcome is not None and outcome["event"] == "ready":
        return _report_ready(outcome, config, child.popen, log_file)
    return _report_failed(outcome, child.popen, log_file)


def _wait_for_outcome(reader: launch.ReportReader) -> JsonObject | None:
    """The ``ready`` or ``failed`` event; ``None`` if the supervisor ended without one."""
    with console.Progress() as progress:
        while not reader.at_end:
            select.select([reader.fd], [], [])
            for event in reader.read():
                if event["event"] == "progress":
                    progress.update(str(event.get("model")), str(event.get("text")))
                elif event["event"] in ("ready", "failed"):
                    return event
    return None


def _report_ready(event: JsonObject, config: Config, supervisor: subprocess.Popen[bytes], log_file: LogFile) -> int:
    if log_file.path is not None:
        print(f"log: {log_file.path}")
    if not _print_outcome(event, config):
        return supervisor.wait()
    supervisor.returncode = 0  # it goes on without us; Popen must not warn that it still runs
    return 0


def _print_outcome(event: JsonObject, config: Config) -> bool:
    """Print the table. Returns whether the server stays; under ``strict`` it does not with a failed model."""
    for kind, text in event.get("notes", []):
        console.warn([text], kind=kind)
    failed = [str(row.get("model")) for row in event.get("models", []) if row.get("state") == "FAILED"]
    if not (config.strict and failed):
        print_ready(event)
        return True
    print_models(event["models"], sys.stderr)
    print(
        f"{console.program()}: error: --strict: not loaded: {', '.join(failed)}; the server is stopped", file=sys.stderr
    )
    return False


def _report_failed(event: JsonObject | None, supervisor: subprocess.Popen[bytes], log_file: LogFile) -> int:
    code = _wait_for_exit(supervisor)
    lines = log_file.tail()
    if event is not None:
        reason = str(event.get("reason"))
        lines = [line for line in lines if reason not in line]  # which is said once, at the end
    elif code is None:
        reason = "the supervisor runs, but reports nothing; see `pyserve status`"
        supervisor.returncode = 0
    else:
        reason = f"the supervisor {launch.describe_exit(code)} before the server was ready"
    if lines:
        print(f"the last lines of {log_file.path}:", file=sys.stderr)
        print("\n".join(f"    {line}" for line in lines), file=sys.stderr)
    print(f"{console.program()}: error: {reason}", file=sys.stderr)
    return 1


def _wait_for_exit(supervisor: subprocess.Popen[bytes]) -> int | None:
    try:
        return supervisor.wait(INTERRUPTED_WAIT_S)
    except subprocess.TimeoutExpired:
        return None
