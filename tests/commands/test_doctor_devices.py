"""What `pyserve doctor` says of accelerators, on machines that the test plays and on a simulated one."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pyserve.commands import doctor_devices
from pyserve.commands.doctor_devices import device_checks
from pyserve.lanes import numa
from pyserve.telemetry import nvml
from pyserve.telemetry.nvml import DriverState, NoLibraryError
from pyserve.telemetry.visible_gpus import DriverGpu

H200 = DriverGpu("GPU-1", "NVIDIA H200")
DRIVER = DriverState("580.65", "13.0", [H200], [])


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*doctor_devices._SHOWN, *doctor_devices._SLOW, "CUDA_MPS_PIPE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With NVIDIA's driver and a GPU."""
    for path in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/nvidia0"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def lines(root: Path) -> list[str]:
    return [f"{each.level} {each.name}: {each.text} | {each.fix}" for each in device_checks(root)]


def driver_is(monkeypatch: pytest.MonkeyPatch, state: DriverState | Exception) -> None:
    def told() -> DriverState:
        if isinstance(state, Exception):
            raise state
        return state

    monkeypatch.setattr(nvml, "driver_state", told)


def test_a_machine_without_any_is_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert lines(tmp_path) == ["PASS devices: CPU | "]


@pytest.mark.parametrize(
    ("built", "state", "visible", "expected"),
    [
        (None, DRIVER, None, ["WARN", "built for CPUs only", "install the torch that fits the driver"]),
        ("13.0", DRIVER._replace(version="535.1", cuda="12.2"), None,
         ["WARN", "driver 535.1 runs CUDA 12.2 at most", "update the driver, or install a torch for CUDA 12"]),
        ("12.9", DRIVER._replace(cuda="12.2"), None, ["WARN", "built for CUDA 12.9, cannot use it"]),
        ("13.0", NoLibraryError("there is no driver: Driver Not Loaded"), None, ["WARN", "Driver Not Loaded"]),
        ("13.0", DRIVER, "", ["NOTE", "CUDA_VISIBLE_DEVICES= hides all GPUs", "unset it"]),
        ("13.0", DRIVER, "-1", ["NOTE", "CUDA_VISIBLE_DEVICES=-1 hides all GPUs", "unset it"]),
    ],
)  # fmt: skip
def test_why_torch_cannot_use_a_gpu_is_said(  # noqa: PLR0917
    root: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, state: Any, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", built)
    driver_is(monkeypatch, state)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (line,) = lines(root)
    assert all(part in line for part in expected), line


def test_a_container_without_the_gpus_devices_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "dev/nvidia0").unlink()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    driver_is(monkeypatch, DRIVER)
    assert "docker run --gpus all" in lines(root)[0]


def test_an_amd_gpu_needs_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert "not built for ROCm" in lines(tmp_path)[0]


@pytest.fixture
def two_gpus(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two GPUs that torch can use."""
    module = SimpleNamespace(get_device_name=lambda index: f"NVIDIA H20{index}")
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(nvml, "bus_addresses", list)
    driver_is(monkeypatch, DRIVER)
    return root


def test_gpus_are_listed_with_what_would_make_them_better(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_is(monkeypatch, DRIVER._replace(sleeps=["NVIDIA H200"]))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    told = lines(two_gpus)
    assert told[0] == "PASS devices: cuda:0 NVIDIA H200, cuda:1 NVIDIA H201 | "
    assert told[1].startswith("WARN devices: CUDA_LAUNCH_BLOCKING is set: each call waits")
    assert told[2] == "PASS devices: CUDA_VISIBLE_DEVICES=1,0 | "
    text = "\n".join(told)
    assert "PASS driver: 580.65, runs CUDA 13.0" in text
    assert "NOTE driver: persistence mode is off: NVIDIA H200" in text and "nvidia-smi -pm 1" in text
    assert "NOTE MPS: is not running" in text and "nvidia-cuda-mps-control -d" in text
    assert "ulimit -l" in text and "NUMA" not in text


def test_the_mps_daemon_is_found(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_gpus / "mps"
    folder.mkdir()
    (folder / "control").touch()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(folder))
    assert f"PASS MPS: its daemon is running, in {folder} | " in lines(two_gpus)


def test_parts_of_gpus_and_an_order_that_is_not_known_are_named(
    two_gpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver_is(monkeypatch, DRIVER._replace(gpus=[H200._replace(parts=["MIG-1", "MIG-2"])]))

    def fail() -> list[str]:
        raise LookupError("set CUDA_DEVICE_ORDER=PCI_BUS_ID")

    monkeypatch.setattr(nvml, "bus_addresses", fail)
    text = "\n".join(lines(two_gpus))
    assert "divided (MIG): NVIDIA H200; parts: MIG-1, MIG-2" in text
    assert "WARN driver: the usage of GPUs cannot be shown: set CUDA_DEVICE_ORDER=PCI_BUS_ID" in text


def test_without_the_drivers_library_it_is_named(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver_is(monkeypatch, NoLibraryError("nvidia-ml-py cannot be imported"))
    assert any(
        line.startswith("NOTE driver: nvidia-ml-py") and "pip install nvidia-ml-py" in line for line in lines(two_gpus)
    )


def test_the_node_of_each_gpu_is_shown(two_gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, cpus in (("node0", "0-1"), ("node1", "2-3")):
        folder = two_gpus / "sys/devices/system/node" / node
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus)
    device = two_gpus / "sys/bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    monkeypatch.setattr(numa, "bus_address", lambda index, kind: None if index else "0000:3b:00.0")
    for allowed, expected in (
        ({0, 2}, "PASS NUMA: cuda:0 is on node 1: its workers keep to 1 of 2 CPUs"),
        ({0, 1}, "WARN NUMA: cuda:0 is on node 1, of which this process may use no CPU"),
    ):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed)
        told = [line for line in lines(two_gpus) if "NUMA" in line]
        assert told[0].startswith(expected) and told[1].startswith("NOTE NUMA: cuda:1: its node is not known")


def test_any_kind_of_accelerator_is_listed(accelerator: str, tmp_path: Path) -> None:
    first = lines(tmp_path)[0]
    assert first.startswith("PASS devices: ") and accelerator in first
