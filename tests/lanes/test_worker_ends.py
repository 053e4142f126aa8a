"""Workers that are told to go at an awkward moment."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

from pyserve.errors import ModelLoadError
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.worker_handle import WorkerHandle, WorkerLoadError
from pyserve.lanes.workers import PythonWorkers
from pyserve.worker.spec import BATCH, WorkerSpec

HANG_S = 60.0
FIELDS: dict[str, Any] = {**dict.fromkeys(WorkerSpec.__dataclass_fields__, ""), "mode": BATCH, "gpu_id": None}


class Handle:
    """A process whose ``initialize`` never ends."""

    pid = 1
    is_rehearsing = is_lost = was_killed = has_lost_device = False

    def __init__(self) -> None:
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.is_released = False

    def kill(self) -> None:
        if not self.exited.done():
            self.loaded.set_exception(ModelLoadError("killed"))
            self.exited.set_result("was killed by SIGKILL")

    def release(self) -> None:
        self.is_released = True


class LateSpawner:
    """Its process comes in the moment in which nobody wants it any more: `asyncio.wait_for` of Python 3.11 and before
    then returns it instead of being cancelled."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.handle: Handle | None = None

    async def spawn(self, *args: Any, **options: Any) -> WorkerHandle:
        self.is_asked.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.handle = Handle()
        return cast(WorkerHandle, self.handle)


def test_a_process_that_comes_when_it_is_not_wanted_any_more_is_ended_and_not_waited_for() -> None:
    async def close() -> None:
        spawner = LateSpawner()
        services = MagicMock(Services, spawner=spawner, descriptors=MagicMock(), engine=MagicMock(intra_op_threads=1))
        workers = PythonWorkers(
            services, MagicMock(), WorkerSpec(**FIELDS), ModelSettings(startup_timeout_s=3600), label="m 1.0",
            worker_log=MagicMock(), device_ids=[], interpreter=None, on_event=MagicMock(), on_condition=MagicMock(),
            on_loaded=MagicMock(),
        )  # fmt: skip
        workers.set_count(1)
        await spawner.is_asked.wait()
        await workers.close()
        assert spawner.handle is not None and spawner.handle.is_released
        assert not workers.slots()

    asyncio.run(asyncio.wait_for(close(), HANG_S))


class ClearingSpawner:
    """The files of its first process are cleared away while it reads them."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        self.count = 0
        self.is_asked_again = asyncio.Event()

    async def spawn(self, *args: Any, **options: Any) -> WorkerHandle:
        self.count += 1
        handle = Handle()
        if self.count == 1:
            shutil.rmtree(self._model_dir)
            error = WorkerLoadError("there is no handler.py")
            error.repeats = True
            handle.loaded.set_exception(error)
            handle.exited.set_result("ended")
        else:
            self.is_asked_again.set()
        return cast(WorkerHandle, handle)


def test_a_file_that_is_missing_because_all_were_cleared_away_is_no_fault_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    spec = WorkerSpec(**FIELDS | {"model_dir": str(folder)})

    async def renew() -> tuple[WorkerSpec, str | None]:
        folder.mkdir()
        return spec, None

    async def start() -> None:
        spawner = ClearingSpawner(folder)
        services = MagicMock(Services, spawner=spawner, descriptors=MagicMock(), engine=MagicMock(intra_op_threads=1))
        workers = PythonWorkers(
            services, MagicMock(), spec, ModelSettings(), label="m 1.0", worker_log=MagicMock(), device_ids=[],
            interpreter=None, on_event=MagicMock(), on_condition=MagicMock(), on_loaded=MagicMock(), renew=renew,
        )  # fmt: skip
        workers.set_count(1)
        await spawner.is_asked_again.wait()
        assert folder.is_dir()
        await workers.close()

    asyncio.run(asyncio.wait_for(start(), HANG_S))
