"""The usage of GPUs as descriptions show it, with a driver that the test plays."""

from __future__ import annotations

import asyncio

import pytest

from pyserve.telemetry.gpu_usage import KEPT_S, NO_GPU, UNKNOWN, GpuUsage


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
