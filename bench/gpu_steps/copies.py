"""What everything is made of, alone: copies up, down and on the host, events, launches, allocations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_steps import device as on_device
from bench.gpu_steps.settings import Emit, Lacks, Settings

SIZES = {"one uint8 picture": 150_528, "32 uint8 pictures": 4_816_896, "32 float32 pictures": 19_267_584}
HOST_ALLOCATION = 256 << 20


def run(settings: Settings, emit: Emit) -> None:
    """A row for each size, one for the small things."""
    device = on_device.accelerator()
    seconds = 0.02 if settings.tiny else 0.3
    for name, size in SIZES.items():
        count = size // 64 if settings.tiny else size
        emit({"what": name, "bytes": count, **copies(device, count, seconds)})
    emit({"what": "calls, us", **calls(device, seconds)})
    emit({"what": "graph", **graph(device, seconds)})
    emit({"what": "allocations, ms", **allocations(device, 1 << 20 if settings.tiny else HOST_ALLOCATION)})


def timed(call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call; the first five are not counted."""
    for _ in range(5):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def copies(device: torch.device, size: int, seconds: float) -> dict[str, float]:
    """GB/s, each copy waited for."""
    plain = torch.randint(0, 256, (size,), dtype=torch.uint8)
    other = torch.empty_like(plain)
    pinned, there = plain.pin_memory(), plain.to(device)
    stream = on_device.new_stream(device)

    def up(source: torch.Tensor) -> None:
        with on_device.on(stream):
            there.copy_(source, non_blocking=True)
        stream.synchronize()

    def down(target: torch.Tensor) -> None:
        with on_device.on(stream):
            target.copy_(there, non_blocking=True)
        stream.synchronize()

    ways: dict[str, Callable[[], Any]] = {
        "up_pinned": lambda: up(pinned), "up_pageable": lambda: up(plain), "down_pinned": lambda: down(pinned),
        "down_pageable": lambda: down(other), "host": lambda: other.copy_(plain),
    }  # fmt: skip
    torch.set_num_threads(1)
    return {name: round(size / timed(call, seconds) / 1e9, 2) for name, call in ways.items()}


def calls(device: torch.device, seconds: float) -> dict[str, float]:
    stream, event = on_device.new_stream(device), on_device.new_event(device)
    numbers = torch.ones(1, device=device)

    def launch() -> None:
        with on_device.on(stream):
            numbers.add_(1)

    def wait() -> None:
        event.record(stream)
        event.synchronize()

    ways: dict[str, Callable[[], Any]] = {
        "make_event": lambda: on_device.new_event(device).record(stream), "record": lambda: event.record(stream),
        "record_and_wait": wait, "launch": launch,
    }  # fmt: skip
    found = {}
    for name, call in ways.items():
        found[name] = round(1e6 * timed(call, seconds / 4), 2)
        on_device.synchronize(device)
    return found


def graph(device: torch.device, seconds: float) -> dict[str, Any]:
    """Microseconds of the host for replaying 100 kernels, and for launching them one by one."""
    stream = on_device.new_stream(device)
    numbers = torch.ones(16, device=device)

    def many() -> None:
        for _ in range(100):
            numbers.add_(1)

    try:
        with torch.inference_mode():
            with on_device.on(stream):
                many()
            on_device.synchronize(device)
            captured, _ = on_device.capture(device, stream, many, None)
    except Lacks as lack:
        return {"failed": f"lacks {lack}"}

    def replay() -> None:
        with on_device.on(stream):
            captured.replay()

    def one_by_one() -> None:
        with on_device.on(stream):
            many()

    us = {}
    for name, call in (("replay_us", replay), ("one_by_one_us", one_by_one)):
        us[name] = round(1e6 * timed(call, seconds / 4), 1)
        on_device.synchronize(device)
    return us


def allocations(device: torch.device, size: int) -> dict[str, float]:
    """Page-locked memory is slow to get, which is why it is kept."""
    began = time.perf_counter()
    held = torch.empty(size, dtype=torch.uint8).pin_memory()
    pinned_ms = 1e3 * (time.perf_counter() - began)
    del held
    filled = torch.empty(size, dtype=torch.uint8, device=device)
    del filled
    began = time.perf_counter()
    on_device.forget_peak(device)
    return {
        "pin_ms": round(pinned_ms, 2),
        "bytes": size,
        "empty_cache_ms": round(1e3 * (time.perf_counter() - began), 2),
    }
