"""New code for a handler that goes on serving: for `pyserve dev`.

When a Python file of the archive changes, its modules are imported afresh; if that works, instances get the new
classes and keep what they hold, so that weights are not loaded again. If it does not, the old code goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pyserve.entry_point import EntryPoint, load_error
from pyserve.launch import Reporter
from pyserve.worker_spec import WorkerSpec


class Reloader:
    """Watches the Python files of one archive's folder."""

    def __init__(self, spec: WorkerSpec, entry: EntryPoint, reports: Reporter):
        self._folder = Path(spec.model_dir)
        self._entry = entry
        self._reports = reports
        self._seen = self._times()

    def _times(self) -> dict[str, int]:
        times = {}
        for folder, folders, files in os.walk(self._folder):
            folders[:] = [each for each in folders if not each.startswith((".", "__"))]
            for file in files:
                if file.endswith(".py"):
                    path = os.path.join(folder, file)
                    try:
                        times[path] = os.stat(path).st_mtime_ns
                    except FileNotFoundError:
                        continue  # being replaced
        return times

    def look(self) -> None:
        """Takes on what has changed since the last look."""
        times = self._times()
        if times == self._seen:
            return
        changed = sorted(path for path in times.keys() | self._seen.keys() if times.get(path) != self._seen.get(path))
        self._seen = times
        names = ", ".join(os.path.relpath(path, self._folder) for path in changed)
        try:
            self._take_on()
        except BaseException as error:  # whatever importing somebody's code may raise
            told = load_error(error, self._folder)
            self._reports.send("reload_failed", text=f"{told.reason()}\n{told.traceback}")
        else:
            self._reports.send("reloaded", text=names)

    def _take_on(self) -> None:
        old = self._entry.code
        modules = old.own_modules()
        code = old.imported_again()
        for name, module in modules.items():
            fresh = sys.modules.get(name)
            if fresh is not None:
                _carry_over(module, fresh)
        handler = self._entry.handler
        if handler is not None and code.handler is not None:
            handler.__class__ = type(code.handler)
            code.handler = handler
        else:
            self._entry.handler = code.handler
        self._entry.code = code


def _carry_over(old: ModuleType, new: ModuleType) -> None:
    """Module globals that are instances of the module's own classes keep what they hold: ``_service = Handler()``."""
    for name, value in vars(old).items():
        cls = type(value)
        fresh: Any = vars(new).get(name)
        if cls.__module__ == old.__name__ and fresh is not None and type(fresh).__name__ == cls.__name__:
            fresh.__dict__.update(vars(value))
