"""Keeps one server running: owns the listening sockets and the pid file, restarts the server when it dies.

One thread and one loop: a selector waits for the server's reports, for signals (through a wake-up socket) and
for the next deadline. No torch here, and nothing else that could crash.

    phase      server   leaves it when
    starting   runs     it reports ready -> serving; it dies -> waiting, or the end: see `_server_ended`
    serving    runs     it dies -> waiting
    waiting    none     the back-off is over -> starting
    stopping   runs     it exits -> the end; it is killed when it drains too long

SIGTERM and SIGINT drain, SIGTERM after `drain_delay_s`; a second one stops at once. In the background SIGHUP is
ignored, in the foreground (the terminal is gone) it drains.
"""

from __future__ import annotations

import logging
import os
import random
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from pyserve import launch, log
from pyserve.config.config import Config
from pyserve.errors import ConfigError, JsonObject
from pyserve.fronts.meeting import Meeting
from pyserve.fronts.shares import Shares
from pyserve.os_errors import cause_of
from pyserve.security import tls
from pyserve.security.exposure import exposure_notes
from pyserve.security.tokens import Tokens, key_file, notes_of
from pyserve.server import pid_file
from pyserve.server.console_file import ConsoleFile
from pyserve.server.front_ends import FrontEnds
from pyserve.server.housekeeping import Housekeeping
from pyserve.server.kept_files import KeptFiles, SharedMemory
from pyserve.server.listeners import Listeners
from pyserve.server.own_folder import OwnFolder
from pyserve.server.restarts import NAMED_CAUSE_MAX_S, NamedCauses, ServerBackoff
from pyserve.worker.descendants import end_marked, new_token

FIRST_START_ATTEMPTS_MAX = 3
"""A server that has never served is not restarted endlessly: the command that started it waits for an answer."""

DRAIN_GRACE_S = 5.0
SECOND_STOP_S = 2.0

EXIT_STOPPED = 0
EXIT_FAILED = 1
EXIT_MODEL_FAILED = 3
"""Exit codes of a supervisor: drained; failed, or stopped before it was drained; a model failed under ``strict``."""

logger = logging.getLogger("pyserve.supervisor")


