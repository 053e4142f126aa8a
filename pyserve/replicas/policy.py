"""How many replicas there are to be: by the work that arrives and how long requests wait, not by how many there are.

    wanted = replicas x load / 0.75, or as many as bring the wait to its target

`load` is what arrives beside what can be done (`pyserve/replicas/demand.py`): above 1 where a queue grows. It is looked
at in seconds; the wait, which is of chance, and of a queue that was and is being worked off, over a longer time. All
replicas count alike, a slow one among many not more than another. `bench/simulate_replicas.py` shows what this does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

LOAD_AIM = 0.75
# Of what there is, in one step: a bad measurement is not to order a cluster.
GROWTH_MAX = 2.0
# For the wait alone, which says that there are too few, not how many are missing: a queue that is long is not yet short
# when there are enough.
WAIT_GROWTH_MAX = 1.25
# One replica's wait counts as so many times the target at most, that a stuck one does not stand for all.
WAIT_OUTLIER = 4.0
# Fewer have to wait for less than this part of it.
WAIT_SHRINK = 0.75
# Above that, waiting is of a queue that grows, and says nothing of how it would be with more replicas.
_STEADY_MAX = 0.95
# Less than that is no reason.
_SLACK = 1e-6
# Of this long the mean of waits counts.
WAIT_SPAN_S = 30.0
# What was told is kept once in so long.
_STEP_S = 0.5


def wanted_replicas(
    replicas: int, load: float, wait_s: float, *, target_wait_s: float, replicas_min: int = 1, replicas_max: int = 1
) -> int:
    """The number that the load asks for.

    Args:
        replicas: that the load was measured on; 0 asks for the least.
        load: mean of what arrives at a replica, 1 being all that it can do.
        wait_s: mean of how long a new request would wait for a worker.
        target_wait_s: how long it may.

    Raises:
        ValueError: the target or the bounds are none.
    """
    if not target_wait_s > 0:
        raise ValueError(f"target_wait_s is {target_wait_s}; it must be above 0")
    if not 0 <= replicas_min <= replicas_max:
        raise ValueError(f"replicas from {replicas_min} to {replicas_max}; the first must not be above the second")
    wanted = max(_by_load(replicas, load), _by_wait(replicas, load, wait_s / target_wait_s))
    return min(max(wanted, replicas_min), replicas_max)


def _by_load(replicas: float, load: float) -> int:
    return math.ceil(replicas * _sane(load) / LOAD_AIM - _SLACK)


def _by_wait(replicas: float, load: float, waits: float) -> int:
    """How many wait no longer than the target, `WAIT_GROWTH_MAX` at most.

    The wait of a queue goes with load / (1 - load), and the load with 1 / replicas: which holds for growing and
    shrinking alike, so that it does not shrink to a number from which it would grow again.

    Args:
        waits: how many times the target is waited.
    """
    load, waits = _sane(load), _sane(waits)
    if not waits or not load:
        return 0
    steady = min(load, _STEADY_MAX)
    odds = steady / (1 - steady) / waits
    return math.ceil(replicas * min(steady * (1 + odds) / odds, WAIT_GROWTH_MAX) - _SLACK)


def _sane(value: float) -> float:
    """What a replica that has just begun may tell."""
    return value if math.isfinite(value) and value > 0 else 0.0


class WaitPolicy:
    """`wanted_replicas` as an autoscaling policy of Ray Serve, from what replicas record.

    There are more when all of the last ``upscale_delay_s`` asked for more, as many as the least of it; fewer when all
    of the last ``downscale_delay_s`` asked for fewer, as few as the most of it.

    Args:
        target_wait_s: see `wanted_replicas`.
        upscale_delay_s, downscale_delay_s: for how long more, or fewer, have to be asked for.
        to_zero_delay_s: for how long nothing may have arrived before there is no replica, where that is allowed.
    """

    def __init__(
        self, target_wait_s: float = 0.05, upscale_delay_s: float = 5.0, downscale_delay_s: float = 60.0,
        to_zero_delay_s: float = 300.0,
    ):  # fmt: skip
        self._target_wait_s = target_wait_s
        self._up_s = upscale_delay_s
        self._down_s = downscale_delay_s
        self._zero_s = to_zero_delay_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas that there are to be, and what the next call is to know.

        Args:
            context: Ray Serve's ``AutoscalingContext``.
        """
        target, now = context.target_num_replicas, context.current_time
        metrics = context.aggregated_metrics or {}
        loads, waits = metrics.get("load", {}), metrics.get("wait_s", {})
        if not loads:  # none runs, or the controller has just been started again: nothing is known
            return target, {}
        state = dict(context.policy_state or {})
        longest = WAIT_OUTLIER * self._target_wait_s
        seen = Seen(now, len(loads), _mean(_sane(each) for each in loads.values()),
                    _mean(min(_sane(each), longest) for each in waits.values()))  # fmt: skip
        kept_s = max(self._up_s, self._down_s, self._zero_s, WAIT_SPAN_S)
        history = state["history"] = self._noted(state.get("history", ()), seen, kept_s)
        wanted = self._wanted(history, now, target, state.get("raised_at", -math.inf))
        if wanted > target:
            state["raised_at"] = now
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, low), high), state

    def _wanted(self, history: list[Seen], now: float, target: int, raised_at: float) -> int:
        lately, long = _since(history, now - self._up_s), _since(history, now - self._down_s)
        if lately and now - raised_at >= self._up_s:
            more = max(history[-1].by_wait, min(_by_load(each.replicas, each.load) for each in lately))
            if more > target:
                return min(more, math.ceil(target * GROWTH_MAX))
        if long:
            fewer = max(max(each.to_keep, _by_load(each.replicas, each.load)) for each in long)
            idle = _since(history, now - self._zero_s)
            if not fewer and not (idle and all(each.load == 0 for each in idle)):
                fewer = 1
            return min(fewer, target)
        return target

    def _noted(self, history: Iterable[Seen], seen: Seen, kept_s: float) -> list[Seen]:
        """With ``seen``, at most one for each `_STEP_S`, and without what is older than ``kept_s``, but for one."""
        found = list(history)
        if not found or seen.time_s - found[-1].time_s >= _STEP_S:
            found.append(seen)
            lately = _since(found, seen.time_s - WAIT_SPAN_S)
            found[-1] = seen._replace(by_wait=self._by_wait(lately, 1.0), to_keep=self._by_wait(lately, WAIT_SHRINK))
        first = next((index for index, each in enumerate(found) if seen.time_s - each.time_s < kept_s), len(found))
        return found[max(0, first - 1) :]

    def _by_wait(self, lately: list[Seen], part: float) -> int:
        load, wait_s = _mean(each.load for each in lately), _mean(each.wait_s for each in lately)
        return _by_wait(_mean(each.replicas for each in lately), load, wait_s / (self._target_wait_s * part))


class Seen(NamedTuple):
    """What was told at a time: by how many replicas, and their means.

    Attributes:
        by_wait: replicas that the means of the last `WAIT_SPAN_S` ask for; 0 while there is less.
        to_keep: those that there are to be at least, if there are so many.
    """

    time_s: float
    replicas: int
    load: float
    wait_s: float
    by_wait: int = 0
    to_keep: int = 0


def _since(history: list[Seen], begin: float) -> list[Seen]:
    """What was seen since ``begin``; nothing if less is known."""
    if history[0].time_s > begin:
        return []
    return [each for each in history if each.time_s >= begin]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0
