"""The faults of a campaign, one small class each; ``ALL`` is every one of them by its name."""

from __future__ import annotations

from tests.chaos.fault import Fault
from tests.chaos.faults import (
    clock,
    connections,
    deploys,
    descriptors,
    disks,
    folders,
    memory,
    servers,
    workers,
    zygotes,
)

ALL: dict[str, type[Fault]] = {
    fault.name: fault
    for module in (clock, connections, deploys, descriptors, disks, folders, memory, servers, workers, zygotes)
    for fault in vars(module).values()
    if isinstance(fault, type) and issubclass(fault, Fault) and fault.__module__ == module.__name__ and fault.name
}
