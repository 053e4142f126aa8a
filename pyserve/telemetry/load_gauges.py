"""How busy a model is, for autoscalers: the share of time its workers run, and how long a new request would wait.

Both are of the last seconds, from counters that the engine keeps anyway: nothing is done between two scrapes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from prometheus_client.metrics_core import Metric

from pyserve.errors import JsonObject

WINDOW_S = 15.0
# Scrapes closer than this share one mark, so that several scrapers do not shorten the window.
STEP_S = 1.0


M = TypeVar("M")


def serving(models: Iterable[M]) -> Iterator[tuple[M, JsonObject, int]]:
    """Those of the measured models that serve, with their statistics and how many workers may run batches at once."""
    for model in models:
        measured: Any = model
        stats = measured.stats()
        if stats:
            ready = sum(1 for row in measured.worker_rows() if row.status == "READY")
            yield model, stats, min(ready, stats.get("running_max", ready))


def busy_seconds(stats: JsonObject) -> float:
    """How long workers have run batches, of the statistics of a lane."""
    # On an accelerator the stages of two batches overlap: there, what counts is that it computes.
    computed_s: float = stats["compute"][2] if "compute" in stats else 0.0
    busy_s: float = computed_s or stats["staging"][2] + stats["inference"][2]
    return busy_s


class LoadGauges:
    """One version of a model. Loop thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks: deque[tuple[float, float, int, float]] = deque()

    def look(self, stats: JsonObject, workers: int) -> tuple[float, float]:
        """Busy share of the workers, 0..1, and the predicted wait in seconds.

        Args:
            stats: of the lane.
            workers: that may run batches at once.
        """
        now = self._clock()
        busy_s = busy_seconds(stats)
        batches, requests = stats["batches"], stats["batch_size"][2]
        while len(self._marks) > 1 and now - self._marks[1][0] >= WINDOW_S:
            self._marks.popleft()
        then, busy_then_s, batches_then, requests_then = self._marks[0] if self._marks else (now, 0.0, 0, 0.0)
        if self._marks and batches < self._marks[-1][2]:  # another lane has taken its place
            self._marks.clear()
            then, busy_then_s, batches_then, requests_then = now, 0.0, 0, 0.0
        if not self._marks or now - self._marks[-1][0] >= STEP_S:
            self._marks.append((now, busy_s, batches, requests))
        running = min(1.0, stats["running"] / workers) if workers else 0.0
        share = min(1.0, max(0.0, busy_s - busy_then_s) / ((now - then) * workers)) if workers and now > then else 0.0
        # A batch is in the counters when it has ended: one that runs for long shows by running.
        utilization = max(share, running) if now - then < STEP_S or batches == batches_then else share
        if batches == batches_then:
            busy_then_s, batches_then, requests_then = 0.0, 0, 0.0  # nothing ended lately: the mean of all
        wait_s = 0.0
        if batches > batches_then and stats["queue_size"]:
            batch_s = (busy_s - busy_then_s) / (batches - batches_then)
            per_batch = max(1.0, (requests - requests_then) / (batches - batches_then))
            wait_s = stats["queue_size"] / per_batch * batch_s / max(1, workers)
        return utilization, wait_s


def load_families(loads: Iterable[tuple[Any, float, float]]) -> Iterator[Metric]:
    """For a scrape, of `Metrics.loads`."""
    busy = Metric("pyserve_worker_utilization", "Share of the last seconds that the workers were busy.", "gauge")
    wait = Metric("pyserve_predicted_wait_seconds", "How long a new request would wait for a worker.", "gauge")
    for model, share, wait_s in loads:
        labels = {"model": model.name, "version": model.version}
        busy.add_sample(busy.name, labels, share)
        wait.add_sample(wait.name, labels, wait_s)
    yield from (busy, wait)
