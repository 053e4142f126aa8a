"""The runs of a worker process before it counts as loaded, beside those that show whether it can be served at all: each
sample and each size of ``pad_to`` in batches of every size that batches may have, as far as time allows.

What fails here is worth a warning, no more: a request of that kind fails with its reason when it comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyserve.archive.samples import Sample
from pyserve.errors import JsonObject
from pyserve.worker.failure import HandlerTimeout

# Seconds in which a batch of a size between one request and the largest may begin.
SIZES_LIMIT_S = 5.0
TOO_LONG = "it would have taken too long"


class Tried(NamedTuple):
    """What became of a batch.

    Attributes:
        seconds: that it took.
        reason: why not all of it was answered, in one line; ``""`` if all was.
    """

    seconds: float
    reason: str = ""


Run = Callable[[Sample, int], Tried]


def sizes_up_to(largest: int, wanted: object = None) -> list[int]:
    """Sizes of batches that stand for all up to ``largest``, in order: 1, 2, 4, 8, 12, 16, 24 and so on, as the native
    lane has them (csrc/buckets.h), or those of ``wanted``, a list of sizes (``batchBuckets``)."""
    if isinstance(wanted, list):
        return sorted({*(size for size in wanted if isinstance(size, int) and 0 < size < largest), largest})
    sizes = set()
    power = 1
    while power < largest:
        sizes |= {power} | ({power + power // 2} if power >= 8 and power + power // 2 < largest else set())
        power *= 2
    return sorted(sizes | {max(largest, 1)})


@dataclass
class WarmUp:
    """Of one handler.

    Args:
        run: runs a batch of so many copies of a sample. Raises HandlerTimeout once the time is over.
        until: when no run begins any more, ``time.monotonic()``.
        notes: filled with what the log should say.

    Attributes:
        rows: sizes of the batches that were answered, by the names of samples.
        left_out: what was not run, or not answered, and why.
    """

    run: Run
    until: float
    notes: list[str]
    rows: dict[str, list[int]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    _seconds: dict[str, float] = field(default_factory=dict)  # per request, of the last run
    _failed: set[str] = field(default_factory=set)

    def note_answered(self, sample: Sample, seconds: float) -> None:
        """A request was answered already, alone."""
        self.rows.setdefault(sample.name, [1])
        self._seconds.setdefault(sample.name, seconds)

    def run_all(self, samples: Sequence[Sample], sizes: Sequence[int]) -> None:
        """Runs ``samples``, each in batches of ``sizes``, which are in order: alone and in the largest first."""
        sizes_until = min(self.until, time.monotonic() + SIZES_LIMIT_S)
        plan = [(sample, size, self.until) for sample in samples for size in dict.fromkeys((1, sizes[-1]))]
        plan += [(sample, size, sizes_until) for size in sizes[:-1] if size > 1 for sample in samples]
        try:
            for sample, size, until in plan:
                if size not in self.rows.get(sample.name, ()):
                    self._run(sample, size, until)
        except HandlerTimeout:
            self.notes.append("warming the model up took too long: the first requests of some kinds may be slow. Raise "
                              "startupTimeout in model-config.yaml")  # fmt: skip

    def _run(self, sample: Sample, size: int, until: float) -> None:
        name = sample.name
        if name in self._failed:
            return
        what = f"{name}, {size} row{'s' if size > 1 else ''}"
        if time.monotonic() + self._seconds.get(name, 0.0) * size > until:
            self.left_out.append(f"{what}: {TOO_LONG}")
            return
        tried = self.run(sample, size)
        if tried.reason:
            self._failed.add(name)
            self.left_out.append(f"{what}: {tried.reason}")
            self.notes.append(f"{name} was not answered{f' in a batch of {size}' * (size > 1)}: {tried.reason}")
            return
        self._seconds[name] = tried.seconds / size
        self.rows.setdefault(name, []).append(size)

    def findings(self) -> JsonObject:
        """For the model's description; empty if nothing was run."""
        found: dict[str, Any] = {"rows": {name: sorted(sizes) for name, sizes in self.rows.items()}}
        if self.left_out:
            found["leftOut"] = self.left_out[:8]
        return found if self.rows or self.left_out else {}
