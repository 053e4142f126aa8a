"""How waiting and cost go with the number of replicas, and what the policy does, by a model: no cluster is needed.

    python bench/simulate_replicas.py                       # all of it, some minutes
    python bench/simulate_replicas.py --up-to 10 --quick    # the small ones
    python bench/simulate_replicas.py --json run.json --plot replicas.png

The policy is the one of `pyserve/replicas/policy.py`, called as Ray Serve calls it; `bench/replica_model.py` is the
model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.replica_model import Cluster, Outcome, Ray, Service
from pyserve.replicas.policy import WaitPolicy

# A replica serves 5 requests per second, so that a thousand of them are followed in seconds.
SLOW = Service(mean_s=0.2, each_s=0.2)
SIZES = (1, 3, 10, 30, 100, 300, 1000)
QUICK_START = Ray()
AIM = 0.75
MINUTES = 10
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """A load over `MINUTES`.

    Attributes:
        name: of the table's row.
        about: what it is to show.
        rate: requests per second at a second, for a peak of so many replicas' worth and what one serves by the aim.
        start: replicas at the beginning, of the peak.
        service: of a request.
        ray: how replicas start, and how metrics come.
        target_wait_s: of the policy.
        slower: how many times slower the first replica is.
        sizes: peaks that it is run for, in replicas.
    """

    name: str
    about: str
    rate: Callable[[float, float], float]
    start: float = 1.0
    service: Service = SLOW
    ray: Ray = QUICK_START
    target_wait_s: float = 0.2
    slower: float = 1.0
    sizes: tuple[int, ...] = SIZES


def constant(_: float, peak: float) -> float:
    return peak


def step(second: float, peak: float) -> float:
    return peak if 60 <= second < 360 else peak / 10


def day(second: float, peak: float) -> float:
    return peak * (0.55 - 0.45 * math.cos(second / (MINUTES * 60) * 2 * math.pi))


def bursts(second: float, peak: float) -> float:
    """Every minute twice the rate for five seconds: too short to start a replica for."""
    return peak * (2 if second % 60 < 5 else 1) / 2


def idle(_: float, peak: float) -> float:
    return peak / 10


SCENARIOS = (
    Scenario("constant", "comes to rest", constant),
    Scenario("step", "tenfold within a second, for five minutes", step, 0.1),
    Scenario("slow start", "the same, where a replica takes a minute to load", step, 0.1, ray=Ray(start_s=60)),
    Scenario("day", "a tenth to all and back", day, 0.1),
    Scenario("bursts", "twice the rate for 5 s of each minute", bursts),
    Scenario("shrink", "starts with ten times of what is needed", idle),
    Scenario("one slow", "constant, the first replica eight times slower", constant, slower=8.0),
    Scenario("strict wait", "a target of a quarter of one request's time", constant, target_wait_s=0.05),
    Scenario("batches", "constant, of a model with a gain by batches", constant, target_wait_s=1.0,
             service=Service(mean_s=0.2, each_s=0.025, batch_max=8), sizes=(1, 3, 10, 30, 100)),
)  # fmt: skip


def run(scenario: Scenario, peak: int, seed: int, make: Callable[[float], Any]) -> Outcome:
    """A peak of ``peak`` replicas' worth, each busy for `AIM`."""
    requests = peak * scenario.service.rate_max * AIM
    cluster = Cluster(
        scenario.service, lambda second: scenario.rate(second, requests), policy=make(scenario.target_wait_s),
        bounds=(1, 4 * peak), start=max(1, round(peak * scenario.start)), ray=scenario.ray, seed=seed,
        slower={0: scenario.slower} if scenario.slower > 1 else {},
    )  # fmt: skip
    return cluster.run(MINUTES * 60)


def figures(scenario: Scenario, peak: int, outcome: Outcome) -> JsonObject:
    taken = len(outcome.waits)
    targets = [target for _, target, _ in outcome.sizes]
    return {
        "scenario": scenario.name, "peak": peak, "requests": taken + outcome.refused,
        "cost": round(outcome.cost, 3), "most": max(targets), "last": targets[-1],
        "turns": outcome.turns, "changes": sum(a != b for a, b in itertools.pairwise(targets)),
        "wait_ms": {str(p): round(outcome.wait_s(p) * 1000, 1) for p in (50, 95, 99)},
        "refused": round(outcome.refused / max(1, taken + outcome.refused), 4),
    }  # fmt: skip


