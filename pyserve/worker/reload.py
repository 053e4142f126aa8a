"""Hot reload of handler code, for `pyserve dev`.

When a Python file of the archive changes, its modules are imported afresh; if that works, instances get the new
classes and keep what they hold, so that weights are not loaded again. If it does not, the old code goes on.
"""

from __future__ import annotations

import inspect
import linecache
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pyserve.errors import ModelLoadError
from pyserve.launch import Reporter
from pyserve.worker.entry_point import EntryPoint, load_error
from pyserve.worker.frames import describe_place
from pyserve.worker.spec import WorkerSpec


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
                    except OSError:
                        continue  # being replaced, or a link to nothing, as editors make
        return times

    def look(self) -> None:
        """Reloads what has changed since the last look."""
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
        linecache.checkcache()  # tracebacks quote the files as they are now
        changed = _ChangedClasses(old.model_dir)
        try:
            for name, module in modules.items():
                fresh = sys.modules.get(name)
                if fresh is not None:
                    _carry_over(module, fresh, old.names_set.get(name), changed)
            handler = self._entry.handler
            if handler is not None and code.handler is not None:
                changed.change(handler, type(code.handler))
                code.handler = handler
        except BaseException:
            changed.undo()
            code.give_way(modules)
            raise
        self._entry.handler = code.handler
        self._entry.code = code


class _ChangedClasses:
    """Objects that were given the new classes, which can be taken back."""

    def __init__(self, model_dir: str) -> None:
        self.model_dir = model_dir
        self._before: list[tuple[Any, type]] = []

    def change(self, value: Any, cls: type) -> None:
        """Makes ``value`` an instance of ``cls``.

        Raises:
            ModelLoadError: its attributes are laid out in another way, as with other ``__slots__`` or another base.
        """
        before = type(value)
        try:
            value.__class__ = cls
        except TypeError as error:
            raise self.refuse(cls, error) from None
        self._before.append((value, before))

    def undo(self) -> None:
        """Gives all of them their old classes back."""
        for value, cls in reversed(self._before):
            value.__class__ = cls

    def refuse(self, cls: type, error: Exception) -> ModelLoadError:
        """How a class that cannot take over is reported."""
        return ModelLoadError(
            f"what an instance of {cls.__name__} holds cannot be taken over by its new code ({error}); the old code "
            "stays. Start pyserve dev again to load the new code",
            detail={"where": describe_place(cls, self.model_dir)},
        )


def _carry_over(old: ModuleType, new: ModuleType, names_set: set[str] | None, changed: _ChangedClasses) -> None:
    """What a module's globals hold since they were initialized.

    Instances of the module's own classes keep what they hold: ``_service = Handler()``. What was None or not there
    when the module was imported keeps what it was given since: ``global model; model = ...``.
    """
    for name, value in list(vars(old).items()):
        fresh: Any = vars(new).get(name)
        is_own = type(value).__module__ == old.__name__
        if fresh is None and names_set is not None and name not in names_set and value is not None:
            cls = vars(new).get(type(value).__name__) if is_own else None
            if inspect.isclass(cls):
                changed.change(value, cls)
            setattr(new, name, value)
        elif is_own and fresh is not None and type(fresh).__name__ == type(value).__name__:
            _copy_state(value, fresh, changed)


def _copy_state(value: Any, fresh: Any, changed: _ChangedClasses) -> None:
    """Gives ``fresh`` the attributes of ``value``, whether they are in a dict or in slots.

    Raises:
        ModelLoadError: it has no place for one of them.
    """
    held = {
        name: getattr(value, name)
        for cls in type(value).__mro__
        for name, member in vars(cls).items()
        if inspect.ismemberdescriptor(member) and hasattr(value, name)
    }
    attributes = getattr(value, "__dict__", {})
    if hasattr(fresh, "__dict__"):
        fresh.__dict__.update(attributes)
    else:
        held.update(attributes)
    for name, each in held.items():
        try:
            object.__setattr__(fresh, name, each)
        except (AttributeError, TypeError) as error:
            raise changed.refuse(type(fresh), error) from None