class Supervisor:
    """Runs in the main thread of its process, which it gives its signal handlers to."""

    def __init__(
        self,
        config: Config,
        listeners: Listeners,
        own_folder: OwnFolder,
        memory: SharedMemory,
        on_event: Callable[[JsonObject], None],
        *,
        server_command: list[str],
        drains_on_hangup: bool,
        like_torchserve: bool = False,
        log_file: str = "",
        on_grpc: Callable[[dict[str, str]], None] = lambda addresses: None,
        meeting: Meeting | None = None,
    ):
        # Constant after construction.
        self._config = config
        self._listeners = listeners
        self._folder = Path.cwd()
        self._own_folder = own_folder
        self._memory = memory
        self._on_event = on_event
        self._server_command = server_command
        self._drains_on_hangup = drains_on_hangup
        self._like_torchserve = like_torchserve
        self._log_file = log_file
        self._on_grpc = on_grpc
        self._meeting = meeting
        self._front_ends = FrontEnds(config.front_ends if meeting else 0, self._start_front_end)
        self._family = new_token()
        self._selector = selectors.DefaultSelector()
        # Per supervisor.
        self._backoff = ServerBackoff(random.Random())
        self._named_causes = NamedCauses()
        self._stop_count = 0
        self._has_served = False
        self._exit_code: int | None = None
        self._code_when_stopped = EXIT_STOPPED
        self._deadline: float | None = None
        self._phase = "waiting"
        # Per server.
        self._child: launch.Child | None = None
        self._reports: launch.ReportReader | None = None
        self._started_at = 0.0
        self._stopped_at = 0.0
        self._ready_at: float | None = None
        self._failure = ""

    def run(self) -> int:
        """Until the server has stopped for good. Returns the exit code of the process."""
        wakeup, wakeup_writer = socket.socketpair()
        wakeup.setblocking(False)
        wakeup_writer.setblocking(False)
        self._selector.register(wakeup, selectors.EVENT_READ, "signal")
        old_fd = signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        old_handlers = {number: signal.signal(number, _wake) for number in numbers}
        try:
            self._start_server()
            while self._exit_code is None:
                self._turn(wakeup)
            return self._exit_code
        finally:
            self._kill()
            if self._phase == "stopping":
                self._front_ends.stop()
            else:
                self._front_ends.kill()
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            wakeup.close()
            wakeup_writer.close()
            self._selector.close()

    def _turn(self, wakeup: socket.socket) -> None:
        deadlines = [each for each in (self._deadline, self._front_ends.deadline) if each is not None]
        timeout_s = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for key, _ in self._selector.select(timeout_s):
            if key.data == "signal":
                self._take_signals(wakeup)
            else:
                self._take_reports()
        if self._child is not None and self._child.popen.poll() is not None:
            self._server_ended()
        if self._exit_code is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._deadline_reached()
        self._front_ends.look(starts=self._phase != "stopping" and self._exit_code is None)

    def _take_signals(self, wakeup: socket.socket) -> None:
        try:
            numbers = wakeup.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and self._drains_on_hangup):
                self._stop(signal.Signals(number).name, number)
            elif number == signal.SIGHUP:
                logger.info("SIGHUP is ignored; to read the configuration again, stop and start")

    def _stop(self, reason: str, number: int) -> None:
        self._stop_count += 1
        if self._child is None:
            self._exit_code = EXIT_STOPPED
            return
        now = time.monotonic()
        if self._stop_count == 1:
            config = self._config
            if self._phase == "starting":
                number = signal.SIGTERM  # ends it outright while it has no handler yet, and nobody waits for it later
            delay_s = config.drain_delay_s if number == signal.SIGTERM and self._phase == "serving" else 0
            logger.info("%s: draining, %sfor at most %d s", reason, f"in {delay_s} s, " if delay_s else "",
                        config.drain_timeout_s)  # fmt: skip
            self._phase = "stopping"
            self._stopped_at = now
            self._deadline = now + delay_s + config.drain_timeout_s + DRAIN_GRACE_S
            # The server stops accepting; our copies of its sockets would let clients connect to nobody.
            self._listeners.release()
        else:
            logger.warning("%s again: stopping without waiting for requests", reason)
            self._deadline = min(self._deadline or now + SECOND_STOP_S, now + SECOND_STOP_S)
            # So that it counts as another one.
            time.sleep(max(0.0, self._stopped_at + 1.2 * launch.SAME_SIGNAL_S - now))
        # Of the two signals that it knows, the one that it waits after.
        self._child.popen.send_signal(signal.SIGTERM if number == signal.SIGTERM else signal.SIGINT)

    def _deadline_reached(self) -> None:
        if self._phase == "waiting":
            self._start_server()
        elif self._phase == "stopping" and self._child is not None:
            logger.error("the server has not ended in time; killing it")
            self._child.popen.kill()

    def _handover(self, sockets: dict[str, socket.socket], fronts: JsonObject | None) -> JsonObject:
        return {
            "config": self._config.to_json(),
            "sockets": {name: each.fileno() for name, each in sockets.items()},
            "restart": self._backoff.count,
            "folder": str(self._folder),
            "own_folder": str(self._own_folder.path or ""),
            "memory": self._memory.descriptors,
            "parent_pid": os.getpid(),
            "like_torchserve": self._like_torchserve,
            "log_file": self._log_file,
            "family": self._family,
            "fronts": fronts,
        }

    def _start_front_end(self, number: int) -> launch.Child:
        assert self._meeting is not None
        sockets = self._listeners.of_front_end(number)
        return launch.spawn(
            launch.FRONT_END_COMMAND, launch.SERVER_VARIABLE,
            self._handover(sockets, self._meeting.for_front_end(number)),
            sockets=set(sockets.values()), files=self._memory.descriptors,
        )  # fmt: skip

    def _start_server(self) -> None:
        self._listeners.reopen()
        files = list(self._memory.descriptors)
        if self._meeting is not None:
            files.append(self._meeting.sock.fileno())
        fronts = self._meeting.for_engine() if self._meeting else None
        handover = self._handover(self._listeners.sockets, fronts)
        self._phase = "starting"
        self._started_at = time.monotonic()
        self._ready_at = None
        self._failure = ""
        sockets = set(self._listeners.sockets.values())
        try:
            self._child = launch.spawn(
                self._server_command, launch.SERVER_VARIABLE, handover, sockets=sockets, files=files
            )
        except OSError as error:
            self._failure = cause_of(error)
            self._restart_or_end("could not be started")
            return
        self._reports = launch.ReportReader(self._child.reports_fd)
        self._selector.register(self._reports.fd, selectors.EVENT_READ, "reports")
        logger.info("server started (pid %d)", self._child.popen.pid)
        self._front_ends.start_missing()

    def _take_reports(self) -> None:
        if self._reports is None:
            return
        for event in self._reports.read():
            if event["event"] == "ready":
                self._server_ready(event)
            elif event["event"] == "failed":
                self._failure = str(event.get("reason", "no reason given"))
            elif event["event"] == "progress":
                logger.info("%s: %s", event.get("model"), event.get("text"))
                self._on_event(event)
        if self._reports.at_end:
            self._close_reports()

    def _server_ready(self, event: JsonObject) -> None:
        if self._phase != "starting":
            return
        self._ready_at = time.monotonic()
        logger.info("server ready after %.1f s", self._ready_at - self._started_at)
        self._phase = "serving"
        first = not self._has_served
        self._has_served = True
        self._named_causes.served()
        self._take_grpc(event.get("grpc") or {})
        if not first:
            return
        self._on_event(event)
        if self._config.strict and any(row.get("state") == "FAILED" for row in event.get("models", [])):
            self._code_when_stopped = EXIT_MODEL_FAILED
            self._stop("a model failed to load and strict is set", signal.SIGINT)

    def _take_grpc(self, addresses: dict[str, str]) -> None:
        """A server that takes this one's place is to have the same ports, also if the system chose them."""
        for name, address in addresses.items():
            setattr(self._config, f"{name}_port", int(address.rpartition(":")[2]))
        self._on_grpc(addresses)

    def _server_ended(self) -> None:
        assert self._child is not None
        self._take_reports()
        self._close_reports()
        code = self._child.popen.returncode
        self._child = None
        self._deadline = None
        end_marked(self._family)  # what handlers started in sessions of its own, if the server could not see to it
        ended = f"{launch.describe_exit(code)} after {time.monotonic() - self._started_at:.0f} s"
        if self._phase == "stopping":
            self._exit_code = self._code_after_stop(code)
            logger.info("server %s", ended)
        elif code == launch.EXIT_REPLACED:
            self._replace(ended, "it asked for another process in its place")
        elif code == launch.EXIT_DEVICE_LOST:
            # The server itself sees to it that a device is not tried again and again, see `lanes.lost_devices`.
            self._replace(ended, "a device is lost")
        elif not self._has_served and (self._failure or code == launch.EXIT_WILL_FAIL_AGAIN):
            self._fail(self._failure or f"the server {ended} and gave no reason")
        else:
            self._restart_or_end(ended)

    def _replace(self, ended: str, why: str) -> None:
        """It was healthy, and answered everybody because it wants to be started again: at once, however often."""
        self._backoff.count += 1
        logger.warning("server %s: %s (%d)", ended, why, self._backoff.count)
        self._start_server()

    def _code_after_stop(self, code: int) -> int:
        # SIGTERM ends a server outright while it is still too young to have a handler for it.
        stopped = code in (launch.EXIT_DRAINED, launch.EXIT_REPLACED, launch.EXIT_DEVICE_LOST)
        stopped = stopped or (code == -signal.SIGTERM and self._ready_at is None)
        return self._code_when_stopped if stopped else EXIT_FAILED

    def _restart_or_end(self, ended: str) -> None:
        if self._failure:
            ended += f": {self._failure}"
            # What worked before may work again: a port or a disk may be free soon.
            if self._has_served and self._named_causes.is_hopeless():
                self._fail(f"the server {ended}; it was started again for {NAMED_CAUSE_MAX_S:.0f} s in vain")
                return
        served_s = None if self._ready_at is None else time.monotonic() - self._ready_at
        delay_s = self._backoff.delay_s(served_s)
        count = self._backoff.count
        if not self._has_served and count >= FIRST_START_ATTEMPTS_MAX:
            self._fail(f"the server never became ready in {count} attempts; the last one {ended}")
            return
        wait = f" in {delay_s:.1f} s" if delay_s else ""
        logger.error("server %s; restarting%s (%d)", ended, wait, count)
        self._phase = "waiting"
        self._deadline = time.monotonic() + delay_s

    def _fail(self, reason: str) -> None:
        logger.error("%s", reason)
        self._on_event({"event": "failed", "reason": reason})
        self._exit_code = EXIT_FAILED

    def _close_reports(self) -> None:
        if self._reports is not None:
            self._selector.unregister(self._reports.fd)
            self._reports.close()
            self._reports = None

    def _kill(self) -> None:
        if self._child is not None:
            self._child.popen.kill()
            self._child.popen.wait()
            self._child = None
        self._close_reports()


