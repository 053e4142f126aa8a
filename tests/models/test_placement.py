"""Where models go: which devices they may use, in which order, and what becomes of numbers that no device has."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from pyserve import devices
from pyserve.archive.model_config import ModelConfig
from pyserve.errors import InvalidModelError, OutOfMemoryError
from pyserve.lanes.device_copies import check_room
from pyserve.models.placement import Resident, allowed_devices, gpu_count, ordered_devices


def config(**values: Any) -> ModelConfig:
    return ModelConfig.parse(json.dumps(values).encode(), "m.mar")


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four devices of a kind that torch has a name for."""
    monkeypatch.setattr(devices, "kind", lambda: "xpu")
    monkeypatch.setattr(devices, "count", lambda: 4)


def unknown(index: int) -> None:
    """How much memory is free."""


@pytest.mark.usefixtures("four")
def test_number_of_gpu_is_the_most_that_are_used() -> None:
    assert [gpu_count(most) for most in (None, 0, 2, 9)] == [4, 0, 2, 4]


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("values", "gpus", "allowed"),
    [
        ({}, 4, [0, 1, 2, 3]),
        ({}, 2, [0, 1]),
        ({"deviceIds": [2, 0]}, 4, [2, 0]),
        ({"deviceIds": [1, 1]}, 4, [1]),
        ({"deviceType": "gpu"}, 4, [0, 1, 2, 3]),
        ({"deviceType": "cpu", "deviceIds": [1]}, 4, []),
        ({"deviceIds": [3]}, 0, []),
    ],
)
def test_a_model_may_use_what_it_names(values: dict[str, Any], gpus: int, allowed: list[int]) -> None:
    assert allowed_devices(config(**values), gpus, label="m.mar") == allowed


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("gpus", "text"),
    [
        (4, r"m\.mar: deviceIds \[0, 7\] in model-config.yaml name GPU 7, but GPUs 0 to 3 are there; name GPUs that"),
        (1, r"GPU 7, but only GPU 0 is there, as number_of_gpu=1 in config.properties has it; name"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_its_number(gpus: int, text: str) -> None:
    with pytest.raises(InvalidModelError, match=text):
        allowed_devices(config(deviceIds=[0, 7]), gpus, label="m.mar")


@pytest.mark.usefixtures("four")
def test_torchserve_leaves_the_numbers_out_then(caplog: pytest.LogCaptureFixture) -> None:
    assert allowed_devices(config(deviceIds=[0, 7]), 4, label="m.mar", is_lenient=True) == [0, 1, 2, 3]
    assert "using any" in caplog.text


@pytest.mark.parametrize("values", [{"deviceType": "gpu"}, {"deviceIds": [1]}])
def test_without_a_device_the_cpu_serves_with_a_warning(
    values: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count", lambda: 0)
    with caplog.at_level(logging.WARNING):
        assert ordered_devices(allowed_devices(config(**values), 0, label="m.mar")) == ["cpu"]
    assert "torch sees none; serving on the CPU" in caplog.text


@pytest.mark.usefixtures("four")
def test_the_first_worker_goes_where_most_memory_is_free() -> None:
    free = {0: 10, 1: 40, 2: 30, 3: 20}
    assert ordered_devices([0, 1, 2, 3], free=free.get) == ["xpu:1", "xpu:2", "xpu:3", "xpu:0"]
    # What another model is about to take is not free any more.
    coming = [Resident(("xpu:1",), 25)]
    assert ordered_devices([0, 1, 2, 3], coming, free=free.get) == ["xpu:2", "xpu:3", "xpu:1", "xpu:0"]


@pytest.mark.usefixtures("four")
def test_where_memory_is_not_known_the_fewest_models_count() -> None:
    there = [Resident(("xpu:0",)), Resident(("xpu:0", "xpu:1"))]
    assert ordered_devices([0, 1, 2], there, free=unknown) == ["xpu:2", "xpu:1", "xpu:0"]


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_take_turns_in_the_order_of_the_numbers(workers: int) -> None:
    free = {3: 10, 1: 40, 0: 30}
    first = ordered_devices([3, 1, 0], workers=workers, free=free.get)
    assert first == (["xpu:1", "xpu:0", "xpu:3"] if workers == 2 else ["xpu:3", "xpu:1", "xpu:0"])


def room_for(free: int, total: int) -> Callable[[int], tuple[int, int]]:
    return lambda index: (free, total)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("size", "text", "may_pass"),
    [
        (60_000_000, r"m\.mar needs 63\.0 MB on xpu:1, where 40\.0 MB of 80\.0 MB are free; unregister a model", True),
        (90_000_000, r"m\.mar needs 94\.5 MB on xpu:1, where 40\.0 MB of 80\.0 MB are free; use a device with", False),
    ],
)
def test_a_refusal_names_what_is_needed_and_what_is_free(
    size: int, text: str, may_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "memory", room_for(40_000_000, 80_000_000))
    with pytest.raises(OutOfMemoryError, match=text) as refused:
        check_room("m.mar", "xpu:1", size)
    assert refused.value.may_pass is may_pass
    assert refused.value.status == 507
    check_room("m.mar", "xpu:1", 30_000_000)
    check_room("m.mar", "cpu", 1 << 60)


@pytest.mark.usefixtures("four")
def test_memory_that_the_process_keeps_for_itself_is_given_back_before_anything_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [10]
    monkeypatch.setattr(devices, "memory", lambda index: (free[0], 100))
    monkeypatch.setattr(devices, "give_back", lambda: free.__setitem__(0, 90))
    check_room("m.mar", "xpu:1", 50)


def test_without_numbers_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "memory", lambda index: None)
    check_room("m.mar", "cuda:0", 1 << 60)