def waits_by_routing(sizes: tuple[int, ...], seed: int, seconds: float) -> Iterator[JsonObject]:
    """Fixed numbers of replicas, each 0.75 busy: how long one waits by how requests are spread."""
    for count in sizes:
        for way in ("random", "two"):
            rate = count * SLOW.rate_max * AIM
            span = seconds * (10 if count < 30 else 1)  # else too few requests
            service = replace(SLOW, queue_max=10**9)
            cluster = Cluster(service, partial(constant, peak=rate), bounds=(count, count), start=count, seed=seed,
                              route=way)  # fmt: skip
            outcome = cluster.run(span)
            yield {"replicas": count, "way": way, "mean_ms": round(float(outcome.waits.mean()) * 1000, 1),
                   "p99_ms": round(outcome.wait_s(99) * 1000, 1)}  # fmt: skip


def print_rows(rows: list[JsonObject]) -> None:
    print(f"{'':<12} {'peak':>5} {'cost':>6} {'most':>5} {'last':>5} {'turns':>5} {'changes':>7} "
          f"{'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'refused':>8}")  # fmt: skip
    for row in rows:
        wait = row["wait_ms"]
        print(f"{row['scenario']:<12} {row['peak']:>5} {row['cost']:>6.2f} {row['most']:>5} {row['last']:>5} "
              f"{row['turns']:>5} {row['changes']:>7} {wait['50']:>8.0f} {wait['95']:>8.0f} {wait['99']:>8.0f} "
              f"{row['refused']:>8.2%}")  # fmt: skip


def plot(rows: list[JsonObject], waits: list[JsonObject], courses: dict[str, Outcome], path: Path) -> None:
    """Waits by replicas, cost by replicas, and the number of replicas over time, as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for way, label in (("random", "by chance"), ("two", "the shorter of two queues")):
        found = [each for each in waits if each["way"] == way]
        axes[0].plot([each["replicas"] for each in found], [each["mean_ms"] for each in found], marker="o", label=label)
    axes[0].axhline(SLOW.mean_s * AIM / (1 - AIM) * 1000, color="grey", ls=":", label="M/M/1")
    axes[0].set(xscale="log", ylim=(0, None), xlabel="replicas, each 75 % busy", ylabel="mean wait, ms",
                title="waiting, requests of 200 ms")  # fmt: skip
    for name in dict.fromkeys(row["scenario"] for row in rows):
        found = [row for row in rows if row["scenario"] == name]
        axes[1].plot([row["peak"] for row in found], [row["cost"] for row in found], marker="o", label=name)
    axes[1].set(xscale="log", ylim=(0, None), xlabel="replicas at the peak", ylabel="replica seconds, of the least",
                title="cost of scaling")  # fmt: skip
    for name, outcome in courses.items():
        times = [time_s for time_s, _, _ in outcome.sizes]
        axes[2].plot(times, [target for _, target, _ in outcome.sizes], label=name)
    axes[2].set(ylim=(0, None), xlabel="s", ylabel="replicas", title="100 replicas at the peak")
    for each in axes:
        each.grid(alpha=0.3)
        each.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--up-to", type=int, default=SIZES[-1], help="the largest peak, in replicas")
    parser.add_argument("--only", nargs="*", help="names of scenarios")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="without the waits by routing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an image; needs matplotlib")
    options = parser.parse_args()
    begun, rows, courses = time.monotonic(), [], {}
    for scenario in SCENARIOS:
        for peak in scenario.sizes:
            if peak <= options.up_to and (not options.only or scenario.name in options.only):
                outcome = run(scenario, peak, options.seed, WaitPolicy)
                rows.append(figures(scenario, peak, outcome))
                if peak == 100 and scenario.name in ("step", "slow start", "day", "bursts", "shrink"):
                    courses[scenario.name] = outcome
    print_rows(rows)
    waits = [] if options.quick else list(waits_by_routing(SIZES, options.seed, 120.0))
    for row in waits:
        print(
            f"{row['replicas']:>5} replicas, {row['way']:<7} mean {row['mean_ms']:>8.1f} ms, p99 {row['p99_ms']:.1f} ms"
        )
    print(f"seed {options.seed}, {time.monotonic() - begun:.1f} s")
    if options.json:
        options.json.write_text(json.dumps({"seed": options.seed, "scaling": rows, "waits": waits}, indent=1) + "\n")
    if options.plot:
        plot(rows, waits, courses, options.plot)


if __name__ == "__main__":
    main()
