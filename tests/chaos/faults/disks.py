"""Full disks: of temporary files, of the state, of the logs, of the cache; while something has to be written there."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

from tests.chaos.fault import Fault
from tests.chaos.provoked import PROVOKED
from tests.chaos.site import DISKS, Site


def fill(folder: Path, name: str = "filler") -> Path:
    """Takes all that is left of ``folder``'s disk; returns the file that does."""
    path = folder / name
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # the end of the disk
            while True:
                os.write(descriptor, bytes(1 << 16))
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, b"\0")
    finally:
        os.close(descriptor)
    return path


class FullDisk(Fault):
    """One disk is full, or all are, while a worker is killed or something is changed."""

    name, weight = "full-disk", 12

    def __init__(self, site: Site, chance: random.Random):
        super().__init__(site, chance)
        self._fillers: list[Path] = []

    @classmethod
    def left_out(cls, site: Site) -> str:
        return "" if site.has_disks else "no mount namespace: no disk of our own that may be filled"

    def prepare(self) -> None:
        self._disks = [*DISKS] if self.chance.random() < 0.2 else [self.chance.choice(DISKS)]
        self._provoked = self.chance.choice(PROVOKED)(self)
        self.costs = self._provoked.costs
        self.provokes = f"{'+'.join(self._disks)}: {self._provoked.name}"

    def inject(self) -> None:
        self._fillers = [fill(self.site.folder / disk) for disk in self._disks]
        self._provoked.begin()

    def heal(self) -> None:
        for filler in self._fillers:
            filler.unlink(missing_ok=True)
        self._provoked.end()
