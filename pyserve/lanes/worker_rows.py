"""One worker as the management API shows it, also before there is anything of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import datetime

READY, UNLOADING = "READY", "UNLOADING"  # the latter is TorchServe's word for all that is not ready


@dataclass
class WorkerRow:
    """One worker.

    Attributes:
        memory_usage: of its whole process, in bytes; 0 while there is none.
        pid: -1 while there is none.
        gpu_id: as torch counts; None on a CPU, and for the model's own device.
    """

    id: str
    start_time: datetime
    status: str
    memory_usage: int
    pid: int
    gpu: bool
    gpu_id: int | None = None


def resident_size() -> int:
    """Bytes of this process's memory that are in RAM."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def with_coming(rows: list[WorkerRow], count: int, *, first_id: int, since: datetime, gpu: bool) -> list[WorkerRow]:
    """``rows`` and those of the workers that have not begun yet, up to ``count``."""
    return rows + [
        WorkerRow(str(first_id + number), since, UNLOADING, memory_usage=0, pid=-1, gpu=gpu)
        for number in range(len(rows), count)
    ]
