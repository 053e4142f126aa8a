"""Which CPUs are near an accelerator, on machines where memory is nearer to some than to others (NUMA).

A worker thread of a device, and the page-locked memory that it takes, belong to the device's node: copies from another
one are a fifth to two fifths slower.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection
from pathlib import Path

from pyserve.telemetry import nvml

log = logging.getLogger(__name__)


def node_of(address: str, root: Path = Path("/")) -> int | None:
    """The node of a device on the PCI bus; None where the machine has one only, or the kernel does not know.

    Args:
        address: such as ``0000:3b:00.0``.
        root: where ``sys`` is.
    """
    try:
        node = int((root / "sys/bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cpus_of(node: int, root: Path = Path("/")) -> set[int]:
    """The CPUs of a node; none if there is no such node."""
    try:
        text = (root / f"sys/devices/system/node/node{node}/cpulist").read_text()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def near_cpus(address: str, allowed: Collection[int], root: Path = Path("/")) -> list[int]:
    """Those of ``allowed`` that are near the device; none where that would leave none, or all.

    Args:
        allowed: what affinity and cgroup leave to this process.
    """
    node = node_of(address, root)
    near = sorted(cpus_of(node, root).intersection(allowed)) if node is not None else []
    return near if len(near) < len(allowed) else []


def bus_address(index: int, kind: str) -> str | None:
    """Where on the bus a device is that torch counts, of a process that uses it; None if torch does not say.

    Args:
        kind: such as ``cuda``.
    """
    import torch

    try:
        properties = torch.get_device_module(kind).get_device_properties(index)
        domain, bus, place = (getattr(properties, f"pci_{name}_id") for name in ("domain", "bus", "device"))
    except (RuntimeError, AttributeError, AssertionError):  # not every backend has them, nor every torch
        return None
    return f"{domain:04x}:{bus:02x}:{place:02x}.0"


@functools.cache
def cpus_near_devices(kind: str, count: int) -> dict[str, list[int]]:
    """As `find_cpus`, once per process."""
    found = find_cpus(kind, count)
    for device, cpus in found.items():
        log.info("workers of %s keep to the %d CPUs of its NUMA node", device, len(cpus))
    return found


def find_cpus(kind: str, count: int, root: Path = Path("/")) -> dict[str, list[int]]:
    """Name of a device -> the CPUs that its workers should keep to; only those where it matters.

    REQUIRES: this process uses devices of that kind. It may wait for a driver: not on the loop.
    """
    addresses: list[str | None] = [bus_address(index, kind) for index in range(count)]
    if kind == "cuda" and None in addresses:
        try:
            addresses = [*nvml.bus_addresses()]
        except (nvml.NoLibraryError, LookupError, TimeoutError) as error:
            log.debug("where the GPUs are on the bus is not known: %s", error)
    allowed = os.sched_getaffinity(0)
    near = {
        f"{kind}:{index}": near_cpus(address, allowed, root)
        for index, address in enumerate(addresses) if address is not None
    }  # fmt: skip
    return {device: cpus for device, cpus in near.items() if cpus}
