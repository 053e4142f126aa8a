"""The usage of GPUs as descriptions show it, with a driver that the test plays."""

from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.telemetry import gpu_usage, nvml
from pyserve.telemetry.gpu_usage import KEPT_S, NO_GPU, UNKNOWN, GpuUsage, ask_usage
from pyserve.telemetry.host_metrics import HostMetrics
from pyserve.telemetry.metrics_config import MetricsConfig
from pyserve.telemetry.nvml import Usage
from pyserve.telemetry.system_metrics import SystemMetrics

MIB = 1 << 20


@pytest.mark.parametrize(
    "told, text",
    [
        (
            {1: Usage(456 * MIB + 1, 80 << 30, 3, 12)},
            "gpuId::1 utilization.gpu::3 % utilization.memory::12 % memory.used::456 MiB",
        ),
        (  # a part of a GPU: what the driver says is shown
            {1: Usage(456 * MIB, 80 << 30)},
            "gpuId::1 utilization.gpu::[N/A] utilization.memory::[N/A] memory.used::456 MiB",
        ),
        ({0: Usage(0, 1)}, UNKNOWN),
        ({}, UNKNOWN),
        (FileNotFoundError("nvidia-smi"), UNKNOWN),
        (TimeoutError(), UNKNOWN),
        (LookupError("set CUDA_DEVICE_ORDER"), UNKNOWN),
        (RuntimeError("no CUDA GPUs are available"), UNKNOWN),
    ],
)
def test_the_drivers_numbers_are_shown_in_torchserves_words(told: dict[int, Usage] | Exception, text: str) -> None:
    async def ask(indexes: Collection[int]) -> dict[int, Usage]:
        if isinstance(told, Exception):
            raise told
        return told

    usage = GpuUsage(ask)
    asyncio.run(usage.refresh({1}))
    assert usage.text(1) == text


def test_the_driver_is_asked_once_for_all_and_not_again_at_once() -> None:
    asked: list[list[int]] = []
    now = 100.0

    async def ask(indexes: Collection[int]) -> dict[int, Usage]:
        asked.append([*indexes])
        return {index: Usage(0, 1, len(asked), 0) for index in indexes}

    async def test() -> None:
        nonlocal now
        usage = GpuUsage(ask, lambda: now)
        assert (usage.text(None), usage.text(0)) == (NO_GPU, UNKNOWN)
        await usage.refresh(set())
        await usage.refresh({0, 1})
        await usage.refresh({0, 1})
        assert asked == [[0, 1]]
        now += KEPT_S
        await usage.refresh({1})
        assert asked == [[0, 1], [1]] and "utilization.gpu::2 %" in usage.text(1)

    asyncio.run(test())


def test_without_a_driver_the_usage_is_not_known() -> None:
    usage = GpuUsage()
    asyncio.run(usage.refresh({99}))
    assert usage.text(99) == UNKNOWN


# --- the driver, played by a module and a command ---------------------------------------------------------------------

NAME, OTHER, PART = "GPU-3f2b", "GPU-77aa", "MIG-1c5d"


