"""How much a model is asked to do, of what its workers can do.

Not how busy they are, which ends at 1: more than that arrives where a queue grows, or where requests are refused.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pyserve.errors import JsonObject
from pyserve.telemetry.load_gauges import busy_seconds, serving

if TYPE_CHECKING:
    from pyserve.models.registry import Registry
    from pyserve.telemetry.metrics import Metrics

WINDOW_S = 5.0
STEP_S = 0.5
# Of what was noted before, each time: half of it is of the last twenty seconds.
_KEPT = 0.983
# How much the size of batches has to have differed: by a tenth of its mean.
_VARIED = 0.01


class _Mark(NamedTuple):
    time_s: float
    busy_s: float
    batches: int
    ended: float
    arrived: float


class BatchCost:
    """What a request costs in a full batch, from what batches of any size have taken: a batch takes a time by itself,
    and some more for each of its requests.

    A worker is busy whatever the size of its batch. That there is room for more requests in each shows by this alone.
    """

    def __init__(self) -> None:
        self._batches_2 = self._both = self._requests_2 = self._batches_s = self._requests_s = 0.0

    def note(self, batches: float, requests: float, busy_s: float) -> None:
        """Of a while."""
        if batches:
            self._batches_2 = self._batches_2 * _KEPT + batches * batches
            self._both = self._both * _KEPT + batches * requests
            self._requests_2 = self._requests_2 * _KEPT + requests * requests
            self._batches_s = self._batches_s * _KEPT + batches * busy_s
            self._requests_s = self._requests_s * _KEPT + requests * busy_s

    def full(self, batch_max: int, plain_s: float) -> float:
        """Seconds of a worker; ``plain_s``, what they cost now, if sizes have not differed enough to say."""
        determinant = self._batches_2 * self._requests_2 - self._both**2
        if batch_max < 2 or determinant <= _VARIED * self._batches_2 * self._requests_2:
            return plain_s
        batch_s = (self._batches_s * self._requests_2 - self._requests_s * self._both) / determinant
        request_s = (self._requests_s * self._batches_2 - self._batches_s * self._both) / determinant
        if request_s < 0:
            batch_s, request_s = self._batches_s / self._batches_2, 0.0
        return min(plain_s, max(0.0, batch_s) / batch_max + request_s)


class Demand:
    """One version of a model. Loop thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._marks: deque[_Mark] = deque()
        self._cost = BatchCost()

    def look(self, stats: JsonObject, workers: int, refused: int = 0, batch_max: int = 1) -> float:
        """Worker seconds that the requests of the last seconds take, beside those that there were: 0.5 is half of what
        can be done, 2 is twice as much.

        Args:
            stats: of the lane.
            workers: that may run batches at once.
            refused: requests that were not taken since the lane began.
            batch_max: requests of a full batch.
        """
        ended, batches = stats["batch_size"][2], stats["batches"]
        now = _Mark(self._clock(), busy_seconds(stats), batches, ended, stats["submitted"] + refused)
        while len(self._marks) > 1 and now.time_s - self._marks[1].time_s >= WINDOW_S:
            self._marks.popleft()
        if self._marks and (batches < self._marks[-1].batches or now.arrived < self._marks[-1].arrived):
            self._marks.clear()  # another lane has taken its place
        then = self._marks[0] if self._marks else now
        if not self._marks or now.time_s - self._marks[-1].time_s >= STEP_S:
            if self._marks:
                last = self._marks[-1]
                self._cost.note(batches - last.batches, ended - last.ended, now.busy_s - last.busy_s)
            self._marks.append(now)
        passed_s = now.time_s - then.time_s
        if not workers or not passed_s:
            return 0.0
        running = min(1.0, stats["running"] / workers)
        if batches == then.batches:  # of what began and has not ended nothing is known but that it runs
            cost_s = now.busy_s / ended if ended else 0.0
            return max(running, (now.arrived - then.arrived) * cost_s / (passed_s * workers))
        cost_s = (now.busy_s - then.busy_s) / max(1.0, now.ended - then.ended)
        return (now.arrived - then.arrived) * self._cost.full(batch_max, cost_s) / (passed_s * workers)


class Demands:
    """`Demand` of all models of an engine. Loop thread only."""

    def __init__(self) -> None:
        self._by_version: dict[tuple[str, str], Demand] = {}

    def look(self, metrics: Metrics, registry: Registry) -> float:
        """Of the model of which the most is asked, in what it can do."""
        known, found = self._by_version, 0.0
        self._by_version = {}
        defaults = {(model.name, model.version) for model in registry.default_models()}
        for model, stats, workers in serving(registry.all_models()):
            key = (model.name, model.version)
            demand = self._by_version[key] = known.get(key) or Demand()
            # Why a version refused is counted by the model's name.
            refused = metrics.refused_count(model.name) if key in defaults else 0
            found = max(found, demand.look(stats, workers, refused, model.settings.batch_size))
        return found
