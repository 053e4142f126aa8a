"""Another build of pyserve takes a running server's place: `pyserve upgrade`, from the request to its end.

    step       what happens                                                    leaves it when
    trying     the new build's supervisor reads, in a process of its own,      it could continue -> holding
               what it would continue with
    holding    the old server refuses changes of models                        none is under way -> loading
    loading    a new server loads what the old one has, and warms it           it has -> opening
    opening    it begins to accept, beside the old one                         it answers -> draining
    draining   the old one accepts no more and answers what it has taken       it has ended -> trying again
    trying     as at first                                                     this process becomes the new build's
    again

Up to `opening` anything that goes wrong ends the new server, and leaves the old one as it was. From then on there is
nothing to return to: what goes wrong with the new server is met as ever, by another one. While it begins to accept
it may have taken requests already: if pyserve is stopped then, both servers answer what they have; if the old one
dies, the new one serves as soon as it can.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from pyserve import launch
from pyserve.errors import JsonObject
from pyserve.os_errors import cause_of
from pyserve.server.control import ControlClient
from pyserve.server.generation import Generation
from pyserve.server.orders import Order

TRYING_S = 60.0
HOLDING_S = 300.0
OPENING_S = 90.0
DRAIN_GRACE_S = 5.0

TRYING, HOLDING, LOADING, OPENING, DRAINING, TRYING_AGAIN = range(6)
_TOLD_LINES_MAX = 20

logger = logging.getLogger("pyserve.supervisor")


class Host(Protocol):
    """What an upgrade asks of the supervisor."""

    @property
    def servers(self) -> Generation:
        """Those that serve."""

    @property
    def is_serving(self) -> bool:
        """Whether there is a server, and nothing is being started or stopped."""

    @property
    def drain_max_s(self) -> float:
        """How long a server may take to answer what it has taken."""

    @property
    def restarts(self) -> int: ...

    def wait_for(self, fd: int, read: Callable[[], None]) -> None: ...

    def forget(self, fd: int) -> None: ...

    def new_generation(self, program: launch.Program) -> Generation: ...

    def take_over(self, servers: Generation, event: JsonObject) -> None:
        """``servers`` serve from now on."""

    def rehearse(self, program: launch.Program, output: BinaryIO) -> launch.Child: ...

    def become(self, upgrade: Upgrade) -> str:
        """Why this process could not become the new build's; does not return if it does."""

    def upgrade_ended(self, status: str) -> None: ...