def _wake(number: int, frame: FrameType | None) -> None:
    """Signals are taken from the wake-up socket; a handler must exist for the byte to be written there."""


def supervise(
    config: Config,
    on_event: Callable[[JsonObject], None],
    *,
    pid_path: Path,
    plain_pid_path: Path | None = None,
    log_file: str,
    server_command: list[str],
    drains_on_hangup: bool,
) -> int:
    """Open the sockets, write pid files and keys, run a server until it is stopped, and clear everything away.

    Raises:
        ConfigError: an address, the pid file, a certificate or the file of keys cannot be had.
    """
    pid = os.getpid()
    tokens: Tokens | None = None
    listeners = Listeners()
    meeting: Meeting | None = None
    own_folder = OwnFolder(config.state_dir)
    memory = SharedMemory()
    kept = KeptFiles(own_folder, memory)
    pid_files = pid_file.PidFiles(pid_path, plain_pid_path)
    console = [ConsoleFile(Path(log_file)).look] if log_file else []
    housekeeping = Housekeeping([*console, kept.look, pid_files.look])
    try:
        notes = own_folder_notes(own_folder) + exposure_notes(config) + tls.prepare(config, own_folder.path)
        for name, content in tls.made_files(config).items():
            kept.put(name, content)
        if config.front_ends > 1:
            Shares.of(config)  # or it says why not
            if find_spec("pyserve._front") is None:
                raise ConfigError("front_ends: pyserve._front is not there; build pyserve's extensions again")
            meeting = Meeting.make()
        listeners = Listeners.open(config)
        addresses = {name: str(address) for name, address in listeners.addresses.items()}
        for name, address in listeners.addresses.items():
            setattr(config, f"{name}_address", address)
        started = pid_file.start_time(pid)
        assert started is not None
        folder = Path.cwd()
        keys = str(key_file(config, folder) or "")
        drain_s = float(config.drain_delay_s + config.drain_timeout_s)
        running = pid_file.RunningServer(pid, started, addresses, log_file, drain_s, keys, config.model_store or "")
        notes += pid_files.write(running)
        tokens = Tokens.create(config, kept, folder)  # behind the pid file: another server's keys stay its own
        notes += notes_of(config, tokens)
        logger.info("listening on %s", ", ".join(f"{address} ({name})" for name, address in addresses.items()))
        supervisor = Supervisor(
            config, listeners, own_folder, memory, lambda event: on_event(_with_notes(event, notes)),
            server_command=server_command, drains_on_hangup=drains_on_hangup,
            like_torchserve=plain_pid_path is not None, log_file=log_file,
            on_grpc=lambda grpc: pid_files.update(replace(running, addresses={**addresses, **grpc})), meeting=meeting,
        )  # fmt: skip
        housekeeping.start()
        return supervisor.run()
    finally:
        housekeeping.stop()
        if tokens is not None:
            tokens.discard()
        pid_files.remove(pid)
        listeners.close()
        if meeting is not None:
            meeting.sock.close()
        own_folder.remove()
        memory.close()


