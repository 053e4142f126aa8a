"""Memory of processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable


def get_cpu_usage(pid: int) -> int:
    """Bytes of a process's memory that are in RAM; 0 if there is no such process."""
    try:
        with open(f"/proc/{int(pid)}/status") as file:
            line = next((line for line in file if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    except OSError:
        logging.error("Failed get process for pid: %s", pid)
        return 0
    return int(line.split()[1]) * 1024


def check_process_mem_usage(stdin: Iterable[str]) -> list[str]:
    """``pid:bytes`` for each number in the lines."""
    pids = [pid for line in stdin for pid in line.replace(",", " ").split() if pid.isdigit()]
    return [f"{pid}:{get_cpu_usage(int(pid))}" for pid in pids]
