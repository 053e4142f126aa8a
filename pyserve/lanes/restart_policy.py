"""When a worker process that ended is followed by another one. No I/O; time is passed in.

What ended it decides:

    LOST      its zygote went, which is none of the model's: at once, and not counted
    KILLED    SIGKILL from outside, such as the kernel's out-of-memory killer: within a second each time
    DEVICE    its way to a GPU broke, which another process has anew: as KILLED
    MACHINE   no process could be had: descriptors, memory, room on a disk
    MODEL     its own code: an exception, an exit, a crash

- A worker that served and ended is followed by another one at once, the next ones after growing pauses; a worker that
  has served for SERVED_S starts this from the beginning.
- One that could not be loaded is tried again after growing pauses: at most PAUSE_MAX_S for ``retry_s`` from the first
  failure on, PAUSE_SLOW_S after that, without an end: what was wrong may be over at any time.
- Only a model that never had a worker is given up: at once for an error that would recur (an import, a syntax error, a
  missing file), else after TRIES.
- At most STARTS_MAX starts a minute of a model whose own code ends its workers.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from enum import Enum

SERVED_S = 30.0
# Of workers that had served, by how many ended in a row. A second is what users are promised; then it is a crash loop.
PAUSES_S = (0.0, 0.5, 0.75, 0.75, 0.75, 2.0, 4.0, 8.0)
KILLED_PAUSE_MAX_S = 0.75
LOAD_PAUSES_S = (0.0, 0.5, 0.75, 2.0, 4.0, 8.0)
PAUSE_MAX_S = 15.0
PAUSE_SLOW_S = 30.0
# As TorchServe's maxRetryTimeoutInSec.
RETRY_DEFAULT_S = 300.0
STARTS_MAX = 10
WINDOW_S = 60.0
# A start that comes within this is worth waiting for.
WAIT_MAX_S = 1.0


class Cause(Enum):
    """What ended a worker; see the module."""

    MODEL = "model"
    MACHINE = "machine"
    KILLED = "killed"
    LOST = "lost"
    DEVICE = "device"


# Failures in a row while loading after which callers do not wait any longer, and a model that never had a worker is
# given up.
TRIES = {Cause.MODEL: 3, Cause.KILLED: 3, Cause.DEVICE: 3, Cause.MACHINE: 5}


@dataclass(frozen=True)
class Decision:
    """What comes after a worker's end.

    Attributes:
        restarts: whether another worker is to be started, ``delay_s`` from now.
        reason: for the log.
        is_hopeless: whoever waits for the worker need not wait any longer.
    """

    restarts: bool
    delay_s: float
    reason: str
    is_hopeless: bool = False


class RestartPolicy:
    """Of all workers of one model.

    Args:
        retry_s: for how long loading is tried again quickly.
        jitter: draws from [0, 1); pauses are lengthened by up to a quarter, so that workers do not start together.

    Attributes:
        has_served: whether a worker has ever loaded.
    """

    def __init__(self, retry_s: float = RETRY_DEFAULT_S, jitter: random.Random | None = None):
        self._retry_s = retry_s
        self._jitter = jitter or random.Random()
        self._deaths = 0  # in a row
        self._load_failures = 0  # in a row; those of one round are one
        self._round_at = float("-inf")  # when the last of them was counted
        self._failing_since = 0.0
        self._restarts: deque[float] = deque()  # of the last minute
        self._ready_at: float | None = None
        self._open_until = 0.0
        self.has_served = False

    def reset(self) -> None:
        """Workers were asked for: earlier failures are forgotten."""
        self._deaths = self._load_failures = 0
        self._restarts.clear()
        self._open_until = 0.0

    def ready(self, now: float) -> None:
        """A worker has loaded."""
        self._load_failures = 0
        self._ready_at = now
        self.has_served = True

    def failed_to_load(
        self, now: float, *, repeats: bool = False, cause: Cause = Cause.MODEL, started_at: float | None = None
    ) -> Decision:
        """A worker could not be loaded.

        Args:
            repeats: the same error would come again.
            started_at: when its start began. Workers that were started together fail together, which counts once.
        """
        if cause is Cause.LOST:
            return Decision(True, 0.0, "the process that workers are forked from ended")
        if repeats and not self.has_served:
            return Decision(False, 0.0, "the same error would come again", is_hopeless=True)
        if started_at is None or started_at >= self._round_at:
            if not self._load_failures:
                self._failing_since = now
            self._load_failures += 1
            self._round_at = now
        times = self._load_failures
        is_hopeless = repeats or times >= TRIES[cause]
        reason = f"it failed {times} times in a row while loading" if times > 1 else "it failed while loading"
        if is_hopeless and not self.has_served:
            return Decision(False, 0.0, reason, is_hopeless=True)
        pause_s = _pause(LOAD_PAUSES_S, times - 1)
        if now - self._failing_since >= self._retry_s:
            pause_s = PAUSE_SLOW_S
        return self._after(now, pause_s, reason, is_hopeless=is_hopeless)

    def died(self, now: float, cause: Cause = Cause.MODEL, *, is_known: bool = False) -> Decision:
        """A worker that had loaded has ended by itself.

        Args:
            is_known: in the second run of a request that may have ended another one: no further sign of a crash loop.
        """
        if cause is Cause.LOST:
            return Decision(True, 0.0, "the process that workers are forked from ended")
        if self._ready_at is not None and now - self._ready_at >= SERVED_S:
            self._deaths = 0
        self._deaths += not (is_known and self._deaths)
        reason = f"{self._deaths} workers ended in a row"
        pause_s = _pause(PAUSES_S, self._deaths - 1)
        if cause in (Cause.KILLED, Cause.DEVICE):
            return Decision(True, self._spread(min(pause_s, KILLED_PAUSE_MAX_S)), reason)
        return self._after(now, pause_s, reason)

    def is_open(self, now: float) -> bool:
        """Whether nothing is started for a while, because too much was."""
        return now < self._open_until

    def _after(self, now: float, pause_s: float, reason: str, *, is_hopeless: bool = False) -> Decision:
        while self._restarts and now - self._restarts[0] >= WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= STARTS_MAX:
            # The oldest of the last STARTS_MAX makes room, so that of many that wait no two take the same place.
            delay_s = max(pause_s, WINDOW_S - (now - self._restarts[-STARTS_MAX]))
            self._open_until = now + delay_s
            self._restarts.append(now + delay_s)
            reason = f"{STARTS_MAX} workers were started in {WINDOW_S:g} s; {reason}"
            return Decision(True, delay_s, reason, is_hopeless=True)
        delay_s = self._spread(pause_s)
        self._restarts.append(now + delay_s)
        return Decision(True, delay_s, reason, is_hopeless=is_hopeless)

    def _spread(self, pause_s: float) -> float:
        return pause_s * (1 + self._jitter.random() / 4)


def _pause(pauses_s: tuple[float, ...], count: int) -> float:
    return pauses_s[count] if count < len(pauses_s) else PAUSE_MAX_S
