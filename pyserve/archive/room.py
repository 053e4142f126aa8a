"""How much may be written to a disk before it is full, and how much memory there is at all.

Unpacking stops while some of the disk is still free: a server whose disk is full can write no log, no state and no key.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pyserve.cgroup import groups_around
from pyserve.errors import ModelLoadError

RESERVE_SIZE = 1 << 30  # bytes that stay free
RESERVE_SHARE = 0.05  # on small disks, of their size
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def room_in(folder: Path, *, root: Path = Path("/")) -> int:
    """Bytes that may be written below ``folder``; of file systems in memory, no more than there is memory.

    Args:
        root: where ``proc`` and ``sys`` are.

    Raises:
        OSError: there is no such folder.
    """
    disk = shutil.disk_usage(folder)
    room = disk.free - min(RESERVE_SIZE, int(disk.total * RESERVE_SHARE))
    if _kind_of(folder, root) in _IN_MEMORY:
        available = _available_memory(root)
        if available is not None:
            room = min(room, available)
    return max(0, room)


def no_room(label: str, size: int, room: int) -> ModelLoadError:
    """What is raised for an archive that unpacks to ``size`` bytes or more where ``room`` bytes may be written."""
    return ModelLoadError(
        f"{label}: unpacks to {size} bytes or more, and the disk of the cache folder has room for {room} (a little "
        "is kept free); free space, or set PYSERVE_CACHE to a folder on a larger disk"
    )


def memory_size(*, root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that this process could have at most; None when it cannot be told."""
    fields = _meminfo(root)
    sizes = [fields["MemTotal"] + fields.get("SwapTotal", 0)] if "MemTotal" in fields else []
    sizes += [limit for limit, _ in _group_sizes(root)]
    return min(sizes, default=None)


def _available_memory(root: Path) -> int | None:
    fields = _meminfo(root)
    sizes = [fields["MemAvailable"]] if "MemAvailable" in fields else []
    sizes += [limit - used for limit, used in _group_sizes(root)]
    return min(sizes, default=None)


def _meminfo(root: Path) -> dict[str, int]:
    fields = {}
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    return fields


def _group_sizes(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every control group that limits memory; what is cached of files counts as free."""
    sizes = []
    for group in groups_around("memory", root):
        limit = group.words("memory.max" if group.is_v2 else "memory.limit_in_bytes")
        used = group.words("memory.current" if group.is_v2 else "memory.usage_in_bytes")
        if limit and limit[0].isdigit() and used and used[0].isdigit():
            words = group.words("memory.stat")
            cached = sum(
                int(size) for name, size in zip(words[::2], words[1::2], strict=False)
                if name in ("inactive_file", "active_file")
            )  # fmt: skip
            sizes.append((int(limit[0]), max(0, int(used[0]) - cached)))
    return sizes


def _kind_of(folder: Path, root: Path) -> str:
    """The type of the file system that ``folder`` is on, such as ``ext4``; ``""`` when it cannot be told."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = (root / "proc/self/mountinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [wanted]:
            return after.split(" ", 1)[0]
    return ""
