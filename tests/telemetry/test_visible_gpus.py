"""Which of the driver's GPUs torch counts as cuda:0, cuda:1 ..."""

from __future__ import annotations

import pytest

from pyserve.telemetry.nvml import bus_address
from pyserve.telemetry.visible_gpus import DriverGpu, visible_gpus

A, B, C = (DriverGpu(f"GPU-{name}", "H200") for name in ("a1", "a2", "c3"))
DIVIDED = DriverGpu("GPU-d4", "H200", ["MIG-x1", "MIG-x2"])
EMPTY = DriverGpu("GPU-e5", "H200", [])
OLD = DriverGpu("GPU-f6", "GTX 1080")


@pytest.mark.parametrize(
    ("gpus", "wanted", "found"),
    [
        ([A, B, C], None, "a1 a2 c3"),
        ([], None, ""),
        ([A, B, C], "", ""),
        ([A, B, C], "-1", ""),
        ([A, B, C], "NoDevFiles", ""),
        ([A, B, C], "2,0", "c3 a1"),
        ([A, B, C], " 2 , 0", "c3 a1"),
        ([A, B, C], "1,-1,0", "a2"),
        ([A, B, C], "1,7,0", "a2"),
        ([A, B, C], "1gpu2,2ampere", "a2 c3"),  # as CUDA reads it
        ([A, B, C], "1,1", ""),
        ([A, B, C], "GPU-c3,GPU-a1", "c3 a1"),
        ([A, B, C], "GPU-c,GPU-a1", "c3 a1"),
        ([A, B, C], "GPU-a", ""),  # two begin so
        ([A, B, C], "GPU-c3,GPU-c", ""),  # one twice
        ([A, B, C], "GPU-c3,0", "c3"),
        ([A, DIVIDED], "MIG-x2", "MIG-x2"),
        ([A, DIVIDED], "MIG-x2,MIG-x1", "MIG-x2 MIG-x1"),
        ([A, DIVIDED], "MIG-none", ""),
        ([A, DIVIDED], "GPU-a1", "a1"),
        ([DIVIDED], None, "MIG-x1"),
        ([DIVIDED], "0", "MIG-x1"),
        ([EMPTY], None, ""),
        ([A, OLD], "GPU-f6", "f6"),
    ],
)
def test_names_come_in_cudas_order(gpus: list[DriverGpu], wanted: str | None, found: str) -> None:
    environ = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    names = [name if name.startswith("MIG-") else f"GPU-{name}" for name in found.split()]
    assert visible_gpus(gpus, environ) == names


@pytest.mark.parametrize(
    ("gpus", "wanted", "fix"),
    [
        ([A, OLD], None, "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ([A, OLD], "1", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ([A, DIVIDED], None, "CUDA_VISIBLE_DEVICES=MIG-"),
        ([A, DIVIDED], "1", "CUDA_VISIBLE_DEVICES=MIG-"),
    ],
)
def test_what_only_cuda_knows_is_not_guessed(gpus: list[DriverGpu], wanted: str | None, fix: str) -> None:
    environ = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    with pytest.raises(LookupError, match=fix):
        visible_gpus(gpus, environ)


def test_with_the_buss_order_different_gpus_are_known() -> None:
    assert visible_gpus([OLD, A], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}) == ["GPU-f6", "GPU-a1"]


def test_an_address_on_the_bus_is_as_the_kernel_writes_it() -> None:
    assert bus_address("00000000:3B:00.0") == "0000:3b:00.0"
    assert bus_address("00010000:00:00.0") == "10000:00:00.0"
