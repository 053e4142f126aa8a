"""Whether, and when, a worker process that ended is followed by another one. No I/O; time is passed in.

- An error that would recur (an import, a syntax error, a missing file) is final.
- A crash while loading is tried again, LOAD_TRIES times in all.
- A crash while serving is followed by another worker at once, the next ones with growing pauses; a worker that has
  served for SERVED_S starts this from the beginning.
- At most STARTS_MAX starts a minute: after that the breaker is open for the rest of it.

Times are seconds of a monotonic clock.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

LOAD_TRIES = 3
SERVED_S = 30.0
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 15.0
STARTS_MAX = 10
WINDOW_S = 60.0


@dataclass(frozen=True)
class Decision:
    """What comes after a worker's end.

    Attributes:
        restarts: whether another worker is to be started, ``delay_s`` from now.
        reason: for the log.
    """

    restarts: bool
    delay_s: float
    reason: str


class RestartPolicy:
    """Of all workers of one model.

    Args:
        jitter: draws from [0, 1); pauses are lengthened by up to a quarter, so that workers do not start together.
    """

    def __init__(self, jitter: random.Random | None = None):
        self._jitter = jitter or random.Random()
        self._deaths = 0  # in a row
        self._load_failures = 0  # in a row
        self._restarts: deque[float] = deque()  # of the last minute
        self._ready_at: float | None = None
        self._open_until = 0.0

    def reset(self) -> None:
        """Workers were asked for: earlier failures are forgotten."""
        self._deaths = self._load_failures = 0
        self._restarts.clear()
        self._open_until = 0.0

    def ready(self, now: float) -> None:
        """A worker has loaded."""
        self._load_failures = 0
        self._ready_at = now

    def failed_to_load(self, now: float, *, repeats: bool) -> Decision:
        """A worker could not be loaded. ``repeats``: the same error would come again."""
        if repeats:
            return Decision(False, 0.0, "the same error would come again")
        self._load_failures += 1
        if self._load_failures >= LOAD_TRIES:
            return Decision(False, 0.0, f"it failed {self._load_failures} times in a row while loading")
        return self._after(now, self._load_failures - 1, "it failed while loading")

    def died(self, now: float) -> Decision:
        """A worker that had loaded has ended by itself."""
        if self._ready_at is not None and now - self._ready_at >= SERVED_S:
            self._deaths = 0
        self._deaths += 1
        return self._after(now, self._deaths - 1, f"{self._deaths} workers ended in a row")

    def is_open(self, now: float) -> bool:
        """Whether nothing is started for a while, because too much was."""
        return now < self._open_until

    def retry_after_s(self, now: float) -> float:
        """When the next start comes, if the breaker is open."""
        return max(0.0, self._open_until - now)

    def _after(self, now: float, pauses: int, reason: str) -> Decision:
        while self._restarts and now - self._restarts[0] >= WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= STARTS_MAX:
            delay_s = WINDOW_S - (now - self._restarts[0])
            self._open_until = now + delay_s
            self._restarts.append(now + delay_s)
            return Decision(True, delay_s, f"{STARTS_MAX} workers were started in {WINDOW_S:g} s; {reason}")
        delay_s = 0.0
        if pauses > 0:
            delay_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(pauses - 1, 10)) * (1 + self._jitter.random() / 4)
        self._restarts.append(now + delay_s)
        return Decision(True, delay_s, reason)