class Nvml(ModuleType):
    """`pynvml` with one GPU, or those of `gpus`, and what was called. A name that begins with MIG- is a part."""

    nvmlMemory_v2 = 0x02000028

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.gpus = [NAME]
        self.parts: list[str] = []  # of the first GPU
        self.calls: list[str] = []
        self.refuses = ""
        self.before: Callable[[], None] = lambda: None

    def _called(self, name: str) -> None:
        self.calls.append(name)
        self.before()
        if name == self.refuses:
            raise Exception(f"NVMLError in {name}")  # its class is derived from nothing else

    def nvmlInit(self) -> None:
        self._called("init")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, place: int) -> str:
        return self.gpus[place]

    def nvmlDeviceGetUUID(self, handle: str) -> bytes | str:
        return handle.encode() if handle == OTHER else handle  # old libraries answer bytes

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if handle != self.gpus[0] or not self.parts:
            raise Exception("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:
        return self.parts[place]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._called("handle")
        assert uuid in (*self.gpus, *self.parts)
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._called("rates")
        if handle.startswith("MIG-"):
            raise Exception("Not Supported")
        return SimpleNamespace(gpu=37, memory=12)

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:
        self._called("old memory" if version is None else "memory")
        used = {OTHER: 789, PART: 55}.get(handle, 456)
        return SimpleNamespace(total=80 << 30, reserved=600 << 20, used=(used << 20) + 1000)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        if handle.startswith("GPU-"):
            raise Exception("Invalid Argument")
        return self.gpus[0]

    def nvmlDeviceGetPciInfo(self, handle: str) -> Any:
        assert handle.startswith("GPU-")
        return SimpleNamespace(busId=f"00000000:{0x3B + self.gpus.index(handle):X}:00.0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch was built for CUDA and must not be asked; `nvidia-smi` and the library are not there."""

    def fail(*_: object) -> None:
        raise AssertionError("this makes a CUDA context")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    for name in ("get_device_properties", "_lazy_init", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, fail)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an ImportError
    monkeypatch.setattr(nvml, "_is_initialised", False)


@pytest.fixture
def driver(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def add_command(folder: Path, script: str) -> None:
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)


def usage_now() -> str:
    usage = GpuUsage()
    asyncio.run(usage.refresh({0}))
    return usage.text(0)


def ask(*indexes: int) -> dict[int, Usage]:
    return asyncio.run(ask_usage(indexes))


def test_the_drivers_library_is_asked_and_no_command_run(driver: Nvml, tmp_path: Path) -> None:
    add_command(tmp_path, "echo 1, 1, 1")
    assert ask(0) == {0: Usage((456 << 20) + 1000, 80 << 30, 37, 12)}
    assert usage_now() == "gpuId::0 utilization.gpu::37 % utilization.memory::12 % memory.used::456 MiB"
    assert driver.calls == ["init", "handle", "memory", "rates", "handle", "memory", "rates"], "initialised once"
    assert nvml.free_memory(0) == ((80 << 30) - (456 << 20) - 1000, 80 << 30)
    assert nvml.free_memory(1) is None


def test_torchs_number_is_the_one_that_cuda_leaves(driver: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.gpus = [NAME, OTHER]
    used = [each.used_size >> 20 for each in ask(0, 1, 2).values()]
    assert used == [456, 789]
    assert nvml.bus_addresses() == ["0000:3b:00.0", "0000:3c:00.0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [each.used_size >> 20 for each in ask(0, 1).values()] == [789, 456]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-77")
    assert {index: each.used_size >> 20 for index, each in ask(0, 1).items()} == {0: 789}
    assert nvml.bus_addresses() == ["0000:3c:00.0"]


def test_of_a_part_of_a_gpu_what_is_known_is_shown(driver: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.parts = ["MIG-0000", PART]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", PART)
    assert usage_now() == "gpuId::0 utilization.gpu::[N/A] utilization.memory::[N/A] memory.used::55 MiB"
    assert nvml.bus_addresses() == ["0000:3b:00.0"], "of the whole GPU"


def test_gauges_of_the_system_have_what_the_driver_says(driver: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.gpus, driver.parts = [NAME, OTHER], [PART]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{OTHER},{PART}")
    host = HostMetrics("h", MetricsConfig(), None, is_strict=False)
    asyncio.run(SystemMetrics(host, 60, gpus=2).measure_once())
    samples = {
        (sample.name, sample.labels["DeviceId"]): round(sample.value, 2)
        for family in host.collect() if family.name.startswith("GPU")
        for sample in family.samples
    }  # fmt: skip
    assert samples == {
        ("GPUUtilization", "0"): 37, ("GPUMemoryUsed", "0"): 789, ("GPUMemoryUtilization", "0"): 0.96,
        ("GPUMemoryUsed", "1"): 55, ("GPUMemoryUtilization", "1"): 0.07,
    }  # fmt: skip


def test_a_driver_that_names_no_gpu_is_no_error_of_ours(driver: Nvml) -> None:
    def lost(place: int) -> str:
        raise Exception("NVMLError: GPU is lost")

    driver.__dict__["nvmlDeviceGetHandleByIndex"] = lost
    assert usage_now() == UNKNOWN
    assert nvml.free_memory(0) is None
    with pytest.raises(LookupError, match="GPU is lost"):
        nvml.bus_addresses()
    with pytest.raises(LookupError, match="does not answer as it should"):
        nvml.driver_state()
    del driver.__dict__["nvmlDeviceGetHandleByIndex"]
    assert ask(0)[0].busy == 37, "the next one may ask"


def test_an_old_driver_is_asked_in_its_own_way(driver: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.refuses = "memory"
    assert ask(0)[0].used_size >> 20 == 456
    monkeypatch.delattr(Nvml, "nvmlMemory_v2")
    assert ask(0)[0].used_size >> 20 == 456


def test_a_gpu_that_does_not_answer_hides_no_other(driver: Nvml) -> None:
    driver.gpus = [NAME, OTHER]
    told = driver.nvmlDeviceGetMemoryInfo

    def lost(handle: str, version: int | None = None) -> Any:
        if handle == NAME:
            raise Exception("GPU is lost")
        return told(handle, version)

    driver.__dict__["nvmlDeviceGetMemoryInfo"] = lost
    assert list(ask(0, 1)) == [1]


def test_without_a_driver_that_the_library_knows_the_command_is_run(driver: Nvml, tmp_path: Path) -> None:
    driver.refuses = "init"
    assert usage_now() == UNKNOWN, "there is no command either"
    add_command(tmp_path, f"echo {NAME}, NVIDIA H200, 7, 100, 5, 6")
    assert ask(0) == {0: Usage(7 << 20, 100 << 20, 5, 6)}
    driver.refuses = ""
    assert ask(0)[0].busy == 37


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo GPU-a, H200, 7, 100, 5, 6; echo GPU-b, H200, 8, 100, '[N/A]', '[N/A]'", {0: 7, 1: 8}),
        ("echo GPU-a, H200, 7, 100, 5, 6", {0: 7}),
        ("echo GPU-a, H200, 7, 100, 5, 6; exit 9", {}),
        ("echo No devices were found", {}),
        ("echo GPU-a, GB10, '[N/A]', '[N/A]', 5, 6; echo GPU-b, GB10, 8, 100, 5, 6", {1: 8}),
        ("echo 1, 2, 3, 4, 5, 6", {}),
        ("echo a, b, c, d, e, f", {}),
        ("", {}),
    ],
)
def test_without_the_library_the_command_is_run_once_for_all(tmp_path: Path, script: str, told: dict[int, int]) -> None:
    add_command(tmp_path, f"echo x >> {tmp_path}/runs; {script}")
    usage = GpuUsage()
    asyncio.run(usage.refresh({0, 1}))
    assert (tmp_path / "runs").read_text() == "x\n"
    for index in (0, 1):
        text = f"memory.used::{told[index]} MiB" if index in told else UNKNOWN
        assert usage.text(index).endswith(text)


def test_a_driver_that_hangs_blocks_neither_the_loop_nor_more_than_its_thread(
    driver: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_usage, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(nvml, "ASKING_MAX_S", 0.05)
    released = threading.Event()
    driver.before = lambda: released.wait(60) and None
    turns = 0

    async def test() -> list[str]:
        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.ensure_future(turn())
        texts = []
        for _ in range(3):
            usage = GpuUsage()
            await usage.refresh({0})
            texts.append(usage.text(0))
        turning.cancel()
        assert driver.calls == ["init"], "the others did not even begin to ask"
        return texts

    assert asyncio.run(test()) == [UNKNOWN] * 3
    assert turns > 3
    assert nvml.free_memory(0) is None
    waiting = [thread for thread in threading.enumerate() if thread.name == "gpu-usage"]
    assert waiting and all(thread.daemon for thread in waiting), (
        "neither the loop's end nor the process's waits for them"
    )
    released.set()
    for thread in waiting:
        thread.join()
    assert ask(0)[0].busy == 37, "it is asked again once it answers"


def test_another_kind_of_device_that_hangs_does_not_block_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(index: int) -> int:
        released.wait(60)
        return 0

    monkeypatch.setattr(gpu_usage, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "memory_reserved", hang)
    assert usage_now() == UNKNOWN
    released.set()


def test_the_server_process_imports_no_cuda_for_it() -> None:
    """In a process of its own: nothing of torch.cuda has been initialised after asking."""
    script = (
        "import asyncio, torch\nfrom pyserve.telemetry.gpu_usage import GpuUsage\n"
        "asyncio.run(GpuUsage().refresh({0}))\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
