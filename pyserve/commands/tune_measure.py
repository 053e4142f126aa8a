"""Measures one network at one setting after another: throughput, and how long a request takes at that load.

No HTTP and no preprocessing: the engine's own lane, driven with the archive's example input, with as many requests in
flight as the workers can hold (workers x batch size, twice that on an accelerator), each replaced as soon as it is
answered.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from pyserve.engine import load_core
from pyserve.errors import ModelLoadError, OutOfMemoryError, ServeError
from pyserve.lanes.network import Network

READY_LIMIT_S = 120.0
STALL_LIMIT_S = 60.0
# Answers of this share of a point's time are not counted: the first batches of a setting are slower.
WARM_SHARE = 0.2
_FAR = 1 << 62
_CAPACITY_MIN = 4096


@dataclass(frozen=True)
class Setting:
    """What is tried. ``threads``: intra-op, of each worker; ``backend``: a key of `pyserve.backends.table.BACKENDS`."""

    workers: int
    threads: int
    batch_size: int
    precision: str = "fp32"
    backend: str = "torchscript"


@dataclass
class Point:
    """What a setting gave.

    Attributes:
        rate: items per second.
        p50_ms, p95_ms: from a request's arrival to the end of its batch.
        precision_error: largest difference to fp32, relative to the largest number.
        error: why nothing was measured; "" if it was.
    """

    setting: Setting
    rate: float = 0.0
    p50_ms: float = 0.0
    p95_ms: float = 0.0
    precision_error: float = 0.0
    error: str = ""


@dataclass
class _Tally:
    count: int = 0
    first_at: int = 0
    last_at: int = 0
    ages_ns: list[int] = field(default_factory=list)


class Rig:
    """One loaded network in a lane of its own. A context.

    Args:
        network: loaded once; all settings but its precision and backend can be tried on it.
        running_max: batches that may run at once.
        wanted: what will be measured.
    """

    def __init__(self, network: Network, running_max: int, wanted: Iterable[Setting]):
        core = load_core()
        # There, one batch is copied while another is computed.
        self._flights = 1 if network.device == "cpu" else 2
        capacity = max(map(self._held, wanted))
        self._network = network
        self._running_max = running_max
        self._engine = core.Engine()
        size = 1 << (max(_CAPACITY_MIN, 2 * capacity) - 1).bit_length()
        self._lane = core.Lane(self._engine, network.torch_model, network.usual_item, size)
        self._poll = select.poll()
        self._poll.register(self._engine.fileno(), select.POLLIN)

    def _held(self, setting: Setting) -> int:
        """Requests that the workers hold at once."""
        return setting.workers * setting.batch_size * self._flights

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self._lane.close()
        self._lane.join()
        self._engine.drain()

    def measure(self, setting: Setting, seconds: float) -> Point:
        """Runs ``setting`` for about ``seconds``. An error of the model is part of the answer."""
        point = Point(setting, precision_error=float(self._network.torch_model.precision_error))
        try:
            self._apply(setting)
            tally = self._drive(setting, seconds)
        except ServeError as error:
            point.error = error.message
            return point
        elapsed_s = (tally.last_at - tally.first_at) / 1e9
        if tally.count < 2 or elapsed_s <= 0:
            point.error = f"fewer than two batches in {seconds:g} s; give it more --seconds"
            return point
        point.rate = tally.count / elapsed_s
        ages_ms = [age / 1e6 for age in tally.ages_ns]
        point.p50_ms = median(ages_ms)
        point.p95_ms = quantiles(ages_ms, n=20)[-1] if len(ages_ms) > 1 else ages_ms[0]
        return point

    def _apply(self, setting: Setting) -> None:
        """New workers, so that each warms up at the setting's batch size."""
        self._lane.set_workers(0)
        self._wait(lambda rows: not rows, "stop")
        self._lane.set_limits(
            batch_size_max=setting.batch_size, batch_size_min=1, batch_delay_max_ns=0, running_max=self._running_max
        )
        self._lane.set_intra_op_threads(setting.threads)
        self._network.torch_model.prepare_threads(setting.threads, setting.workers)  # where they are compiled in
        self._lane.set_workers(setting.workers)
        self._wait(lambda rows: all(row["state"] in ("ready", "failed") for row in rows), "be ready")
        failed = next((row["error"] for row in self._lane.workers() if row["state"] == "failed"), None)
        if failed is not None:
            last = (str(failed).strip().splitlines() or ["no text"])[-1]
            raise ModelLoadError(f"the model cannot run a batch of {setting.batch_size}: {last}")

    def _wait(self, is_done: Any, what: str) -> None:
        end = time.monotonic() + READY_LIMIT_S
        while True:
            self._lane.reap()
            if is_done(self._lane.workers()):
                return
            if time.monotonic() > end:
                raise ModelLoadError(f"the workers did not {what} within {READY_LIMIT_S:g} s")
            self._poll.poll(20)
            self._engine.drain()

    def _drive(self, setting: Setting, seconds: float) -> _Tally:
        example = self._network.usual_item
        in_flight = self._held(setting)
        for _ in range(in_flight):
            self._submit(example)
        self._lane.announce()
        now = time.monotonic_ns()
        warm_until = now + int(seconds * WARM_SHARE * 1e9)
        end = now + int(seconds * 1e9)
        tally = _Tally()
        stalled_at = time.monotonic() + STALL_LIMIT_S
        while in_flight:
            self._poll.poll(1000)
            for completion in self._engine.drain():
                stalled_at = time.monotonic() + STALL_LIMIT_S
                in_flight -= len(completion.owners)
                if completion.code != "ok":
                    end = 0  # what else is in flight comes back first
                    failure = completion.message, completion.code
                    tally.count = -1
                elif tally.count >= 0:
                    _note(tally, completion, warm_until)
                if time.monotonic_ns() < end:
                    for _ in completion.owners:
                        self._submit(example)
                        in_flight += 1
                    self._lane.announce()
            if time.monotonic() > stalled_at:
                raise ModelLoadError(f"no batch came back within {STALL_LIMIT_S:g} s")
        if tally.count < 0:
            last = (failure[0].strip().splitlines() or ["no text"])[-1]
            kind = OutOfMemoryError if failure[1] == "out_of_memory" else ModelLoadError
            raise kind(f"a batch of {setting.batch_size} failed: {last}")
        return tally

    def _submit(self, example: list[Any]) -> None:
        now = time.monotonic_ns()
        self._lane.submit(now, example, now, _FAR, False)


def _note(tally: _Tally, completion: Any, warm_until: int) -> None:
    """Counts a batch that ended after the warm-up. The first one only marks the beginning."""
    if completion.finished_at < warm_until:
        return
    if not tally.first_at:
        tally.first_at = tally.last_at = completion.finished_at
        return
    tally.count += len(completion.owners)
    tally.last_at = max(tally.last_at, completion.finished_at)
    tally.ages_ns += [completion.finished_at - arrived_at for arrived_at in completion.owners]
