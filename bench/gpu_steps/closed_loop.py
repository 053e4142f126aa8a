"""The native engine without HTTP: a lane under a closed loop of requests, as the server's own loop drives it.

One thread submits and collects, and wakes the workers once a turn. A request's time counts from its submission until
its answer is in Python's hands; the first turns are not counted, and each window is measured by itself.
"""

from __future__ import annotations

import select
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_steps.networks import Network
from bench.gpu_steps.truth import Truth, WrongAnswer
from pyserve import _core

FAR = 1 << 62
HANG_S = 60.0
SAMPLE_EVERY = 16  # completions: one of these is copied, and the last ones are compared after the windows
SAMPLES_MAX = 32
SHOWN_COUNT = 8
COUNTERS = ("graph_replays", "padded_rows", "pageable_copies", "staging_fallback", "retried_singly")


class EngineFailed(Exception):
    """A worker or a batch failed; the text is the engine's."""


def load(network: Network, path: Path, precision: str, device: str) -> _core.TorchModel:
    """As the server loads it: frozen, in the precision, pictures channels last.

    TensorFloat-32 is no precision of a model but torch's switch for the whole process: `numbers_of`.
    """
    return _core.TorchModel.load(
        str(path), [network.items(1)], device=device, precision="fp32" if precision == "tf32" else precision,
        channels_last=network.is_picture,
    )  # fmt: skip


@dataclass(slots=True)
class Window:
    """What one window saw.

    Attributes:
        latencies_ns: of the requests that were answered in it.
        cpu_share: cores that the whole process kept busy.
        batches: completions that arrived in it.
    """

    items_per_s: float = 0.0
    cpu_share: float = 0.0
    batches: int = 0
    latencies_ns: list[int] = field(default_factory=list)


