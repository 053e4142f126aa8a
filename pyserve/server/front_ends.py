"""The supervisor's side of front ends: starts them, and starts those anew that end."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable

from pyserve import launch
from pyserve.os_errors import cause_of
from pyserve.server.restarts import ServerBackoff

# For front ends to say the last to their clients, when the engine has ended and the supervisor is about to.
STOP_S = 1.0
_LOOK_S = 0.01

logger = logging.getLogger("pyserve.supervisor")


class _Slot:
    """One front end, through all of its processes."""

    def __init__(self, number: int):
        self.number = number
        self.backoff = ServerBackoff(random.Random())
        self.process: launch.Process | None = None
        self.started_at = 0.0
        self.due_at: float | None = None


class FrontEnds:
    """Main thread of the supervisor only.

    Args:
        count: how many there are to be; 0 if the server has none.
        start: starts the one of a number; raises OSError if that cannot be done.
    """

    def __init__(self, count: int, start: Callable[[int], launch.Child]):
        self._slots = [_Slot(number) for number in range(count)]
        self._start = start

    @property
    def deadline(self) -> float | None:
        """When the next one is to be started, s of ``time.monotonic()``; None if all run."""
        return min((slot.due_at for slot in self._slots if slot.due_at is not None), default=None)

    @property
    def pids(self) -> list[int | None]:
        """Of each front end; None for one that does not run."""
        return [slot.process.pid if slot.process is not None else None for slot in self._slots]

    def adopt(self, pids: list[int | None]) -> None:
        """Takes over those that this process started before it became another program."""
        for slot, pid in zip(self._slots, pids, strict=True):
            slot.started_at = time.monotonic()
            slot.process = None if pid is None else launch.AdoptedProcess(pid)

    def start_missing(self) -> None:
        """Starts those that do not run: the engine is being started, and will want them."""
        for slot in self._slots:
            if slot.process is None:
                self._run(slot)

    def look(self, *, starts: bool) -> None:
        """Notices those that have ended.

        Args:
            starts: whether they are started again.
        """
        now = time.monotonic()
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is not None:
                code = slot.process.returncode
                slot.process = None
                if starts and code != launch.EXIT_DRAINED:  # one that was told to end is started with the next engine
                    delay_s = slot.backoff.delay_s(now - slot.started_at)
                    slot.due_at = now + delay_s
                    logger.error("front end %d %s; starting it again%s", slot.number, launch.describe_exit(code),
                                 f" in {delay_s:.1f} s" if delay_s else "")  # fmt: skip
            if starts and slot.due_at is not None and now >= slot.due_at:
                self._run(slot)

    def stop(self) -> None:
        """Gives them a moment, and kills those that still run."""
        deadline = time.monotonic() + STOP_S
        while any(slot.process is not None for slot in self._slots) and time.monotonic() < deadline:
            self.look(starts=False)
            time.sleep(_LOOK_S)
        self.kill()

    def kill(self) -> None:
        """Ends those that still run."""
        for slot in self._slots:
            slot.due_at = None
            if slot.process is not None:
                slot.process.kill()
                slot.process.wait()
                slot.process = None

    def _run(self, slot: _Slot) -> None:
        slot.started_at = time.monotonic()
        slot.due_at = None
        try:
            child = self._start(slot.number)
        except OSError as error:
            logger.error("front end %d could not be started: %s", slot.number, cause_of(error))
            slot.due_at = slot.started_at + max(0.2, slot.backoff.delay_s(None))
            return
        slot.process = child.popen
        os.close(child.reports_fd)  # what it has to say is in the log
        logger.info("front end %d started (pid %d)", slot.number, slot.process.pid)
