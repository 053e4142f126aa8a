"""What a server's metrics say of its models between two readings: rates, batch sizes, percentiles of latency."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

from prometheus_client.parser import text_string_to_metric_families

_DURATION = "pyserve_request_duration_seconds"
# What is asked of /metrics, which gives all samples of a server otherwise: about 150 for each version of a model.
NAMES = (
    "pyserve_requests_total", f"{_DURATION}_bucket", "pyserve_batch_size_sum", "pyserve_batch_size_count",
    "pyserve_queue_size", "pyserve_requests_in_flight", "pyserve_workers", "pyserve_worker_utilization",
)  # fmt: skip
Version = tuple[str, str]  # model, version


@dataclass
class Totals:
    """Of one version since it was registered.

    Attributes:
        statuses: of answers -> how many.
        durations: upper end of a bucket in s -> requests that took no longer.
        batched, batches: requests in batches, and how many batches that were.
        queue, in_flight, workers: now; workers are those that are ready.
        utilization: share of the last seconds that the workers were busy, 0 to 1; None while that is not known.
    """

    statuses: dict[str, float] = field(default_factory=dict)
    durations: dict[float, float] = field(default_factory=dict)
    batched: float = 0
    batches: float = 0
    queue: int = 0
    in_flight: int = 0
    workers: int = 0
    utilization: float | None = None

    @property
    def requests(self) -> float:
        """Answered."""
        return sum(self.statuses.values())

    @property
    def errors(self) -> float:
        """Answered with a status of 400 or above."""
        return sum(count for status, count in self.statuses.items() if status >= "4")


@dataclass
class Reading:
    """All versions at one time, in s of a monotonic clock."""

    at: float
    versions: dict[Version, Totals]


@dataclass
class Figures:
    """Of one version over a time. Rates are in requests/s, durations in s; None where nothing came.

    Attributes:
        p50, p90, p99: estimated within the buckets of the histogram, as Prometheus does.
        batch: mean size.
    """

    now: Totals
    rate: float
    error_rate: float
    requests: float
    errors: float
    batch: float | None
    p50: float | None
    p90: float | None
    p99: float | None


def read_totals(text: str) -> dict[Version, Totals]:
    """The totals in what ``/metrics`` answered.

    Raises:
        ValueError: it is not in Prometheus' text format.
    """
    versions: dict[Version, Totals] = defaultdict(Totals)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith("pyserve_") or "version" not in sample.labels or "model" not in sample.labels:
                continue
            totals = versions[sample.labels["model"], sample.labels["version"]]
            match sample.name:
                case "pyserve_requests_total":
                    totals.statuses[sample.labels.get("status", "")] = sample.value
                case "pyserve_request_duration_seconds_bucket":
                    totals.durations[float(sample.labels["le"])] = sample.value
                case "pyserve_batch_size_sum":
                    totals.batched = sample.value
                case "pyserve_batch_size_count":
                    totals.batches = sample.value
                case "pyserve_queue_size":
                    totals.queue = int(sample.value)
                case "pyserve_requests_in_flight":
                    totals.in_flight = int(sample.value)
                case "pyserve_workers":
                    totals.workers = int(sample.value)
                case "pyserve_worker_utilization":
                    totals.utilization = sample.value
    return dict(versions)


def figures(before: Totals | None, now: Totals, passed_s: float) -> Figures:
    """What came between two readings of a version; with ``before`` None, or of a version that was registered again
    meanwhile, since it was registered."""
    since = before if before is not None and before.requests <= now.requests else Totals()
    requests, errors = now.requests - since.requests, now.errors - since.errors
    durations = {le: count - since.durations.get(le, 0.0) for le, count in now.durations.items()}
    batches = now.batches - since.batches
    if batches < 0:  # another lane has taken its place
        batches, since = now.batches, Totals()
    return Figures(
        now=now,
        rate=requests / passed_s if passed_s > 0 else 0.0,
        error_rate=errors / passed_s if passed_s > 0 else 0.0,
        requests=requests,
        errors=errors,
        batch=(now.batched - since.batched) / batches if batches > 0 else None,
        p50=quantile(durations, 0.5),
        p90=quantile(durations, 0.9),
        p99=quantile(durations, 0.99),
    )


def quantile(cumulative: dict[float, float], share: float) -> float | None:
    """The value below which ``share`` of the observations lie; None without any.

    Args:
        cumulative: upper end of a bucket -> observations that are not above it; one end is infinite.
    """
    ends = sorted(cumulative)
    total = cumulative[ends[-1]] if ends else 0.0
    if total <= 0:
        return None
    wanted = share * total
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *((end, cumulative[end]) for end in ends)]):
        if count >= wanted and count > below:
            return low if math.isinf(high) else low + (high - low) * (wanted - below) / (count - below)
    return None


def total_of(all_figures: list[Figures]) -> tuple[float, float, int, int]:
    """Of all versions: requests/s, errors/s, requests that wait and that are in flight."""
    return (
        sum(each.rate for each in all_figures),
        sum(each.error_rate for each in all_figures),
        sum(each.now.queue for each in all_figures),
        sum(each.now.in_flight for each in all_figures),
    )
