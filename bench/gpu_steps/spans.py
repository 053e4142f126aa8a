"""What ran on a device and when, as spans of (stream, kind, begin, end): how busy it was, and what lay under what."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Span(NamedTuple):
    """``kind`` is ``kernel``, ``up``, ``down`` or ``other``; times in microseconds."""

    stream: str
    kind: str
    began: float
    ended: float


Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, in order, without overlaps."""
    out: list[Interval] = []
    for began, ended in sorted(intervals):
        if out and began <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], ended))
        else:
            out.append((began, ended))
    return out


def total(intervals: Iterable[Interval]) -> float:
    return sum(ended - began for began, ended in intervals)


def shared(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """How long both go on at once; each is merged already."""
    time, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        time += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return time


def summary(spans: Sequence[Span], batches: int) -> dict[str, Any]:
    """Shares of the time from the first kernel to the last; the ends of the load are left out by that.

    ``gap_share``: no kernel ran. ``copies_under_kernels``: share of the copies' time that kernels ran beside.
    """
    by_kind: dict[str, list[Interval]] = defaultdict(list)
    by_stream: dict[str, list[Interval]] = defaultdict(list)
    for span in spans:
        by_kind[span.kind].append((span.began, span.ended))
        by_stream[span.stream].append((span.began, span.ended))
    kernels = merged(by_kind["kernel"])
    if not kernels:
        return {"kernels": 0, "gap_share": None}
    length = kernels[-1][1] - kernels[0][0]
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(kernels)]
    copies = merged(by_kind["up"] + by_kind["down"])
    return {
        "kernels": len(by_kind["kernel"]),
        "kernels_per_batch": round(len(by_kind["kernel"]) / max(1, batches), 1),
        "busy_share": round(total(kernels) / length, 4) if length else 1.0,
        "gap_share": round(1 - total(kernels) / length, 4) if length else 0.0,
        "longest_gap_us": round(max(gaps, default=0.0), 1),
        "copies_under_kernels": round(shared(copies, kernels) / total(copies), 4) if total(copies) else None,
        "stream_busy": {name: round(total(merged(times)) / (length or 1), 4) for name, times in by_stream.items()},
    }  # fmt: skip