def own_folder_notes(own_folder: OwnFolder) -> list[tuple[str, str]]:
    """What the user should know of it at start: (``warning``, one line), or nothing."""
    if not own_folder.problem:
        return []
    place = f"state and keys lie in {own_folder.path}" if own_folder.path else "state and keys are in memory only"
    return [("warning", f"{place}, because {own_folder.problem}; name another folder with state_dir")]


def _with_notes(event: JsonObject, notes: list[tuple[str, str]]) -> JsonObject:
    """Reported together with the table, which is what people read."""
    return {**event, "notes": [*notes, *event.get("notes", [])]} if event["event"] == "ready" else event


def main() -> int:
    """Entry of the background process that ``pyserve start`` starts."""
    log.configure(logging.INFO, sys.stderr)
    handover, reporter = launch.receive(launch.SUPERVISOR_VARIABLE)
    config = Config.from_json(handover["config"])
    log.configure(config.log_level.upper(), sys.stderr, as_json=config.log_format == "json")
    reporter.never_wait()

    def on_event(event: JsonObject) -> None:
        reporter.send(**event)
        if event["event"] in ("ready", "failed"):
            reporter.close()

    try:
        return supervise(
            config,
            on_event,
            pid_path=Path(handover["pid_file"]),
            plain_pid_path=Path(handover["plain_pid_file"]) if handover["plain_pid_file"] else None,
            log_file=handover["log_file"],
            server_command=handover["server_command"],
            drains_on_hangup=False,
        )
    except ConfigError as error:
        logger.error("%s", error)
        on_event({"event": "failed", "reason": str(error)})
        return EXIT_FAILED
    except Exception:
        logger.exception("the supervisor failed")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
