"""How many replicas the load asks for."""

from __future__ import annotations

import asyncio
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.replicas.arguments import Arguments
from pyserve.replicas.deployment import options
from pyserve.replicas.policy import WaitPolicy, wanted_replicas
from pyserve.replicas.replica import Replica
from pyserve.serving import ServingError


def wanted(replicas: int, load: float, wait_s: float = 0.0, low: int = 1, high: int = 8) -> int:
    return wanted_replicas(replicas, load, wait_s, target_wait_s=0.05, replicas_min=low, replicas_max=high)


@pytest.mark.parametrize(
    ("replicas", "load", "wait_s", "expected"),
    [
        (1, 0.0, 0.0, 1),
        (1, 0.75, 0.0, 1),
        (1, 0.76, 0.0, 2),
        (1, 3.0, 0.0, 4),  # more arrives than can be done
        (4, 0.75, 0.0, 4),
        (4, 0.57, 0.0, 4),  # three would be busier than the aim
        (4, 0.56, 0.0, 3),
        (4, 0.0, 0.0, 1),
        (4, 0.5, 0.05, 4),  # it waits as long as it may
        (4, 0.5, 0.051, 5),
        (4, 0.5, 0.04, 4),  # three would wait for 80 ms
        (4, 0.5, 0.02, 3),
        (4, 0.5, 100.0, 5),  # how many are missing does not show by the wait
        (4, 0.0, 100.0, 1),
        (6, 1.5, 1.0, 8),
        (0, 1.0, 1.0, 1),
        (3, math.nan, math.inf, 1),
        (3, -1.0, -1.0, 1),
    ],
)
def test_the_load_decides(replicas: int, load: float, wait_s: float, expected: int) -> None:
    assert wanted(replicas, load, wait_s) == expected


def test_it_scales_to_zero_only_where_that_is_allowed() -> None:
    assert wanted(1, 0.0, low=0) == 0
    assert wanted(1, 0.01, low=0) == 1
    assert wanted(1, 0.0, low=1) == 1


def test_a_constant_load_comes_to_rest() -> None:
    """Whatever the load and the start: it moves one way only, and stays where all of it fits."""
    for load in (each / 100 for each in range(0, 600, 7)):  # replicas' worth of work
        for start in range(1, 9):
            replicas, seen = start, [start]
            for _ in range(10):
                replicas = wanted(replicas, load / replicas, high=8)
                seen.append(replicas)
            assert seen[-1] == seen[-2]
            steps = {(after > before) - (after < before) for before, after in itertools.pairwise(seen)} - {0}
            assert len(steps) <= 1, seen
            assert load / replicas <= 0.75 + 1e-6 or replicas == 8


def test_a_wait_comes_to_rest_where_it_is_within_the_target() -> None:
    """One queue for each replica, of requests of 100 ms that come by chance: no number is left for a larger one and
    come back to."""
    for load in (each / 10 for each in range(1, 50)):
        for start in (1, 7, 100):
            replicas, seen = start, [start]
            for _ in range(40):
                busy = min(0.999, load / replicas)
                replicas = wanted(replicas, load / replicas, 0.1 * busy / (1 - busy), high=1000)
                seen.append(replicas)
            assert seen[-1] == seen[-2]
            steps = [(after > before) - (after < before) for before, after in itertools.pairwise(seen)]
            turns = [each for each, _ in itertools.groupby(step for step in steps if step)]
            assert len(turns) <= 2, seen  # down from what it began with, and to rest
            assert 0.1 * (load / replicas) / (1 - load / replicas) <= 0.05 + 1e-6


