"""Keeps one server running: restarts it when it dies, and has another build of pyserve take its place when asked to.

One thread and one loop: a selector waits for the server's reports, for signals (through a wake-up socket), for
`pyserve upgrade` and for the next deadline. No torch here, and nothing else that could crash.

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
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from pyserve import launch
from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.os_errors import cause_of
from pyserve.server.control import Control, ControlClient
from pyserve.server.generation import Generation
from pyserve.server.image import SIGNALS, Image
from pyserve.server.kept_files import SharedMemory
from pyserve.server.listeners import Listeners
from pyserve.server.own_folder import OwnFolder
from pyserve.server.restarts import NAMED_CAUSE_MAX_S, NamedCauses, ServerBackoff
from pyserve.server.systemd import Systemd
from pyserve.server.upgrade import Upgrade

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
    """Runs in the main thread of its process, which it gives its signal handlers to.

    Args:
        on_event: told of what the first server reports.
        program: which servers are started from.
        control: where `pyserve upgrade` asks.
        image: makes this process the supervisor of another program, when an upgrade is over.
        adopted: what `to_json` gave in the program that this process was before.
    """

    def __init__(
        self,
        config: Config,
        listeners: Listeners,
        own_folder: OwnFolder,
        memory: SharedMemory,
        on_event: Callable[[JsonObject], None],
        *,
        program: launch.Program,
        drains_on_hangup: bool,
        like_torchserve: bool = False,
        log_file: str = "",
        on_grpc: Callable[[dict[str, str]], None] = lambda addresses: None,
        control: Control | None = None,
        service: Systemd | None = None,
        image: Image | None = None,
        adopted: JsonObject | None = None,
    ):
        # Constant after construction.
        self._config = config
        self._listeners = listeners
        self._folder = image.folder if image else Path.cwd()
        self._own_folder = own_folder
        self._memory = memory
        self._on_event = on_event
        self._drains_on_hangup = drains_on_hangup
        self._like_torchserve = like_torchserve
        self._log_file = log_file
        self._on_grpc = on_grpc
        self._control = control
        self._service = service or Systemd("")
        self._image = image
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
        self._upgrade: Upgrade | None = None
        # Per generation, and per server.
        self._servers = self.new_generation(program, adopted["servers"] if adopted else None)
        self._started_at = 0.0
        self._stopped_at = 0.0
        self._ready_at: float | None = None
        self._failure = ""
        if adopted:
            self._backoff.count = adopted["restarts"]
            self._has_served, self._phase = True, "serving"
            self._started_at = self._ready_at = time.monotonic()

    def new_generation(self, program: launch.Program, adopted: JsonObject | None = None) -> Generation:
        """One that accepts on our sockets; nothing of it runs yet, unless it is ``adopted``."""
        front_end_count = self._config.front_ends if self._config.front_ends > 1 else 0
        return Generation(program, self._listeners, self._memory.descriptors, front_end_count,
                          handed=self._handed, adopted=adopted)  # fmt: skip

    def to_json(self) -> JsonObject:
        """For the program that this process is about to become."""
        return {"servers": self._servers.to_json(), "restarts": self._backoff.count}

    def run(self) -> int:
        """Until the server has stopped for good. Returns the exit code of the process."""
        wakeup, wakeup_writer = socket.socketpair()
        wakeup.setblocking(False)
        wakeup_writer.setblocking(False)
        self.wait_for(wakeup.fileno(), lambda: self._take_signals(wakeup))
        if self._control is not None:
            self._control.serve(self._selector, self._asked)
        old_fd = signal.set_wakeup_fd(wakeup_writer.fileno(), warn_on_full_buffer=False)
        old_handlers = {number: signal.signal(number, _wake) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked while this process became another program
        try:
            if self._servers.process is None:
                self._start_server()
            else:
                self._await_reports()
            while self._exit_code is None or (self._upgrade is not None and self._upgrade.is_draining):
                self._turn()
            return self._exit_code
        finally:
            if self._upgrade is not None:
                self._upgrade.close()
            self._kill()
            if self._phase == "stopping":
                self._servers.front_ends.stop()
            else:
                self._servers.front_ends.kill()
            self._servers.close()
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_fd)
            wakeup.close()
            wakeup_writer.close()
            self._selector.close()

    def wait_for(self, fd: int, read: Callable[[], None]) -> None:
        """Has ``read`` called whenever there is something to read from ``fd``, until `forget`."""
        self._selector.register(fd, selectors.EVENT_READ, read)

    def forget(self, fd: int) -> None:
        self._selector.unregister(fd)

    def _turn(self) -> None:
        upgrade = self._upgrade
        front_ends = self._servers.front_ends
        deadlines = [self._deadline, front_ends.deadline, self._service.deadline]
        if upgrade is not None:
            deadlines.append(upgrade.deadline)
        soonest = min((each for each in deadlines if each is not None), default=None)
        timeout_s = max(0.0, soonest - time.monotonic()) if soonest is not None else None
        for key, _ in self._selector.select(timeout_s):
            key.data()
        if self._servers.process is not None and self._servers.process.poll() is not None:
            self._server_ended()
        if self._exit_code is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._deadline_reached()
        front_ends.look(starts=self._phase != "stopping" and self._exit_code is None)
        self._service.look()
        if upgrade is not None:
            upgrade.look()

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
        if self._upgrade is not None:
            self._upgrade.stop(_passed_on(number))
        process = self._servers.process
        if process is None:
            self._exit_code = EXIT_STOPPED
            self._listeners.release()  # if there is one that was to take its place, it drains
            if self._upgrade is not None and self._stop_count > 1:
                self._upgrade.close()
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
            self._service.stopping()
            self._stopped_at = now
            self._deadline = now + delay_s + config.drain_timeout_s + DRAIN_GRACE_S
            # The server stops accepting; our copies of its sockets would let clients connect to nobody.
            self._listeners.release()
        else:
            logger.warning("%s again: stopping without waiting for requests", reason)
            if self._upgrade is not None:
                self._upgrade.close()
            self._deadline = min(self._deadline or now + SECOND_STOP_S, now + SECOND_STOP_S)
            # So that it counts as another one.
            time.sleep(max(0.0, self._stopped_at + 1.2 * launch.SAME_SIGNAL_S - now))
        process.send_signal(_passed_on(number))

    def _deadline_reached(self) -> None:
        if self._phase == "waiting":
            self._start_server()
        elif self._phase == "stopping" and self._servers.process is not None:
            logger.error("the server has not ended in time; killing it")
            self._servers.process.kill()

    def _handed(self) -> JsonObject:
        """What all of its processes are handed."""
        return {
            "config": self._config.to_json(),
            "folder": str(self._folder),
            "own_folder": str(self._own_folder.path or ""),
            "memory": self._memory.descriptors,
            "like_torchserve": self._like_torchserve,
            "log_file": self._log_file,
            "keeps_sockets": self._listeners.are_kept,
        }

    def _start_server(self) -> None:
        self._listeners.reopen()
        self._phase = "starting"
        self._started_at = time.monotonic()
        self._ready_at = None
        self._failure = ""
        try:
            self._servers.start(self._backoff.count)
        except OSError as error:
            self._failure = cause_of(error)
            self._restart_or_end("could not be started")
            return
        self._await_reports()
        assert self._servers.process is not None
        logger.info("server started (pid %d)", self._servers.process.pid)

    def _await_reports(self) -> None:
        if self._servers.reports is not None:
            self.wait_for(self._servers.reports.fd, self._take_reports)

    def _take_reports(self) -> None:
        reports = self._servers.reports
        if reports is None:
            return
        for event in reports.read():
            if event["event"] == "ready":
                self._server_ready(event)
            elif event["event"] == "failed":
                self._failure = str(event.get("reason", "no reason given"))
            elif event["event"] == "progress":
                logger.info("%s: %s", event.get("model"), event.get("text"))
                self._on_event(event)
            elif event["event"] == "held" and self._upgrade is not None:
                self._upgrade.held(event)
        if reports.at_end:
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
        self._service.ready()
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
        self._take_reports()
        self._close_reports()
        code = self._servers.ended()
        self._deadline = None
        ended = f"{launch.describe_exit(code)} after {time.monotonic() - self._started_at:.0f} s"
        has_heir = self._upgrade is not None and self._phase != "stopping" and self._upgrade.old_ended(ended)
        if self._phase == "stopping":
            self._exit_code = self._code_after_stop(code)
            logger.info("server %s", ended)
        elif has_heir:
            self._phase = "waiting"  # without a deadline: the upgrade goes on, or ends in `upgrade_ended`
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
        if self._servers.reports is not None:
            self.forget(self._servers.reports.fd)
            self._servers.close_reports()

    def _kill(self) -> None:
        self._close_reports()
        self._servers.kill()

    # --- upgrades -------------------------------------------------------------------------------------------------

    @property
    def servers(self) -> Generation:
        """Those that serve."""
        return self._servers

    @property
    def is_serving(self) -> bool:
        """Whether there is a server, and nothing is being started or stopped."""
        return self._phase == "serving" and self._servers.is_whole

    @property
    def restarts(self) -> int:
        """How many servers there were before the one that serves."""
        return self._backoff.count

    @property
    def drain_max_s(self) -> float:
        """How long a server may take to answer what it has taken."""
        return self._config.drain_delay_s + self._config.drain_timeout_s

    def _asked(self, client: ControlClient, request: JsonObject) -> None:
        assert self._control is not None
        refusal = ""
        try:
            program = launch.Program(**request["program"])
        except (KeyError, TypeError):
            refusal = "this is no request for an upgrade; the pyserve that asks may be of another version"
        if self._upgrade is not None:
            refusal = "an upgrade is in progress already; try again when it is over"
        elif not self.is_serving:
            refusal = f"the server cannot be upgraded while it is {self._phase}; try again when it serves"
        if refusal:
            client.tell("failed", reason=refusal)
            self._control.drop(client)
            return
        self._service.reloading("an upgrade is in progress")
        self._upgrade = Upgrade(self, client, program)
        self._upgrade.begin()

    def take_over(self, servers: Generation, event: JsonObject) -> None:
        """``servers``, which have reported ``event``, serve from now on; the caller has those that did."""
        self._close_reports()
        if self._phase == "waiting":  # the others died while these began to accept
            self._phase = "serving"
        self._servers = servers
        self._started_at = self._ready_at = time.monotonic()
        self._await_reports()
        self._take_grpc(event.get("grpc") or {})

    def rehearse(self, program: launch.Program, output: BinaryIO) -> launch.Child:
        """A process of ``program`` that reports whether it could continue as this supervisor.

        Raises:
            OSError: it cannot be started.
        """
        assert self._image is not None
        return self._image.rehearse(program, self.to_json(), output)

    def become(self, upgrade: Upgrade) -> str:
        """Continues as the new build's supervisor: returns only if that cannot be, and why."""
        assert self._image is not None
        return self._image.become(upgrade.program, self.to_json(), upgrade.client)

    def upgrade_ended(self, status: str) -> None:
        """It has said how."""
        upgrade, self._upgrade = self._upgrade, None
        if upgrade is not None and self._control is not None:
            self._control.drop(upgrade.client)
        if self._phase == "serving":
            self._service.ready(status)
        elif self._phase == "waiting" and self._deadline is None:
            self._restart_or_end("ended while another one was to take its place")


def _passed_on(number: int) -> int:
    """Of the two signals that a server knows, the one to send for ``number``: it waits after SIGTERM."""
    return signal.SIGTERM if number == signal.SIGTERM else signal.SIGINT


def _wake(number: int, frame: FrameType | None) -> None:
    """Signals are taken from the wake-up socket; a handler must exist for the byte to be written there."""
