"""A native lane driven from Python without an event loop: submit, poll the descriptor, collect."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve import _core

FAR = 1 << 62
HANG_S = 60


class LaneBench:
    """One engine with one lane.

    Attributes:
        answers: owner -> its row of the output (a structure of rows, if it has several), or the completion's code;
            copied as it came, so that what is written there later does not show.
        views: the same rows, as they lie in memory.
        completions: all that were drained, in order.
        expired: owners that expired.
    """

    def __init__(
        self, path: Path, example: Sequence[torch.Tensor], *, workers: int = 1, batch: int = 1, capacity: int = 1024,
        ready: bool = True, device: str = "cpu", model: Mapping[str, Any] | None = None,
        finish: tuple[str, int] = ("none", 0), **limits: int,
    ):  # fmt: skip
        self.engine = _core.Engine()
        self.model = _core.TorchModel.load(str(path), list(example), device=device, **(model or {}))
        self.lane = _core.Lane(self.engine, self.model, list(example), capacity)
        self.lane.set_finish(*finish)
        self.answers: dict[Any, Any] = {}
        self.views: dict[Any, Any] = {}
        self.expired: list[Any] = []
        self.completions: list[_core.Completion] = []
        self._poll = select.poll()
        self._poll.register(self.engine.fileno(), select.POLLIN)
        self.limits(batch=batch, **limits)
        self.lane.set_workers(workers)
        if ready:
            self.wait(lambda: self.states() == ["ready"] * workers)

    def limits(self, *, batch: int = 1, least: int = 1, delay_ns: int = 0, running: int = 1 << 20) -> None:
        self.lane.set_limits(
            batch_size_max=batch, batch_size_min=least, batch_delay_max_ns=delay_ns, running_max=running
        )

    def states(self) -> list[str]:
        self.lane.reap()
        return [row["state"] for row in self.lane.workers()]

    def submit(self, owner: Any, inputs: Any, deadline: int = FAR, *, wants_output: bool = False) -> int:
        return self.lane.submit(owner, inputs, _core.now_ns(), deadline, wants_output=wants_output)

    def hold(self, count: int) -> None:
        """Makes ``count`` requests wait for one another, so that they become one batch."""
        self.limits(batch=count, least=count, delay_ns=FAR)

    def drain(self) -> None:
        for completion in self.engine.drain():
            self.completions.append(completion)
            self.expired += completion.expired
            count = len(completion.owners)
            has_output = completion.code == "ok" and completion.output is not None  # else a worker has finished it
            views = rows_of(completion.output, count) if has_output else [completion.code] * count
            for i, owner in enumerate(completion.owners):
                if owner is not None:
                    assert owner not in self.answers, "answered twice"
                    self.views[owner] = views[i]
                    self.answers[owner] = copy_of(views[i])

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Polls and drains until ``is_done()``."""
        end = time.monotonic() + HANG_S
        while not is_done():
            assert time.monotonic() < end, f"hangs: {self.states()}, {self.lane.stats()}"
            # Short, because not everything that is waited for writes the descriptor.
            self._poll.poll(10)
            self.drain()

    def wait_for(self, count: int) -> None:
        self.wait(lambda: len(self.answers) >= count)

    def forget(self) -> None:
        """What was answered so far, so that owners may come again."""
        for each in (self.answers, self.views, self.completions):
            each.clear()  # type: ignore[attr-defined]

    def close(self) -> None:
        self.lane.close()
        self.lane.join()
        self.drain()


def rows_of(output: Any, count: int) -> list[Any]:
    if isinstance(output, torch.Tensor):
        return list(output)
    if isinstance(output, dict):
        return [{key: value[i] for key, value in output.items()} for i in range(count)]
    return [[value[i] for value in output] for i in range(count)]


def copy_of(answer: Any) -> Any:
    if isinstance(answer, torch.Tensor):
        return answer.clone()
    if isinstance(answer, dict):
        return {key: value.clone() for key, value in answer.items()}
    return answer if isinstance(answer, str) else [value.clone() for value in answer]


def worker_thread_count() -> int:
    """Threads of this process that a worker is or has started; they inherit its name."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        try:
            count += Path(f"/proc/self/task/{task}/comm").read_text().startswith("worker-")
        except OSError:
            pass  # ended meanwhile
    return count
