"""What a load test measured: latency counts in HDR buckets, outcomes, and one entry per second.

The generator shares its cores with the server, so recording one answer must cost well under a microsecond:
a latency becomes a bucket index by two shifts and is counted in a dict of the running second. The indices are those of
an HDR histogram with three significant digits, so the counts become an ``HdrHistogram`` at the end without loss.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

LATENCY_MAX_US = 3_600_000_000  # one hour; longer latencies are counted as this
NS_PER_S = 1_000_000_000
NEVER = 1 << 62  # a time in ns that no clock reaches


def bucket_index(value: int) -> int:
    """Index of ``value`` in the counts array of ``HdrHistogram(1, LATENCY_MAX_US, 3)``."""
    shift = value.bit_length() - 11
    return value if shift <= 0 else (shift << 10) + (value >> shift)


def bucket_value(index: int) -> int:
    """Lowest value that falls into the bucket ``index``."""
    shift = (index >> 10) - 1
    return index if shift <= 0 else (index - (shift << 10)) << shift


@dataclass(slots=True)
class Second:
    """One second of the measured window, by time of completion.

    Attributes:
        number: 0 for the first second of the window.
        ok: answers with a 2xx status, also those to requests of the warm-up that were finished in this second.
        failed: counted requests that ended with another status or without an answer.
        received_size: bytes of the answers.
        counts: bucket index and count alternating, for the counted requests with a 2xx status.
    """

    number: int
    ok: int = 0
    failed: int = 0
    received_size: int = 0
    counts: array[int] = field(default_factory=lambda: array("Q"))


class Recording:
    """Outcomes of one run. Times are ns of ``time.monotonic_ns()``; loop thread only.

    A request is *counted* when its intended send time lies in the measured window ``[started_at, ended_at)``.
    Throughput is what finished inside the window, whenever it was sent, so that neither the filling of the pipe
    before the window nor its emptying after it changes the rate.
    """

    def __init__(self) -> None:
        self.started_at = NEVER
        self.ended_at = NEVER
        self.interrupted = False
        # counted requests
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[str] = Counter()
        self.samples: dict[str, str] = {}
        self.unsent = 0
        self.unfinished = 0
        self.received_size = 0
        self.sent_size = 0
        self.latency_sum_us = 0
        self.latency_min_us = NEVER
        self.latency_max_us = 0
        self.lag_counts: dict[int, int] = {}
        self.lag_max_us = 0
        self.finished_at = 0
        # all requests that finished in the window
        self.ok_in_window = 0
        self.received_in_window = 0
        self.seconds: list[Second] = []
        self._second = Second(0)
        self._counts: dict[int, int] = {}
        # of the generator itself: cores it used, warm-up included
        self.cpu_share = 0.0

    def sent(self, intended: int, now: int, size: int) -> None:
        """A counted request of ``size`` bytes went out at ``now`` and should have gone out at ``intended``."""
        self.sent_size += size
        lag = (now - intended) // 1000
        self.lag_max_us = max(self.lag_max_us, lag)
        index = bucket_index(min(lag, LATENCY_MAX_US))
        self.lag_counts[index] = self.lag_counts.get(index, 0) + 1

    def answered(self, intended: int, now: int, status: int, size: int) -> None:
        """An answer of ``size`` bytes is complete. Whether it is counted follows from ``intended``."""
        if now < self.started_at:
            return
        number = (now - self.started_at) // NS_PER_S
        if number != self._second.number:
            self._close_second(number)
        is_ok = 200 <= status < 300
        if is_ok:
            self._second.ok += 1
            self._second.received_size += size
            if now < self.ended_at:
                self.ok_in_window += 1
                self.received_in_window += size
        if intended < self.started_at:
            return
        self.finished_at = now
        self.statuses[status] += 1
        self.received_size += size
        if not is_ok:
            self._second.failed += 1
            return
        latency = (now - intended) // 1000
        self.latency_sum_us += latency
        self.latency_max_us = max(self.latency_max_us, latency)
        self.latency_min_us = min(self.latency_min_us, latency)
        index = bucket_index(latency if latency < LATENCY_MAX_US else LATENCY_MAX_US)
        counts = self._counts
        counts[index] = counts.get(index, 0) + 1

    def failed(self, intended: int, now: int, kind: str) -> None:
        """A request ended without an answer; ``kind`` is ``timeout``, ``refused``, ``reset``, ``protocol`` ..."""
        if intended < self.started_at:
            return
        number = (now - self.started_at) // NS_PER_S
        if number != self._second.number:
            self._close_second(number)
        self.finished_at = now
        self._second.failed += 1
        self.errors[kind] += 1

    def close(self, now: int) -> None:
        """End of the run: the window is closed at the last counted outcome if nothing closed it before."""
        self._close_second(-1)
        if self.ended_at == NEVER:
            self.ended_at = self.finished_at or now
        self.started_at = min(self.started_at, self.ended_at)

    def _close_second(self, number: int) -> None:
        second = self._second
        if second.ok or second.failed:
            second.counts = array("Q", [part for pair in sorted(self._counts.items()) for part in pair])
            self.seconds.append(second)
        self._counts = {}
        self._second = Second(number)

    @property
    def ok(self) -> int:
        """Counted requests answered with a 2xx status."""
        return sum(count for status, count in self.statuses.items() if 200 <= status < 300)

    @property
    def failures(self) -> int:
        """Counted requests answered with another status, or not at all although they were sent."""
        return self.statuses.total() - self.ok + self.errors.total()

    @property
    def window_s(self) -> float:
        """Length of the measured window in seconds."""
        return (self.ended_at - self.started_at) / NS_PER_S

    def recent_counts(self) -> dict[int, int]:
        """Bucket index to count of the running second, or of the last one while that is still empty."""
        if self._counts or not self.seconds:
            return self._counts
        last = self.seconds[-1].counts
        return dict(zip(last[::2], last[1::2], strict=True))

    def counts(self) -> dict[int, int]:
        """Bucket index to count over the whole run."""
        total: dict[int, int] = {}
        for second in self.seconds:
            for index, count in zip(second.counts[::2], second.counts[1::2], strict=True):
                total[index] = total.get(index, 0) + count
        return total


def encoded(counts: dict[int, int]) -> str:
    """The counts in the compressed form V2 of HDR histograms, in microseconds; ``""`` without the package."""
    try:
        from hdrh.histogram import HdrHistogram
    except ImportError:
        return ""
    built = HdrHistogram(1, LATENCY_MAX_US, 3)
    for index, count in counts.items():
        built.record_value(bucket_value(index), count)
    text = built.encode()
    return text.decode("ascii") if isinstance(text, bytes) else str(text)


def standard_deviation(counts: dict[int, int]) -> float:
    """In microseconds, each value taken for the middle of its bucket; 0 without counts."""
    total = sum(counts.values())
    if not total:
        return 0.0
    middles = {index: (bucket_value(index) + bucket_value(index + 1) - 1) / 2 for index in counts}
    mean = sum(middles[index] * count for index, count in counts.items()) / total
    return math.sqrt(sum((middles[index] - mean) ** 2 * count for index, count in counts.items()) / total)


def value_at(counts: dict[int, int], percentile: float) -> int:
    """Lowest value of the bucket that holds the ``percentile``, rounded as HdrHistogram does; 0 without counts."""
    index = _index_at(counts, percentile)
    return 0 if index is None else bucket_value(index)


def highest_at(counts: dict[int, int], percentile: float) -> int:
    """Highest value of that bucket, as HdrHistogram tells a percentile; 0 without counts."""
    index = _index_at(counts, percentile)
    return 0 if index is None else bucket_value(index + 1) - 1


def _index_at(counts: dict[int, int], percentile: float) -> int | None:
    left = max(1, int(percentile * sum(counts.values()) / 100 + 0.5))
    found = None
    for found in sorted(counts):
        left -= counts[found]
        if left <= 0:
            break
    return found


def merge(recordings: list[Recording]) -> Recording:
    """The recordings of several generator processes as one; seconds are joined by number."""
    merged = Recording()
    merged.started_at = min(part.started_at for part in recordings)
    merged.ended_at = max(part.ended_at for part in recordings)
    merged.interrupted = any(part.interrupted for part in recordings)
    merged.latency_min_us = min(part.latency_min_us for part in recordings)
    merged.latency_max_us = max(part.latency_max_us for part in recordings)
    merged.lag_max_us = max(part.lag_max_us for part in recordings)
    lags: Counter[int] = Counter()
    seconds: dict[int, list[Second]] = {}
    for part in recordings:
        merged.statuses += part.statuses
        merged.errors += part.errors
        merged.samples = part.samples | merged.samples
        for name in (
            "unsent",
            "unfinished",
            "received_size",
            "sent_size",
            "latency_sum_us",
            "ok_in_window",
            "received_in_window",
            "cpu_share",
        ):
            setattr(merged, name, getattr(merged, name) + getattr(part, name))
        lags.update(part.lag_counts)
        for second in part.seconds:
            seconds.setdefault(second.number, []).append(second)
    merged.lag_counts = dict(lags)
    merged.seconds = [_join(seconds[number]) for number in sorted(seconds)]
    return merged


def _join(parts: list[Second]) -> Second:
    total: Counter[int] = Counter()
    for part in parts:
        total.update(dict(zip(part.counts[::2], part.counts[1::2], strict=True)))
    return Second(
        parts[0].number,
        ok=sum(part.ok for part in parts),
        failed=sum(part.failed for part in parts),
        received_size=sum(part.received_size for part in parts),
        counts=array("Q", [part for pair in sorted(total.items()) for part in pair]),
    )
