"""How long the stages take that are Python's: a histogram per stage, beside those of the engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import add

# Seconds; 10 us to 10 s.
BOUNDS_S = (*(float(f"{digit}e{exponent}") for exponent in range(-5, 1) for digit in (1, 2.5, 5)), 10.0)


class StageTimes:
    """Of one stage of one model. Loop thread only."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._total_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self._total_s += seconds

    def histogram(self) -> tuple[tuple[float, ...], list[int], float]:
        """Bounds, counts (not cumulative, the last one of what is above all bounds) and the sum, as the engine's."""
        return BOUNDS_S, list(self._counts), self._total_s

    def add(self, counts: Sequence[int], total_s: float) -> None:
        """What another one has observed. REQUIRES: as many counts as it has."""
        self._counts[:] = map(add, self._counts, counts)
        self._total_s += total_s
