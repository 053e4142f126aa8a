"""Memory that batches have left free goes back once no batch comes any more, and not between them."""

from __future__ import annotations

import asyncio
import ctypes
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyserve.engine import Engine
from pyserve.memory_at_rest import MemoryAtRest
from tests.support.networks import Affine, save_script

REST_S = 30.0
MB = 1 << 20


class Loop:
    """One whose time is told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, object, Timer]] = []
        self.calls: list[tuple[object, ...]] = []

    def call_later(self, delay_s: float, call: object) -> Timer:
        self.timers.append((self.now + delay_s, call, timer := Timer()))
        return timer

    def run_in_executor(self, executor: None, *call: object) -> None:
        self.calls.append(call)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = [each for each in self.timers if each[0] <= self.now]
        self.timers = [each for each in self.timers if each[0] > self.now]
        for _, call, timer in due:
            if not timer.is_cancelled:
                call()  # type: ignore[operator]


class Timer:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def memory(loop: Loop) -> MemoryAtRest:
    return MemoryAtRest(loop, REST_S, trim=lambda padding: 1)  # type: ignore[arg-type]


def test_it_goes_back_once_after_a_time_without_a_batch(loop: Loop, memory: MemoryAtRest) -> None:
    memory.note_batch()
    loop.pass_time(REST_S)
    assert not loop.calls  # how long ago the batch was is not known: it may have been just now
    loop.pass_time(REST_S)
    assert len(loop.calls) == 1
    for _ in range(5):
        loop.pass_time(REST_S)
    assert len(loop.calls) == 1
    assert not loop.timers  # a server at rest does nothing
    memory.note_batch()
    loop.pass_time(REST_S)
    loop.pass_time(REST_S)
    assert len(loop.calls) == 2


def test_it_stays_while_batches_come(loop: Loop, memory: MemoryAtRest) -> None:
    for _ in range(20):
        memory.note_batch()
        loop.pass_time(REST_S * 0.9)
        assert len(loop.timers) == 1
    assert not loop.calls


def test_nothing_is_left_behind_when_it_closes(loop: Loop, memory: MemoryAtRest) -> None:
    memory.close()
    memory.note_batch()
    memory.close()
    loop.pass_time(REST_S)
    loop.pass_time(REST_S)
    assert not loop.calls


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc has malloc_trim")
def test_what_is_free_between_blocks_in_use_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = []
    for _ in range(2000):  # too small for pages of their own; every other one stays, so that no end of a heap is free
        large, small = libc.malloc(64 << 10), libc.malloc(2048)
        ctypes.memset(large, 1, 64 << 10)
        blocks.append((large, small))
    for large, _ in blocks:
        libc.free(large)
    before = own_memory()
    asyncio.run(rested())
    assert own_memory() < before - 60 * MB
    for _, small in blocks:
        libc.free(small)


def test_the_engine_tells_of_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Noted(MemoryAtRest):
        def note_batch(self) -> None:
            told.append("a batch")

        def close(self) -> None:
            told.append("the end")

    monkeypatch.setattr("pyserve.engine.MemoryAtRest", Noted)
    asyncio.run(one_batch(tmp_path))
    assert told[0] == "a batch"
    assert told[-1] == "the end"


async def one_batch(folder: Path) -> None:
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    engine = Engine(loop, cpu_budget=1)
    example = [torch.zeros(1, 16)]
    model = engine.core.TorchModel.load(str(save_script(Affine(), folder / "m.pt")), example)
    lane = engine.add_lane([model], example, 8)
    lane.set_limits(batch_size_max=1, batch_size_min=1, batch_delay_max_ns=0, running_max=1)
    lane.set_workers(1)
    asker = SimpleNamespace(lane=SimpleNamespace(complete=answered.set_result))
    now = time.monotonic_ns()
    lane.submit(asker, example, now, now + 60_000_000_000)
    await asyncio.wait_for(answered, 60)
    lane.set_workers(0)
    await engine.wait_for_workers(lambda: all(row["state"] == "stopped" for row in lane.workers()))
    lane.join()
    engine.close()


async def rested() -> None:
    memory = MemoryAtRest(asyncio.get_running_loop(), rest_s=0.0)
    memory.note_batch()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    await asyncio.get_running_loop().shutdown_default_executor()


def own_memory() -> int:
    return sum(int(line.split()[1]) * 1024 for line in Path("/proc/self/smaps_rollup").read_text().splitlines()
               if line.startswith("Pss_Anon:"))  # fmt: skip
