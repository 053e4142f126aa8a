"""Folders that are removed under a running server: temporary files, state, logs, cache, and a model's own folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.chaos.fault import PYTHON_MODELS, Fault
from tests.chaos.provoked import PROVOKED
from tests.chaos.site import DISKS, clear


class LostFolder(Fault):
    """All that lies in one of the server's folders is removed, as a cleaner of temporary files would."""

    name, weight = "lost-folder", 12

    def prepare(self) -> None:
        self._folder = self.chance.choice(DISKS)
        self._provoked = self.chance.choice(PROVOKED)(self)
        self.costs = self._provoked.costs
        self.provokes = f"{self._folder}: {self._provoked.name}"

    def inject(self) -> None:
        clear(self.site.folder / self._folder)
        self._provoked.begin()

    def heal(self) -> None:
        self._provoked.end()


class LostModelFolder(Fault):
    """The folder that a model's workers work in is removed."""

    name, weight = "lost-model-folder", 6

    def prepare(self) -> None:
        self._model = self.chance.choice(PYTHON_MODELS)
        self._provoked = self.chance.choice(PROVOKED)(self)
        self.costs = self._provoked.costs
        self.provokes = f"{self._model}: {self._provoked.name}"

    def inject(self) -> None:
        folder = Path(os.readlink(f"/proc/{self.site.worker_pids(self._model)[0]}/cwd"))
        if self.site.folder in folder.parents:  # never anything else
            shutil.rmtree(folder, ignore_errors=True)
        self._provoked.begin()

    def heal(self) -> None:
        self._provoked.end()
