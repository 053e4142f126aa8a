"""The CPU budget from made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyserve.cpu_budget import cpu_budget


def make(root: Path, cgroup: str, files: dict[str, str]) -> None:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/a/b\n", {}, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "600000 100000", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "1600000 100000"}, 8),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "3:cpu,cpuacct:/host/only\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "3:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            8,
        ),
    ],
)
def test_budget_is_the_tightest_limit(tmp_path: Path, cgroup: str, files: dict[str, str], cpus: int) -> None:
    make(tmp_path, cgroup, files)
    assert cpu_budget(root=tmp_path) == cpus


def test_configured_budget_wins(tmp_path: Path) -> None:
    assert cpu_budget(5, root=tmp_path) == 5


def test_machine_without_cgroups_gives_the_affinity(tmp_path: Path) -> None:
    assert cpu_budget(root=tmp_path) == 8