class EngineLoop:
    """One lane with one model, asked the truth's items in turn."""

    def __init__(self, model: _core.TorchModel, truth: Truth, batch: int):
        self._truth = truth
        # Each request has memory of its own, as each body of a request has.
        self._items = [item.unsqueeze(0).clone() for item in truth.items]
        self.engine = _core.Engine()
        self.lane = _core.Lane(self.engine, model, [self._items[0].clone()], 4096)
        # Items that disagree, to show with that filled up and replayed batches change no answer.
        self.lane.set_batching(rows=[[item] for item in self._items[:SHOWN_COUNT]])
        self.set_batch(batch)
        self._poll = select.poll()
        self._poll.register(self.engine.fileno(), select.POLLIN)
        self._next = 0
        self._in_flight = 0
        self._samples: deque[tuple[list[int], Tensor]] = deque()

    def set_batch(self, most: int, least: int = 1) -> None:
        """``least`` above 1 makes that many requests wait for one another."""
        self.lane.set_limits(
            batch_size_max=most, batch_size_min=least, batch_delay_max_ns=FAR if least > 1 else 0, running_max=1 << 20
        )

    def set_workers(self, count: int, on_wait: Callable[[], None] = lambda: None) -> None:
        """Returns once ``count`` are ready."""
        self.lane.set_workers(count)
        end = time.monotonic() + HANG_S
        while True:
            self.lane.reap()
            rows = self.lane.workers()
            for row in rows:
                if row["state"] == "failed":
                    raise EngineFailed(f"a worker failed: {row['error']}")
            if [row["state"] for row in rows] == ["ready"] * count:
                return
            if time.monotonic() > end:
                raise EngineFailed(f"workers are not ready within {HANG_S:g} s: {rows}")
            on_wait()
            time.sleep(0.002)

    def check(self, count: int) -> float:
        """Asks ``count`` requests at once and compares every answer: the largest error."""
        self._samples = deque()
        for _ in self._turns(count, lambda: False, every=1):
            pass
        return self._error()

    def _error(self) -> float:
        if not self._samples:
            raise WrongAnswer("no answer was compared")
        return max(self._truth.check(got, indices) for indices, got in self._samples)

    def windows(self, clients: int, seconds: float, count: int) -> tuple[list[Window], float]:
        """(``count`` windows with ``clients`` requests under way, the largest error of the answers sampled)."""
        self._samples = deque(maxlen=SAMPLES_MAX)
        windows: list[Window] = []
        ends = [time.perf_counter() + seconds / 2]  # the first half window is the warm-up

        def goes_on() -> bool:
            return len(windows) <= count

        for window in self._turns(clients, goes_on, every=SAMPLE_EVERY, ends=ends):
            windows.append(window)
            ends[0] = time.perf_counter() + seconds
        return windows[1:], self._error()

    def _turns(self, clients: int, goes_on: Callable[[], bool], *, every: int,
               ends: list[float] | None = None) -> Iterator[Window]:  # fmt: skip
        """The closed loop; yields a window whenever one ends, and at last waits for what is under way."""
        self._submit(clients)
        batches, window = 0, Window()
        opened, cpu = time.perf_counter(), time.process_time()
        answered = 0
        while self._in_flight:
            if not self._poll.poll(HANG_S * 1000):
                raise EngineFailed(f"nothing is answered within {HANG_S:g} s: {self.lane.stats()}")
            finished = 0
            for completion in self.engine.drain():
                now = time.perf_counter_ns()
                if completion.code != "ok":
                    raise EngineFailed(f"{completion.code}: {completion.message}")
                owners = completion.owners
                window.latencies_ns += [now - owner[1] for owner in owners]
                finished += len(owners)
                if batches % every == 0:
                    # A copy: what the rows show is the engine's memory.
                    self._samples.append(([owner[0] for owner in owners], completion.output.clone()))
                batches += 1
                window.batches += 1
            self._in_flight -= finished
            answered += finished
            now_s = time.perf_counter()
            if ends is not None and now_s >= ends[0] and goes_on():
                passed = now_s - opened
                window.items_per_s = answered / passed
                window.cpu_share = (time.process_time() - cpu) / passed
                yield window
                answered, window = 0, Window()
                opened, cpu = time.perf_counter(), time.process_time()
            if goes_on():
                self._submit(finished)

    def _submit(self, count: int) -> None:
        items, lane = self._items, self.lane
        for _ in range(count):
            index = self._next
            self._next = (index + 1) % len(items)
            lane.submit((index, time.perf_counter_ns()), items[index], _core.now_ns(), FAR, False)
        self._in_flight += count
        if count:
            lane.announce()

    def counted(self) -> dict[str, int]:
        """What the engine has counted so far of how batches ran; what it does not count is left out."""
        stats = self.lane.stats()
        found = {name: int(stats[name]) for name in COUNTERS if name in stats}
        eager = stats.get("eager_runs")
        return found | ({f"eager: {reason}": int(count) for reason, count in eager.items()} if eager else {})

    def notes(self) -> dict[str, Any]:
        """Whether batches are replayed as graphs and filled up, or why not, and to which sizes."""
        stats = self.lane.stats()
        return {
            "graphs": stats["graph_note"] or "in use",
            "padding": stats["padding_note"] or "in use",
            "buckets": stats["buckets"],
        }

    def close(self) -> None:
        self.lane.close()
        self.lane.join()
        self.engine.drain()


@contextmanager
def engine_loop(model: _core.TorchModel, truth: Truth, batch: int) -> Iterator[EngineLoop]:
    """A loop whose workers end with it."""
    loop = EngineLoop(model, truth, batch)
    try:
        yield loop
    finally:
        loop.close()


def percentile_ms(windows: list[Window], share: float) -> float:
    """Of all windows together, ms."""
    latencies = sorted(value for window in windows for value in window.latencies_ns)
    return round(latencies[min(len(latencies) - 1, int(share * len(latencies)))] / 1e6, 4) if latencies else 0.0


def median_of(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0


def saved_file(folder: Path, network: Network, content: bytes) -> Path:
    """The TorchScript of a network as a file."""
    path = folder / f"{network.name}.pt"
    path.write_bytes(content)
    return path


def no_threads_for_the_host() -> None:
    """The host's own operators run beside the measurement otherwise."""
    torch.set_num_threads(1)
