"""The native engine on an event loop: loads it, drains its completions, shares the CPUs among its workers.

Loop thread only, unless a function says otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from pyserve.errors import ConfigError
from pyserve.memory_at_rest import MemoryAtRest

if TYPE_CHECKING:
    from pyserve import _core

log = logging.getLogger(__name__)


def load_core() -> ModuleType:
    """The extension module.

    Raises:
        ConfigError: it is not built, or was built for another torch; the text says how to build it.
    """
    build = "build it with `make build` (or: python setup.py build_ext --inplace)"
    try:
        from pyserve._build_info import TORCH_VERSION
    except ImportError:
        raise ConfigError(f"pyserve's native engine is not built; {build}") from None
    if torch.__version__ != TORCH_VERSION:
        raise ConfigError(
            f"pyserve's native engine was built for torch {TORCH_VERSION}, but torch {torch.__version__} is "
            f"installed; {build.replace('build it', 'build it again', 1)}"
        )
    try:
        from pyserve import _core
    except ImportError as error:
        raise ConfigError(f"pyserve's native engine cannot be loaded ({error}); {build}") from error
    return _core


class Engine:
    """All lanes of this process.

    Args:
        cpu_budget: CPUs that the workers of all lanes on the CPU share.

    Attributes:
        has_rows: there may be requests that the engine answers by itself, see `lanes.front_rows`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cpu_budget: int):
        self.core = load_core()
        self.cpu_budget = cpu_budget
        self.has_rows = False
        self._loop = loop
        self._engine: _core.Engine = self.core.Engine()
        self._lanes: dict[_core.Lane | _core.ProcessLane, int] = {}  # -> wanted workers; lanes on the CPU only
        # Called after each change of a worker's state; they unregister themselves.
        self._watchers: list[Callable[[], None]] = []
        self._signals = 0
        self._memory_at_rest = MemoryAtRest(loop)
        loop.add_reader(self._engine.fileno(), self._on_readable)

    def add_lane(self, models: list[_core.TorchModel], example: list[torch.Tensor], capacity: int) -> _core.Lane:
        """A lane without workers.

        Args:
            models: one and the same, loaded on each device.
            capacity: a power of two, more requests than may ever wait.
        """
        lane: _core.Lane = self.core.Lane(self._engine, models[0], example, capacity)
        lane.set_models(models)
        return lane

    def add_process_lane(self, capacity: int) -> _core.ProcessLane:
        """A lane whose workers are processes, without any. ``capacity`` as for `add_lane`."""
        lane: _core.ProcessLane = self.core.ProcessLane(self._engine, capacity)
        return lane

    def share_cpus(self, lane: _core.Lane | _core.ProcessLane, workers_count: int) -> None:
        """Sets how many workers ``lane`` is to have on the CPU, and gives every worker its share of the threads."""
        self._lanes[lane] = workers_count
        for each in self._lanes:
            each.set_intra_op_threads(self.intra_op_threads)

    def forget_lane(self, lane: _core.Lane | _core.ProcessLane) -> None:
        self._lanes.pop(lane, None)
        for each in self._lanes:
            each.set_intra_op_threads(self.intra_op_threads)

    @property
    def intra_op_threads(self) -> int:
        """Threads of one worker on the CPU."""
        return max(1, self.cpu_budget // max(1, sum(self._lanes.values())))

    @property
    def running_max(self) -> int:
        """Batches of one lane that may run on the CPU at once, so that its threads fit the budget."""
        return max(1, self.cpu_budget // self.intra_op_threads)

    @property
    def lost_count(self) -> int:
        """Native workers that were given up and have not come back."""
        return int(self._engine.lost_count)

    async def wait_for_workers(self, is_settled: Callable[[], bool]) -> None:
        """Returns once ``is_settled()``, which is asked after each change of a worker's state."""
        if is_settled():
            return
        future: asyncio.Future[None] = self._loop.create_future()

        def look() -> None:
            if not future.done() and is_settled():
                future.set_result(None)

        self._watchers.append(look)
        try:
            await future
        finally:
            self._watchers.remove(look)

    def watch(self, look: Callable[[], None]) -> None:
        """Has ``look`` called after each change of a worker's state, from now on."""
        self._watchers.append(look)

    def let_wait(self, path: _core.FastPath) -> None:
        """Has ``path`` wait for answers awake, if they are expected within microseconds and there is a CPU to spare."""
        if self.cpu_budget > 1:
            path.wait_awake(self._engine, self._on_readable)

    def close(self) -> None:
        """Stops listening. Lanes are closed by their models."""
        self._memory_at_rest.close()
        self._loop.remove_reader(self._engine.fileno())

    def _on_readable(self) -> None:
        self._memory_at_rest.note_batch()
        for completion in self._engine.drain():
            # One model's answers must not keep the others' from being delivered, nor its own of another kind.
            try:
                deliver(completion)
            except Exception:
                log.exception("delivering a batch failed")
            if self.has_rows:
                note_rows(completion)
        signals = self._engine.signals
        if signals != self._signals:  # else no worker's state can have changed
            self._signals = signals
            for look in list(self._watchers):
                look()


def note_rows(completion: _core.Completion) -> None:
    """Has the lane count those of a completion that the engine has answered by itself, if there are any."""
    try:
        if completion.row_lane is not None:
            completion.row_lane.rows_answered(completion)
    except Exception:
        log.exception("counting a batch failed")


def deliver(completion: _core.Completion) -> None:
    """Hands a completion to the lane its requests belong to."""
    for owner in completion.expired:
        owner.lane.expire(owner)
    for owner in completion.owners:
        if owner is not None:
            try:
                owner.lane.complete(completion)
            except Exception:
                # Whatever went wrong, nobody waits for ever.
                log.exception("delivering a batch failed")
                owner.lane.fail_batch(completion.owners)
            return
