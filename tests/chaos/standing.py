"""What processes and folders hold: measured before and after a campaign, so that nothing may be left behind."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_NOISE = 2 << 20  # bytes; the allocator of a small process takes as much at a time
_MEGABYTE = 1 << 20
# Names of mkdtemp, UUIDs and hashes, numbers.
_NAMES_ANEW = re.compile(r"(?<=[-_.])[a-z0-9_]{8}(?=$|[/.])|[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|\d+")


# grpcio's pool has as many threads as it likes.
_ELASTIC = {"event_engine", "grpc_global_tim"}


@dataclass
class ProcessStanding:
    """What one process holds.

    Attributes:
        descriptors: count by what they are; threads: count by name.
        rss: resident bytes.
    """

    descriptors: Counter[str] = field(default_factory=Counter)
    threads: Counter[str] = field(default_factory=Counter)
    children: int = 0
    rss: int = 0

    @classmethod
    def of(cls, process: psutil.Process) -> ProcessStanding:
        descriptors: Counter[str] = Counter()
        folder = f"/proc/{process.pid}/fd"
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):
                descriptors[_kind_of(os.readlink(f"{folder}/{name}"))] += 1
        return cls(descriptors, _threads_of(process.pid), len(process.children()), process.memory_info().rss)


def _threads_of(pid: int) -> Counter[str]:
    threads: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            name = re.sub(r"\d+", "*", path.read_text().strip())
            threads[name] += name not in _ELASTIC
    return threads


def _kind_of(link: str) -> str:
    """``socket``, ``pipe``, ``anon_inode:[eventfd]``, ``/memfd:NAME``, or a file without what is drawn anew."""
    kind, colon, _ = link.partition(":[")
    return kind if colon and kind in ("socket", "pipe") else _NAMES_ANEW.sub("*", link.removesuffix(" (deleted)"))


@dataclass
class Standing:
    """All of it.

    Attributes:
        processes: by their part: ``supervisor``, ``server``, ``zygote``, ``worker`` (all of them together).
        files: in the folders that were named, without what is drawn anew; count by name.
        shared_memory: names in /dev/shm.
        others: processes of ours that are none of these.
    """

    processes: dict[str, ProcessStanding] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)
    shared_memory: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)


def files_in(folders: Iterable[Path]) -> Counter[str]:
    return Counter(
        _NAMES_ANEW.sub("*", f"{folder.name}/{path.relative_to(folder)}")
        for folder in folders
        for path in folder.rglob("*")
    )


def shared_memory() -> Counter[str]:
    return Counter(os.listdir("/dev/shm"))


def differences(before: Standing, after: Standing, memory_growth: float = 0.05) -> list[str]:
    """What ``after`` holds that ``before`` did not, of descriptors and children also what it lost; empty if nothing.

    Memory counts when it has grown by more than ``memory_growth``, a share, and by more than 2 MB.
    """
    found = []
    for part in sorted(before.processes.keys() | after.processes.keys()):
        one, other = (s.processes.get(part, ProcessStanding()) for s in (before, after))
        found += [f"{part}: {line}" for line in _changes(one.descriptors, other.descriptors, "descriptor")]
        # Pools start their threads when they have work.
        found += [f"{part}: {line}" for line in _changes(one.threads, one.threads | other.threads, "thread")]
        if one.children != other.children:
            found.append(f"{part}: {one.children} children before, {other.children} after")
        if other.rss > one.rss + max(one.rss * memory_growth, _NOISE):
            found.append(f"{part}: {one.rss / _MEGABYTE:.1f} MB resident before, {other.rss / _MEGABYTE:.1f} after")
    found += _changes(before.files, before.files | after.files, "file")  # what is lost comes back when it is needed
    found += _changes(before.shared_memory, after.shared_memory, "shared memory")
    found += _changes(before.others, after.others, "process")
    return found


def _changes(before: Counter[str], after: Counter[str], what: str) -> list[str]:
    return [
        f"{what} {name}: {before[name]} before, {after[name]} after"
        for name in sorted(before.keys() | after.keys())
        if before[name] != after[name]
    ]
