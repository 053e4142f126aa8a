"""How many CPUs this process may use: what its affinity and its cgroups leave of the machine."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cpu_budget(configured: int = 0, *, root: Path = Path("/")) -> int:
    """CPUs to plan threads for, at least 1; ``configured`` if it is not 0.

    A cgroup's quota is a share of time, not a number of CPUs: 1.5 CPUs are rounded up to 2, because one thread
    alone could never use them.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    if configured > 0:
        return configured
    affinity = len(os.sched_getaffinity(0))
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([affinity, *quotas]))


def _quotas(root: Path) -> Iterator[float]:
    """CPUs allowed by each cgroup around this process, from its own outwards (cgroup v2 and v1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts, read = [root / "sys/fs/cgroup"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = [root / "sys/fs/cgroup/cpu", root / "sys/fs/cgroup" / controllers], _quota_v1
        else:
            continue
        for mount in mounts:
            group = Path(path.lstrip("/"))
            # Inside a container the path may be the host's; its own group is then what is mounted at the top.
            for folder in (group, *group.parents):
                quota = read(mount / folder)
                if quota is not None:
                    yield quota


def _quota_v2(group: Path) -> float | None:
    return _ratio(_words(group / "cpu.max"))


def _quota_v1(group: Path) -> float | None:
    return _ratio([*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _ratio(words: list[str]) -> float | None:
    """Quota over period; ``None`` for no limit, which v2 writes ``max`` and v1 ``-1``."""
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])
