"""Little memory: an address space that cannot grow, or a group of processes that the kernel ends as it likes."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from pathlib import Path

import psutil

from tests.chaos import ledger
from tests.chaos.fault import ALL_DOWN, PYTHON_MODELS, SERVER_DOWN, Fault, worker_down
from tests.chaos.ledger import Cost
from tests.chaos.site import Site

_GROUPS = Path("/sys/fs/cgroup/memory")
_DEATH_S = 1.0
_UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
_NO_MEMORY = Cost(ledger.REFUSED, statuses=(500, 503, 507))


class NoAddressSpace(Fault):
    """A worker, the zygote or the server cannot have another megabyte."""

    name = "no-address-space"

    def prepare(self) -> None:
        self._whose = self.chance.choice(("worker", "zygote", "server"))
        self._spare = self.chance.choice((0, 64 << 10, 1 << 20, 8 << 20))
        self.costs = (*(SERVER_DOWN if self._whose == "server" else worker_down(*PYTHON_MODELS)), _NO_MEMORY)
        self.provokes = f"{self._whose}, {self._spare >> 10} KiB are left"

    def inject(self) -> None:
        if self._whose == "worker":
            process = self.chance.choice(self.site.workers())
        else:
            process = self.site.zygote if self._whose == "zygote" else self.site.process
        limit = process.memory_info().vms + self._spare
        process.rlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        if self._whose == "zygote":
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                self.chance.choice(self.site.workers()).kill()

    def heal(self) -> None:
        for process in self.site.tree():  # children have the limits of their parents
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(resource.RLIMIT_AS, _UNLIMITED)


class LittleMemory(Fault):
    """All processes together may take a few megabytes more; beyond that the kernel kills one of them."""

    name, weight = "little-memory", 3

    @classmethod
    def left_out(cls, site: Site) -> str:
        group = _GROUPS / f"pyserve-chaos-{os.getpid()}-try"
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text("-1")
            group.rmdir()
        except OSError as error:
            return f"no memory group (cgroup v1) of our own: {error}"
        return ""

    def prepare(self) -> None:
        self._size = self.chance.choice((2, 8, 24)) << 20
        self.costs = (*ALL_DOWN, *worker_down(*PYTHON_MODELS), _NO_MEMORY)
        self.provokes = f"{self._size >> 20} MiB are left"

    def inject(self) -> None:
        self._group = _GROUPS / f"pyserve-chaos-{os.getpid()}"
        self._group.mkdir(exist_ok=True)
        self._own = _GROUPS / _own_group().lstrip("/")
        for process in self.site.tree():
            self._move(process.pid, self._group)
        usage = int((self._group / "memory.usage_in_bytes").read_text())
        (self._group / "memory.limit_in_bytes").write_text(str(usage + self._size))

    def heal(self) -> None:
        (self._group / "memory.limit_in_bytes").write_text("-1")
        if "oom_kill 0" not in (self._group / "memory.oom_control").read_text():
            time.sleep(_DEATH_S)  # what was killed may take a while to end, and must not end after the recovery
        while pids := (self._group / "cgroup.procs").read_text().split():
            for pid in pids:
                self._move(int(pid), self._own)
        self._group.rmdir()

    @staticmethod
    def _move(pid: int, group: Path) -> None:
        with contextlib.suppress(OSError):  # it ended
            (group / "cgroup.procs").write_text(str(pid))


def _own_group() -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path
    return "/"
