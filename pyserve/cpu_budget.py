"""How many CPUs this process may use: what its affinity and its cgroups leave of the machine."""

from __future__ import annotations

import math
import os
from pathlib import Path

from pyserve.cgroup import Group, groups_around


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
    quotas = [math.ceil(quota) for quota in map(_quota, groups_around("cpu", root)) if quota is not None]
    return max(1, min([affinity, *quotas]))


def _quota(group: Group) -> float | None:
    """CPUs that ``group`` allows; ``None`` for no limit, which version 2 writes ``max`` and version 1 ``-1``."""
    words = group.words("cpu.max") if group.is_v2 else _words_v1(group)
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None
    return int(words[0]) / int(words[1])


def _words_v1(group: Group) -> list[str]:
    return [*group.words("cpu.cfs_quota_us"), *group.words("cpu.cfs_period_us")]
