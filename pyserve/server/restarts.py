"""When a server that died is started again, and when not any more."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

BACKOFF_FIRST_S = 0.2
SERVED_BACKOFF_MAX_S = 0.8
"""Behind a server that served: it is promised to be back within a second and the time that loading takes."""
BACKOFF_MAX_S = 10.0
"""Behind one that was never ready."""
HEALTHY_AFTER_S = 60.0
NAMED_CAUSE_MAX_S = 300.0
"""How long a server that has served is started again while each start says why it fails; TorchServe gives workers as
much. A fault of the machine that is over by then leaves no trace; what is not will not end by itself."""


class ServerBackoff:
    """At once the first time, then capped exponential back-off with jitter, afresh after a healthy minute."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self.count = 0
        self._since_healthy = 0
        self._never_ready = 0

    def delay_s(self, served_s: float | None) -> float:
        """Seconds until the next start.

        Args:
            served_s: how long the server that has just ended had served; None if it was never ready.
        """
        if served_s is not None and served_s >= HEALTHY_AFTER_S:
            self._since_healthy = 0
        self.count += 1
        self._since_healthy += 1
        self._never_ready = 0 if served_s is not None else self._never_ready + 1
        if self._since_healthy == 1:
            return 0.0
        if served_s is not None:
            return self._jittered(SERVED_BACKOFF_MAX_S, self._since_healthy - 2)
        return self._jittered(BACKOFF_MAX_S, self._never_ready - 1)

    def _jittered(self, longest_s: float, exponent: int) -> float:
        # The exponent is capped too: 2.0 ** 1100 would overflow after a day of crashes.
        return min(longest_s, BACKOFF_FIRST_S * 2.0 ** min(exponent, 16)) * self._rng.uniform(0.5, 1.0)


class NamedCauses:
    """Since when starts have failed for reasons that they could name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._since: float | None = None

    def served(self) -> None:
        """A server was ready."""
        self._since = None

    def is_hopeless(self) -> bool:
        """To be called when a start has failed for such a reason: whether it is to be the last."""
        if self._since is None:
            self._since = self._clock()
        return self._clock() - self._since >= NAMED_CAUSE_MAX_S
