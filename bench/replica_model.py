"""A model of replicas: requests that come, wait, are batched and served one by one, and a policy that scales.

Every request is followed, no average is assumed. What a replica tells is worked out by the classes that do it in a
replica, from the counters that a lane has; how Ray Serve passes it on is taken from its documentation: a sample every
half second, sent every `Ray.interval_s`, the mean of the last `Ray.look_back_s`, a decision every second.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyserve.replicas.demand import Demand
from pyserve.telemetry.load_gauges import LoadGauges

SAMPLE_S = 0.5
Policy = Callable[[Any], tuple[int, dict[str, Any]]]


@dataclass(frozen=True)
class Service:
    """How long a batch takes.

    Attributes:
        mean_s: of one request by itself.
        each_s: of each further request in its batch; ``mean_s`` without a gain by batches.
        spread: 0 for always the same, 1 for exponentially distributed.
        batch_max: requests of a batch.
        workers: of a replica.
        queue_max: requests that may wait.
    """

    mean_s: float = 0.05
    each_s: float = 0.05
    spread: float = 1.0
    batch_max: int = 1
    workers: int = 1
    queue_max: int = 100

    @property
    def rate_max(self) -> float:
        """Requests per second that a replica can serve, in full batches."""
        return self.workers * self.batch_max / (self.mean_s + (self.batch_max - 1) * self.each_s)


@dataclass(frozen=True)
class Ray:
    """What Ray Serve does with what a policy says.

    Attributes:
        interval_s, look_back_s: of the metrics.
        upscale_delay_s, downscale_delay_s: that it waits by itself; 0 where the policy does.
        start_s: from the decision until a new replica takes requests.
    """

    interval_s: float = 2.0
    look_back_s: float = 3.0
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 0.0
    start_s: float = 5.0


class Chance:
    """Numbers from a seed, drawn many at once."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)
        self._exponential: list[float] = []
        self._uniform: list[float] = []

    def exponential(self) -> float:
        if not self._exponential:
            self._exponential = self.generator.exponential(size=8192).tolist()
        return self._exponential.pop()

    def below(self, count: int) -> int:
        if not self._uniform:
            self._uniform = self.generator.random(8192).tolist()
        return int(self._uniform.pop() * count)


class Replica:
    """A queue and workers."""

    def __init__(self, service: Service, chance: Chance, clock: Callable[[], float], slower: float = 1.0):
        self.waits: list[float] = []
        self.refused = 0
        self._service, self._chance, self._slower = service, chance, slower
        self._queue: deque[float] = deque()
        self._ends: list[tuple[float, float, int]] = []  # when a batch ends, how long it took, its requests
        self._batches = self._ended = self._submitted = 0
        self._busy_s = 0.0
        self._gauges, self._demand = LoadGauges(clock), Demand(clock)
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=64)

    @property
    def depth(self) -> int:
        """Requests that wait or run, by batches."""
        return len(self._queue) + len(self._ends)

    def depth_at(self, now: float) -> int:
        self.advance(now)
        return self.depth

    def arrive(self, now: float) -> None:
        self.advance(now)
        if len(self._ends) < self._service.workers:
            self._submitted += 1
            self._queue.append(now)
            self._begin(now)
        elif len(self._queue) < self._service.queue_max:
            self._submitted += 1
            self._queue.append(now)
        else:
            self.refused += 1

    def advance(self, now: float) -> None:
        """All that ends until ``now``."""
        while self._ends and self._ends[0][0] <= now:
            end, took, count = heapq.heappop(self._ends)
            self._batches += 1
            self._ended += count
            self._busy_s += took
            if self._queue:
                self._begin(end)

    def _begin(self, now: float) -> None:
        service, count = self._service, min(len(self._queue), self._service.batch_max)
        for _ in range(count):
            self.waits.append(now - self._queue.popleft())
        took = (service.mean_s + (count - 1) * service.each_s) * self._slower
        if service.spread:
            took *= (1 - service.spread) + service.spread * self._chance.exponential()
        heapq.heappush(self._ends, (now + took, took, count))

    def sample(self, now: float) -> None:
        """What it tells is worked out."""
        self.advance(now)
        stats = {
            "staging": ((), (), 0.0), "inference": ((), (), self._busy_s), "batches": self._batches,
            "batch_size": ((), (), float(self._ended)), "submitted": self._submitted, "running": len(self._ends),
            "queue_size": len(self._queue),
        }  # fmt: skip
        workers = self._service.workers
        busy, wait_s = self._gauges.look(stats, workers)
        self._samples.append((busy, self._demand.look(stats, workers, self.refused, self._service.batch_max), wait_s))

    def told(self, look_back_s: float) -> tuple[float, float, float]:
        """Means of what was sampled lately: busy, load, wait in s."""
        count = min(len(self._samples), max(1, round(look_back_s / SAMPLE_S)))
        last = list(self._samples)[-count:]
        return tuple(sum(each) / count for each in zip(*last, strict=True))


