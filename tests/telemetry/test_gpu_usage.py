"""The usage of GPUs as descriptions show it, with a driver that the test plays."""

from __future__ import annotations

import asyncio
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.telemetry import gpu_usage
from pyserve.telemetry.gpu_usage import KEPT_S, NO_GPU, UNKNOWN, GpuUsage, ask_driver


@pytest.mark.parametrize(
    "told, text",
    [
        ("3, 12, 456\n", "gpuId::1 utilization.gpu::3 % utilization.memory::12 % memory.used::456 MiB"),
        ("[N/A], [N/A], 456\n", UNKNOWN),
        ("", UNKNOWN),
        ("1, 2", UNKNOWN),
        (FileNotFoundError("nvidia-smi"), UNKNOWN),
        (TimeoutError(), UNKNOWN),
        (RuntimeError("no CUDA GPUs are available"), UNKNOWN),
    ],
)
def test_the_drivers_numbers_are_shown_in_torchserves_words(told: str | Exception, text: str) -> None:
    async def ask(index: int) -> str:
        if isinstance(told, Exception):
            raise told
        return told

    usage = GpuUsage(ask)
    asyncio.run(usage.refresh({1}))
    assert usage.text(1) == text


def test_the_driver_is_not_asked_again_at_once() -> None:
    asked: list[int] = []
    now = 100.0

    async def ask(index: int) -> str:
        asked.append(index)
        return f"{len(asked)}, 0, 0"

    async def test() -> None:
        nonlocal now
        usage = GpuUsage(ask, lambda: now)
        assert (usage.text(None), usage.text(0)) == (NO_GPU, UNKNOWN)
        await usage.refresh(set())
        await usage.refresh({0, 1})
        await usage.refresh({0, 1})
        assert asked == [0, 1]
        now += KEPT_S
        await usage.refresh({1})
        assert asked == [0, 1, 1] and "utilization.gpu::3 %" in usage.text(1)

    asyncio.run(test())


def test_without_a_driver_the_usage_is_not_known() -> None:
    usage = GpuUsage()
    asyncio.run(usage.refresh({99}))
    assert usage.text(99) == UNKNOWN


# --- the driver, played by a module and a command ---------------------------------------------------------------------

NAME = "GPU-3f2b"


class Nvml(ModuleType):
    """`pynvml` with one GPU, and what was called."""

    nvmlMemory_v2 = 0x02000028

    def __init__(self) -> None:
        super().__init__("pynvml")
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

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._called("handle")
        assert uuid == NAME
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self._called("rates")
        return SimpleNamespace(gpu=37, memory=12)

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int) -> Any:
        self._called("memory")
        assert version == self.nvmlMemory_v2
        return SimpleNamespace(total=80 << 30, reserved=600 << 20, used=(456 << 20) + 1000)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch sees one GPU; `nvidia-smi` and the library are not there."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=NAME.removeprefix("GPU-"))
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an ImportError
    monkeypatch.setattr(gpu_usage, "_is_initialised", False)


@pytest.fixture
def nvml(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Nvml:
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


def test_the_drivers_library_is_asked_and_no_command_run(nvml: Nvml, tmp_path: Path) -> None:
    add_command(tmp_path, "echo 1, 1, 1")
    assert asyncio.run(ask_driver(0)) == "37, 12, 456"
    assert usage_now() == "gpuId::0 utilization.gpu::37 % utilization.memory::12 % memory.used::456 MiB"
    assert nvml.calls == ["init", "handle", "rates", "memory", "handle", "rates", "memory"], "initialised once"


@pytest.mark.parametrize("refuses", ["init", "handle", "rates", "memory"])
def test_what_the_library_does_not_tell_the_command_does(nvml: Nvml, tmp_path: Path, refuses: str) -> None:
    nvml.refuses = refuses
    assert usage_now() == UNKNOWN, "there is no command either"
    add_command(tmp_path, 'case "$*" in *--id=GPU-3f2b*) echo 5, 6, 7;; esac')
    assert asyncio.run(ask_driver(0)) == "5, 6, 7\n"
    nvml.refuses = ""
    assert asyncio.run(ask_driver(0)) == "37, 12, 456"


@pytest.mark.parametrize("name", ["nvmlMemory_v2", "nvmlDeviceGetMemoryInfo", "nvmlInit"])
def test_an_old_library_of_that_name_is_no_error(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.delattr(Nvml, name)
    add_command(tmp_path, "echo 5, 6, 7")
    assert asyncio.run(ask_driver(0)) == "5, 6, 7\n"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("script", "told"), [("echo 5, 6, 7", "5, 6, 7\n"), ("exit 9", ""), ("", "")])
def test_without_the_library_the_command_is_run(tmp_path: Path, script: str, told: str) -> None:
    add_command(tmp_path, script)
    assert (UNKNOWN in usage_now()) == (told == "")
    if told:
        assert asyncio.run(ask_driver(0)) == told


def test_a_driver_that_hangs_blocks_neither_the_loop_nor_more_than_its_thread(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_usage, "TIMEOUT_S", 0.05)
    released = threading.Event()
    nvml.before = lambda: released.wait(60) and None
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
        assert nvml.calls == ["init"], "the others did not even begin to ask"
        return texts

    assert asyncio.run(test()) == [UNKNOWN] * 3
    assert turns > 3
    waiting = [thread for thread in threading.enumerate() if thread.name == "gpu-usage"]
    assert waiting and all(thread.daemon for thread in waiting), (
        "neither the loop's end nor the process's waits for them"
    )
    released.set()
    for thread in waiting:
        thread.join()
    assert asyncio.run(ask_driver(0)) == "37, 12, 456", "it is asked again once it answers"