class Upgrade:
    """Main thread of the supervisor only.

    Args:
        client: who asked.
        program: the new build.

    Attributes:
        deadline: when it is to be looked at, s of ``time.monotonic()``; None for never.
    """

    def __init__(self, host: Host, client: ControlClient, program: launch.Program):
        self.client = client
        self.program = program
        self.deadline: float | None = None
        self._host = host
        self._step = TRYING
        self._trial: launch.Child | None = None
        self._trial_reports: launch.ReportReader | None = None
        self._trial_output: BinaryIO | None = None
        self._new: Generation | None = None
        self._old: Generation | None = None
        self._failed_before: list[list[str]] = []
        self._before: list[list[str]] = []  # what the old server has, by model and version
        self._failure = ""
        self._is_over = False

    @property
    def is_draining(self) -> bool:
        """Whether servers that were replaced still answer what they had taken."""
        return self._old is not None and self._old.process is not None

    def begin(self) -> None:
        self.client.on_gone = lambda: self.give_up("the command that asked for it has gone")
        self._say("trying whether the new build can continue")
        self._try()

    def look(self) -> None:
        """To be called in each turn of the supervisor's loop."""
        if self._is_over:
            return
        if self._trial is not None and self._trial.popen.poll() is not None:
            self._take_trial_reports()
        if self._new is not None and self._new.process is not None and self._new.process.poll() is not None:
            self._take_reports()  # the last, which may say why, or that it answers
        if self._new is not None and self._new.process is not None and self._new.process.poll() is not None:
            self.give_up(self._failure or f"the new server {launch.describe_exit(self._new.process.wait())}; "
                                          "the log has the reason")  # fmt: skip
        if self._step == DRAINING:
            self._look_at_old()
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            self._out_of_time()

    def held(self, event: JsonObject) -> None:
        """The old server refuses changes of models, and none is under way."""
        if self._step != HOLDING:
            return
        self._failed_before = [list(map(str, each)) for each in event.get("failed", [])]
        self._before = [list(map(str, each)) for each in event.get("models", [])]
        self._step, self.deadline = LOADING, None
        self._say("a new server loads the models")
        self._new = self._host.new_generation(self.program)
        try:
            self._new.start(max(1, self._host.restarts), is_successor=True)
        except OSError as error:
            self.give_up(f"the new server could not be started: {cause_of(error)}")
            return
        assert self._new.process is not None and self._new.reports is not None
        logger.info("upgrade: new server started (pid %d)", self._new.process.pid)
        self._host.wait_for(self._new.reports.fd, self._take_reports)

    def stop(self, number: int) -> None:
        """Pyserve is being stopped, and its server gets the signal ``number``."""
        new = self._new
        if self._step != OPENING or self._is_over or new is None or new.process is None:
            self.give_up("pyserve is being stopped")
            return
        logger.info("upgrade: pyserve is being stopped; the new server answers what it has taken, too")
        if new.reports is not None:
            self._host.forget(new.reports.fd)
            new.close_reports()
        self._new, self._old = None, new
        self._step, self.deadline = DRAINING, time.monotonic() + self._host.drain_max_s + DRAIN_GRACE_S
        new.process.send_signal(number)
        self.client.tell("failed", reason="pyserve is being stopped")

    def old_ended(self, how: str) -> bool:
        """The server that was to be replaced has ended by itself.

        Returns:
            Whether the new one is about to serve in its place; if that fails, `Host.upgrade_ended` is called.
        """
        if self._step == OPENING and not self._is_over:
            logger.error("upgrade: the old server %s; the new one, which begins to accept, takes its place", how)
            return True
        self.give_up(f"the server that was to be replaced {how}; another one of its build is started")
        return False

    def give_up(self, reason: str) -> None:
        """Leaves the old server as it was, unless another one serves in its place already."""
        if self._step >= DRAINING or self._is_over:
            return
        self._is_over = True
        has_old = self._host.servers.process is not None
        logger.error("upgrade: %s; %s", reason, "the old server continues" if has_old else "there is no server")
        self._end_trial()
        self._end_new()
        if self._step >= HOLDING:
            self._host.servers.order(Order.RELEASE)
        self.client.tell("failed", reason=reason)
        self._host.upgrade_ended("serving; an upgrade failed")

    def close(self) -> None:
        """Ends all of its processes at once: the supervisor ends."""
        self._end_trial()
        self._end_new()
        if self._old is not None:
            self._old.kill()
            self._old.front_ends.kill()
            self._old.close()
            self._old = None

    def _say(self, text: str) -> None:
        logger.info("upgrade: %s", text)
        self.client.tell("step", text=text)

    def _out_of_time(self) -> None:
        self.deadline = None
        if self._step == HOLDING:
            self.give_up(f"changes of models were under way for {HOLDING_S:.0f} s; try again when they have ended")
        elif self._step == OPENING:
            self.give_up(f"the new server did not accept within {OPENING_S:.0f} s")
        elif self._step == TRYING:
            self.give_up(f"the new build's supervisor said nothing within {TRYING_S:.0f} s")
        else:
            self._tried(f"it said nothing within {TRYING_S:.0f} s")

    # the new build's supervisor

    def _try(self) -> None:
        self.deadline = time.monotonic() + TRYING_S
        self._trial_output = launch.stderr_file()
        try:
            self._trial = self._host.rehearse(self.program, self._trial_output)
        except OSError as error:
            self._tried(f"{self.program.supervisor[0]} cannot be started: {cause_of(error)}")
            return
        self._trial_reports = launch.ReportReader(self._trial.reports_fd)
        self._host.wait_for(self._trial_reports.fd, self._take_trial_reports)

    def _take_trial_reports(self) -> None:
        if self._trial_reports is None:
            return
        for event in self._trial_reports.read():
            if event["event"] == "rehearsed":
                self._tried("")
                return
            if event["event"] == "failed":
                self._tried(str(event.get("reason")))
                return
        if self._trial_reports.at_end:
            assert self._trial_output is not None
            self._trial_output.seek(0)
            lines = self._trial_output.read(1 << 16).decode(errors="replace").splitlines()[-_TOLD_LINES_MAX:]
            for line in lines:
                logger.error("upgrade: %s", line)
            self._tried(lines[-1] if lines else "it ended without a word")

    def _tried(self, problem: str) -> None:
        """``problem``: ``""`` for none."""
        self._end_trial()
        self.deadline = None
        if self._step == TRYING:
            if problem:
                self.give_up(f"the new build's supervisor cannot continue: {problem}")
                return
            self._step, self.deadline = HOLDING, time.monotonic() + HOLDING_S
            self._host.servers.order(Order.HOLD)
            return
        if not problem and not self._host.is_serving:  # its server has just ended: again when another one serves
            self._step = DRAINING
            return
        problem = problem or self._host.become(self)
        self._is_over = True
        logger.error("upgrade: the new build's server serves, but its supervisor cannot continue: %s", problem)
        note = f"the supervisor is still the old build's, since the new one's cannot continue: {problem}"
        self.client.tell("upgraded", pid=os.getpid(), version=self.program.version, note=note)
        self._host.upgrade_ended("serving; the supervisor is still the old build's")

    def _end_trial(self) -> None:
        if self._trial_reports is not None:
            self._host.forget(self._trial_reports.fd)
            self._trial_reports.close()
            self._trial_reports = None
        if self._trial is not None:
            self._trial.popen.kill()
            self._trial.popen.wait()
            self._trial = None
        if self._trial_output is not None:
            self._trial_output.close()
            self._trial_output = None

    # the new server

    def _take_reports(self) -> None:
        new = self._new
        if new is None or new.reports is None:
            return
        for event in new.reports.read():
            if event["event"] == "progress":
                self.client.tell(**event)
            elif event["event"] == "failed":
                self._failure = f"the new server cannot serve: {event.get('reason')}"
            elif event["event"] == "loaded" and self._step == LOADING:
                self._loaded(event)
            elif event["event"] == "ready" and self._step == OPENING:
                self._switch(event)
                return
            if self._is_over:
                return
        if new.reports.at_end:
            self._host.forget(new.reports.fd)
            new.close_reports()

    def _loaded(self, event: JsonObject) -> None:
        assert self._new is not None
        failed = [row for row in event.get("models", []) if row.get("state") == "FAILED"]
        for row in event.get("models", []):
            if row.get("note"):
                self.client.tell("note", text=f"{row['model']} {row['version']}: {row['note']}")
        worse = [row for row in failed if [str(row["model"]), str(row["version"])] not in self._failed_before]
        if worse:
            first = worse[0]
            self.give_up(f"the new build cannot serve {first['model']} {first['version']}, which the old one serves: "
                         f"{first.get('error') or 'it FAILED'}")  # fmt: skip
            return
        there = [[str(row["model"]), str(row["version"])] for row in event.get("models", [])]
        missing = [each for each in self._before if each not in there]
        if missing:
            self.give_up(f"the new server has no {' '.join(missing[0])}, which the old one has: the archive's file has "
                         "changed since it was loaded; register it again, or bring the file back")  # fmt: skip
            return
        self._step, self.deadline = OPENING, time.monotonic() + OPENING_S
        self._say("the new server begins to accept")
        self.client.on_gone = lambda: None  # it may have taken requests by then, which end with it
        self._new.order(Order.OPEN)

    def _switch(self, event: JsonObject) -> None:
        new, old = self._new, self._host.servers
        assert new is not None and new.reports is not None
        self._new, self._old = None, old
        self._step, self.deadline = DRAINING, time.monotonic() + self._host.drain_max_s + DRAIN_GRACE_S
        self._host.forget(new.reports.fd)
        self._host.take_over(new, event)
        self._say("the new server serves; the old one answers what it has taken")
        old.order(Order.GIVE_WAY)

    def _end_new(self) -> None:
        new, self._new = self._new, None
        if new is not None:
            if new.reports is not None:
                self._host.forget(new.reports.fd)
            new.front_ends.kill()
            new.kill()
            new.close()

    # the old server

    def _look_at_old(self) -> None:
        old = self._old
        if old is not None and old.process is not None:
            if old.process.poll() is None:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    self.deadline = None
                    logger.error("upgrade: a server has not ended in time; killing it")
                    old.process.kill()
                return
            logger.info("upgrade: the other server %s", launch.describe_exit(old.ended()))
        if old is not None:
            old.front_ends.stop()
            old.close()
            self._old = None
        self.deadline = None
        if self._host.is_serving:
            self._step = TRYING_AGAIN
            self._try()
