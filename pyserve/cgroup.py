"""The control groups around this process: where the limits of a container, or of a systemd unit, are to be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """One group's folder.

    Attributes:
        is_v2: which version's files it holds: ``memory.max`` or ``memory.limit_in_bytes``, for instance.
    """

    folder: Path
    is_v2: bool

    def words(self, file: str) -> list[str]:
        """What ``file`` of it says; none if there is no such file."""
        try:
            return (self.folder / file).read_text().split()
        except OSError:
            return []


def groups_around(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """Those that may limit ``controller``, such as ``cpu`` or ``memory``, from the process's own outwards.

    Not all of the folders need exist. Inside a container the path may be the host's; its own group is then what is
    mounted at the top.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = [top]
        elif controller in controllers.split(","):
            mounts = list(dict.fromkeys([top / controller, top / controllers]))
        else:
            continue
        group = Path(path.lstrip("/"))
        for mount in mounts:
            yield from (Group(mount / folder, controllers == "") for folder in (group, *group.parents))