@pytest.mark.parametrize(
    "arguments", [{"target_wait_s": 0}, {"target_wait_s": math.nan}, {"replicas_min": 3, "replicas_max": 2}]
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        wanted_replicas(1, 0.5, 0.0, **{"target_wait_s": 1.0, **arguments})


class Control:
    """A policy, asked every second as Ray Serve's controller does."""

    def __init__(self, replicas: int, *, low: int = 1, high: int = 64, **arguments: float):
        self.policy = WaitPolicy(0.05, **arguments)
        self.replicas, self.low, self.high, self.now = replicas, low, high, 1000.0
        self.state: dict[str, Any] = {}

    def second(self, *loads: float, waits: tuple[float, ...] = (), running: int | None = None) -> int:
        """With these loads of the replicas that run."""
        self.now += 1
        context = SimpleNamespace(
            target_num_replicas=self.replicas, current_num_replicas=len(loads), current_time=self.now,
            capacity_adjusted_min_replicas=self.low, capacity_adjusted_max_replicas=self.high,
            aggregated_metrics={"load": dict(enumerate(loads)), "wait_s": dict(enumerate(waits))} if loads else None,
            policy_state=dict(self.state),
        )  # fmt: skip
        self.replicas, self.state = self.policy(context)
        return self.replicas

    def seconds(self, count: int, *loads: float, waits: tuple[float, ...] = ()) -> list[int]:
        return [self.second(*loads, waits=waits) for _ in range(count)]


def test_more_are_wanted_for_a_while_before_there_are_more() -> None:
    control = Control(1)
    assert control.seconds(5, 1.5) == [1] * 5
    assert control.second(1.5) == 2
    control = Control(1)
    assert control.seconds(4, 1.5) + control.seconds(1, 0.5) + control.seconds(5, 1.5) == [1] * 10  # one was less
    assert control.second(1.5) == 2


def test_those_that_are_still_starting_are_not_ordered_again() -> None:
    """One runs and has four times its work: four are ordered in two steps, and no more while they load."""
    control = Control(1)
    assert max(control.seconds(120, 3.0)) == 4


def test_it_doubles_at_most_each_time() -> None:
    control = Control(1)
    seen = control.seconds(40, 48.0)
    assert [each for each, _ in itertools.groupby(seen)] == [1, 2, 4, 8, 16, 32, 64]


def test_fewer_are_the_most_that_was_wanted_for_a_minute() -> None:
    control = Control(8)
    control.seconds(30, *[0.3] * 8)
    control.seconds(20, *[0.1] * 8)
    assert control.replicas == 8
    control.seconds(20, *[0.1] * 8)
    assert control.replicas == 4, "what was wanted 50 s ago counts"
    control.seconds(40, *[0.2] * 4)
    assert control.replicas == 2


def test_one_replica_that_is_stuck_among_many_is_no_reason() -> None:
    control = Control(10)
    assert set(control.seconds(60, *[0.6] * 9, 1.0, waits=(*[0.01] * 9, 500.0))) == {10}


def test_nothing_is_decided_of_nothing() -> None:
    """A controller that was started again has no numbers, and no past."""
    control = Control(5)
    assert set(control.seconds(100)) == {5}
    assert set(control.seconds(59, *[0.0] * 5)) == {5}


def test_the_last_one_goes_later_and_only_where_it_may() -> None:
    control = Control(3, low=0, to_zero_delay_s=120)
    seen = control.seconds(119, 0.0, 0.0, 0.0)
    assert set(seen) == {3, 1}
    assert 0 in control.seconds(5, 0.0)
    control = Control(1, low=0, to_zero_delay_s=120)
    assert set(control.seconds(100, 0.0) + control.seconds(1, 0.01) + control.seconds(100, 0.0)) == {1}
    control = Control(1, low=1, to_zero_delay_s=10)
    assert set(control.seconds(300, 0.0)) == {1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "models must be a list"),
        ({"models": [3]}, "models must be a list"),
        ({"models": "a.mar", "modles": 1}, "unknown argument 'modles'"),
        ({"models": "a.mar", "num_cpus": 0}, "num_cpus is 0"),
        ({"models": "a.mar", "num_gpus": 1.5}, "above 1 it must be a whole number"),
        ({"models": "a.mar", "num_gpus": -1}, "num_gpus is -1"),
        ({"models": "a.mar", "resources": ["a"]}, "write names and amounts"),
        ({"models": "a.mar", "resources": {"GPU": 1}}, "give num_gpus"),
        ({"models": "a.mar", "replicas_per_node": 0}, "replicas_per_node is 0"),
        ({"models": "a.mar", "workers": "x"}, "workers is 'x'"),
        ({"models": "a.mar", "replicas": "8..1"}, "replicas is '8..1'"),
        ({"models": "a.mar", "replicas": 0}, "replicas is 0"),
        ({"models": "a.mar", "replicas": {"min": 1}}, "replicas is"),
        ({"models": "a.mar", "target_wait_ms": 0}, "target_wait_ms is 0"),
        ({"models": "a.mar", "downscale_delay_s": -1}, "downscale_delay_s is -1"),
        ({"models": "a.mar", "downscale_delay_s": math.nan}, "downscale_delay_s is nan"),
        ({"models": "a.mar", "direct_port": 70_000, "config": {"token_file": "k"}}, "highest port is 65535"),
        ({"models": "a.mar", "direct_port": 8090}, "config has no token_file"),
    ],
)
def test_arguments_are_checked(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Arguments.of(args)


def test_arguments_are_read() -> None:
    found = Arguments.of(
        {"models": "a.mar", "workers": 2, "num_cpus": 4.0, "replicas": "1..8", "config": {"debug": True}}
    )
    assert (found.models, found.num_cpus, found.replicas_min, found.replicas_max) == (("a.mar",), 4, 1, 8)
    assert found.config == {"debug": True, "default_workers_per_model": 2}
    assert Arguments.of({"models": ["a", "b"], "replicas": 3}).replicas_min == 3
    assert Arguments.of({"models": "a", "replicas": "0..2"}).replicas_min == 0
    open_to_all = {"disable_token_authorization": True}
    assert Arguments.of({"models": "a", "direct_port": 8090, "config": open_to_all}).direct_port == 8090


def test_where_replicas_are_and_how_many_is_told_to_ray() -> None:
    found = options(Arguments.of({"models": "a", "num_cpus": 2, "num_gpus": 0.5, "resources": {"disk": 1},
                                  "replicas_per_node": 1, "replicas": 2}))  # fmt: skip
    assert found["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5, "resources": {"disk": 1.0}}
    assert (found["max_replicas_per_node"], found["num_replicas"]) == (1, 2)
    found = options(Arguments.of({"models": "a", "replicas": "0..4", "target_wait_ms": 20, "downscale_delay_s": 9}))
    assert found["ray_actor_options"] == {"num_cpus": 1}
    assert found["graceful_shutdown_timeout_s"] > Config.drain_timeout_s
    patient = options(Arguments.of({"models": "a", "config": {"drain_timeout_s": "300"}}))
    assert patient["graceful_shutdown_timeout_s"] > 300
    scaling = found["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (0, 1, 4)
    policy = WaitPolicy(**scaling["policy"]["policy_kwargs"])
    assert vars(policy) == vars(WaitPolicy(0.02, downscale_delay_s=9))


class Running:
    problem = ""
    has_lost_spawner = False


async def checked(replica: Replica, times: int = 1) -> None:
    for _ in range(times):
        await replica.check_health()


def test_health_fails_for_what_ends_a_server_process() -> None:
    replica = Replica(["a.mar"], {}, 1)
    asyncio.run(checked(replica))  # not started: Ray's own start says it
    replica.engine._running = running = Running()  # type: ignore[assignment]
    asyncio.run(checked(replica, 5))
    running.has_lost_spawner = True
    asyncio.run(checked(replica, 2))
    with pytest.raises(ServingError, match="forked from is gone"):
        asyncio.run(checked(replica))
    running.has_lost_spawner = False
    asyncio.run(checked(replica))
    running.problem = "the device cuda:0 is lost"
    with pytest.raises(ServingError, match="cuda:0"):
        asyncio.run(checked(replica))