def chosen(replicas: list[Replica], chance: Chance, way: str, now: float) -> Replica:
    """Where a request goes: ``random``, ``two`` (the shorter queue of two by chance, as Ray Serve does), ``least``."""
    count = len(replicas)
    if way == "least":
        return min(replicas, key=lambda each: each.depth_at(now))
    first = replicas[chance.below(count)]
    if way == "random" or count == 1:
        return first
    second = replicas[chance.below(count)]
    return first if first.depth_at(now) <= second.depth_at(now) else second


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        waits: of each request that was taken, in s, in no order.
        refused: requests that were not.
        sizes: (s, replicas that there are or start, replicas that serve), one each second.
        spent_s: replica seconds.
        needed_s: those of as many replicas at each moment as are needed for 0.75 of their time, and one at least.
    """

    waits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    refused: int = 0
    sizes: list[tuple[float, int, int]] = field(default_factory=list)
    spent_s: float = 0.0
    needed_s: float = 0.0

    def wait_s(self, percentile: float) -> float:
        return float(np.percentile(self.waits, percentile)) if len(self.waits) else 0.0

    @property
    def cost(self) -> float:
        """Replica seconds of those that were needed."""
        return self.spent_s / self.needed_s

    @property
    def turns(self) -> int:
        """How often it grew after it had shrunk, or shrank after it had grown."""
        targets = [target for _, target, _ in self.sizes]
        steps = [after - before for before, after in itertools.pairwise(targets) if after != before]
        return sum(1 for before, after in itertools.pairwise(steps) if (before > 0) != (after > 0))

    def reached(self, count: int) -> float | None:
        """When so many replicas served; None if never."""
        return next((time for time, _, serving in self.sizes if serving >= count), None)


class Cluster:
    """Replicas, requests and a policy, over some minutes.

    Args:
        rate: requests per second at a second.
        bounds: of the number of replicas.
        start: replicas at the beginning.
        slower: of a number, how many times slower that replica is.
        route: see `chosen`.
    """

    def __init__(
        self, service: Service, rate: Callable[[float], float], *, policy: Policy | None = None,
        bounds: tuple[int, int] = (1, 1000), start: int = 1, ray: Ray | None = None, seed: int = 1,
        slower: dict[int, float] | None = None, route: str = "two",
    ):  # fmt: skip
        if not 1 <= bounds[0] <= start <= bounds[1]:
            raise ValueError(f"{start} replicas of {bounds[0]} to {bounds[1]}; the model has one at least")
        self.now = 0.0
        self._service, self._rate, self._policy, self._bounds = service, rate, policy, bounds
        self._ray, self._slower, self._route = ray or Ray(), slower or {}, route
        self._chance = Chance(seed)
        self._made = 0
        self._serving = [self._new() for _ in range(start)]
        self._leaving: list[Replica] = []
        self._coming: deque[float] = deque()  # when each is ready
        self._sent: dict[int, tuple[float, float, float]] = {}  # by id of the replica, what it told last
        self._state: dict[str, Any] = {}
        self._counter = 0
        self._gone: list[Replica] = []
        self.outcome = Outcome()

    def _new(self) -> Replica:
        self._made += 1
        return Replica(self._service, self._chance, lambda: self.now, self._slower.get(self._made - 1, 1.0))

    def run(self, seconds: float) -> Outcome:
        steps = round(seconds / SAMPLE_S)
        for step in range(steps):
            begin = step * SAMPLE_S
            self._requests(begin)
            self.now = begin + SAMPLE_S
            self._tick()
            if step % round(1 / SAMPLE_S) == 1:
                self._decide()
        everyone = self._gone + self._serving + self._leaving
        self.outcome.waits = np.concatenate([np.array(each.waits) for each in everyone])
        self.outcome.refused = sum(each.refused for each in everyone)
        return self.outcome

    def _requests(self, begin: float) -> None:
        generator = self._chance.generator
        count = int(generator.poisson(self._rate(begin) * SAMPLE_S))
        times = np.sort(generator.random(count) * SAMPLE_S + begin).tolist()
        serving, chance, route = self._serving, self._chance, self._route
        for time in times:
            chosen(serving, chance, route, time).arrive(time)

    def _tick(self) -> None:
        while self._coming and self._coming[0] <= self.now:
            self._coming.popleft()
            self._serving.append(self._new())
        for each in self._serving:
            each.sample(self.now)
        for each in self._leaving:
            each.advance(self.now)
        self._gone += [each for each in self._leaving if not each.depth]
        self._leaving = [each for each in self._leaving if each.depth]
        if self.now % self._ray.interval_s < SAMPLE_S:
            self._sent = {id(each): each.told(self._ray.look_back_s) for each in self._serving}
        there = len(self._serving) + len(self._coming) + len(self._leaving)
        self.outcome.spent_s += there * SAMPLE_S
        needed = math.ceil(self._rate(self.now) / (self._service.rate_max * 0.75))
        self.outcome.needed_s += max(needed, self._bounds[0]) * SAMPLE_S

    def _decide(self) -> None:
        target = len(self._serving) + len(self._coming)
        self.outcome.sizes.append((self.now, target, len(self._serving)))
        if self._policy is None:
            return
        told, names = self._sent, ("busy", "load", "wait_s")
        context = SimpleNamespace(
            current_num_replicas=len(self._serving), target_num_replicas=target, current_time=self.now,
            capacity_adjusted_min_replicas=self._bounds[0], capacity_adjusted_max_replicas=self._bounds[1],
            aggregated_metrics={name: {key: each[at] for key, each in told.items()} for at, name in enumerate(names)},
            policy_state=self._state,
        )  # fmt: skip
        wanted, self._state = self._policy(context)
        self._scale(self._delayed(wanted, target), target)

    def _delayed(self, wanted: int, target: int) -> int:
        """As Ray Serve does: a decision counts when it was the same way for a number of seconds in a row."""
        way = (wanted > target) - (wanted < target)
        self._counter = self._counter + way if way * self._counter >= 0 and way else way
        delay_s = self._ray.upscale_delay_s if way > 0 else self._ray.downscale_delay_s
        if way and abs(self._counter) > delay_s:
            self._counter = 0
            return wanted
        return target

    def _scale(self, wanted: int, target: int) -> None:
        for _ in range(wanted - target):
            self._coming.append(self.now + self._ray.start_s)
        for _ in range(target - wanted):
            if self._coming:
                self._coming.pop()
            elif self._serving:
                leaving = self._serving.pop()
                self._sent.pop(id(leaving), None)
                self._leaving.append(leaving)
