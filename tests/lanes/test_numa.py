"""Workers of an accelerator keep to the CPUs near it, on machines that the test plays."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyserve.lanes import numa
from pyserve.telemetry import nvml
from tests.support.lane_bench import LaneBench
from tests.support.networks import Identity, save_script

ADDRESS = "0000:3b:00.0"


def machine(root: Path, node: str, **cpulists: str) -> Path:
    device = root / "sys/bus/pci/devices" / ADDRESS
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    for name, cpus in cpulists.items():
        folder = root / "sys/devices/system/node" / name
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
    return root


@pytest.mark.parametrize(
    ("node", "allowed", "near"),
    [
        ("1", range(8), [2, 3, 6]),
        ("0", range(8), [0, 1, 4, 5]),
        ("0", [0, 2, 3], [0]),  # a taskset, or a cgroup's cpuset
        ("1", [0, 1], []),  # none of its node is allowed
        ("1", [2, 3], []),  # all that are allowed are near
        ("-1", range(8), []),  # the kernel does not know
        ("7", range(8), []),  # no such node
        ("x", range(8), []),
    ],
)
def test_the_cpus_of_the_devices_node_that_the_process_may_use(
    tmp_path: Path, node: str, allowed: list[int], near: list[int]
) -> None:
    root = machine(tmp_path, node, node0="0-1,4-5", node1="2-3,6")
    assert numa.near_cpus(ADDRESS, [*allowed], root) == near


def test_without_such_a_device_there_is_nothing_to_keep_to(tmp_path: Path) -> None:
    assert numa.node_of(ADDRESS, tmp_path) is None
    assert numa.near_cpus(ADDRESS, [0, 1], tmp_path) == []


@pytest.mark.parametrize("torch_says", [True, False])
def test_a_device_is_found_on_the_bus_by_torch_or_by_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_says: bool
) -> None:
    place = {"pci_domain_id": 0, "pci_bus_id": 0x3B, "pci_device_id": 0} if torch_says else {}
    module = SimpleNamespace(get_device_properties=lambda index: SimpleNamespace(**place))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(nvml, "bus_addresses", lambda: [] if torch_says else [ADDRESS])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    root = machine(tmp_path, "1", node0="0-1", node1="2-3")
    assert numa.find_cpus("cuda", 1, root) == {"cuda:0": [2, 3]}
    assert numa.find_cpus("xpu", 1, root) == ({"xpu:0": [2, 3]} if torch_says else {})


def worker_ids() -> set[int]:
    """The worker threads of this process; one of an earlier test may never have come to its end."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(task.name) for task in tasks if (task / "comm").read_text().startswith("worker-9")}


def cpus_of(threads: set[int]) -> list[set[int]]:
    """What each of them may run on."""
    return [os.sched_getaffinity(each) for each in threads]


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0))[:2])
def test_a_worker_keeps_to_its_devices_cpus(tmp_path: Path, cpu: int) -> None:
    before, others = os.sched_getaffinity(0), worker_ids()
    path, example = save_script(Identity(), tmp_path / "m.pt"), [torch.zeros(1, 2)]
    lane = LaneBench(path, example, workers=0)
    lane.lane.set_cpus("cuda:0", [1 << 20])  # of another device
    lane.lane.set_cpus("cpu", [cpu])
    lane.lane.set_workers(2)
    lane.wait(lambda: lane.states() == ["ready"] * 2)
    assert cpus_of(worker_ids() - others) == [{cpu}] * 2
    assert os.sched_getaffinity(0) == before, "the loop's is as it was"
    lane.close()


@pytest.mark.parametrize("cpus", [[], [-1], [1 << 30], [1023]])
def test_cpus_that_are_not_there_change_nothing(tmp_path: Path, cpus: list[int]) -> None:
    path, example = save_script(Identity(), tmp_path / "m.pt"), [torch.zeros(1, 2)]
    others = worker_ids()
    lane = LaneBench(path, example, workers=0)
    lane.lane.set_cpus("cpu", cpus)
    lane.lane.set_workers(1)
    lane.wait(lambda: lane.states() == ["ready"])
    assert cpus_of(worker_ids() - others) == [os.sched_getaffinity(0)]
    lane.close()
