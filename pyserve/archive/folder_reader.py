"""Reads a plain folder as if it were an archive. Nothing is copied: the folder itself is the model's folder.

The folder belongs to the operator, so links to files are allowed in it as long as they stay inside it: a folder that
came from elsewhere must not make the server read ``/etc`` as weights. What can be no file of a model, such as an
editor's lock, a socket or a link to nothing, is passed over; a manifest that names it is told that it is not there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from pyserve.archive.entries import (
    CHUNK_SIZE,
    LIMITS,
    MANIFEST_NAME,
    Entry,
    Limits,
    name_problem,
    refuse,
    refuse_limit,
)
from pyserve.errors import shown


class FolderReader:
    """The files below ``path``. Raises InvalidModelError for links that leave it.

    Args:
        manifest: text of MANIFEST.json for a folder without one.

    Attributes:
        passed_over: what was left out of ``entries``, and why, one line each.
    """

    kind = "folder"
    file_size = 0

    def __init__(self, path: Path, label: str, limits: Limits = LIMITS, *, manifest: bytes | None = None):
        self.label = label
        self.path = path.resolve()
        self._limits = limits
        self._manifest = manifest
        self.passed_over: list[str] = []

    @property
    def files(self) -> list[Entry]:
        """The entries that lie in the folder, not a manifest that was given."""
        return self.entries if self._manifest is None else self.entries[1:]

    @cached_property
    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        if self._manifest is not None:
            size = len(self._manifest)
            found.append(Entry(MANIFEST_NAME, size, size, is_stored=True, offset=0))
        for folder, folder_names, file_names in os.walk(self.path):
            # Byte code and version control come and go, and are no part of the model.
            folder_names[:] = sorted(name for name in folder_names if not name.startswith((".", "__pycache__")))
            relative = os.path.relpath(folder, self.path)
            prefix = "" if relative == "." else f"{relative}/"
            folder_names[:] = [name for name in folder_names if self._can_be_named(prefix + name)]
            for name in sorted(file_names):
                bytes_there = self._size_of(prefix + name) if self._can_be_named(prefix + name) else None
                if bytes_there is not None:
                    found.append(Entry(prefix + name, bytes_there, bytes_there, is_stored=True, offset=0))
            for name in folder_names:
                if os.path.islink(os.path.join(folder, name)):  # what lies there is listed where it lies
                    self._check_inside(prefix + name)
                else:
                    found.append(Entry(prefix + name, 0, 0, is_folder=True))
            if len(found) > self._limits.entry_count_max:
                refuse_limit(self.label, f"holds {len(found)} files or more", "entry_count_max", self._limits)
        return found

    def read(self, entry: Entry, size_max: int) -> bytes:
        if self._manifest is not None and entry.name == MANIFEST_NAME:
            return self._manifest
        with (self.path / entry.name).open("rb") as file:
            content = file.read(size_max + 1)
        if len(content) > size_max:
            refuse(self.label, f"{shown(entry.name)} has {entry.size} bytes, more than the {size_max} allowed")
        return content

    def contents(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        for entry in entries:
            with (self.path / entry.name).open("rb") as file:
                yield entry, iter(lambda file=file: file.read(CHUNK_SIZE), b"")  # type: ignore[misc]

    def _check_inside(self, name: str) -> None:
        if not (self.path / name).resolve().is_relative_to(self.path):
            refuse(self.label, f"{shown(name)} is a link that leaves the folder; copy what it leads to here")

    def _can_be_named(self, name: str) -> bool:
        problem = name_problem(name, self._limits)
        if problem:
            self.passed_over.append(f"{self.label}: {shown(name)} {problem}; it is passed over")
        return problem is None

    def _size_of(self, name: str) -> int | None:
        """In bytes; None if it is passed over."""
        path = self.path / name
        try:
            status = path.stat()
        except OSError as error:
            is_nowhere = isinstance(error, FileNotFoundError) and path.is_symlink()
            problem = "is a link to nothing" if is_nowhere else f"cannot be read: {error.strerror}"
        else:
            problem = "" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        if problem:
            self.passed_over.append(f"{self.label}: {shown(name)} {problem}; it is passed over")
            return None
        if path.is_symlink():
            self._check_inside(name)
        return status.st_size


def has_manifest(folder: Path) -> bool:
    """Whether ``folder``, or the one folder in it, is a model with a MANIFEST.json."""
    return (model_folder(folder) / MANIFEST_NAME).is_file()


def model_folder(path: Path) -> Path:
    """The folder with the manifest: ``path``, or the one folder in it; ``path`` if there is none."""
    if os.path.isfile(path / MANIFEST_NAME):
        return path
    try:
        below = [child for child in path.iterdir() if os.path.isdir(child) and not child.name.startswith((".", "__"))]
    except OSError as error:
        refuse(path.name, f"cannot be read: {error.strerror}; check its permissions")
    if len(below) == 1 and not below[0].is_symlink() and os.path.isfile(below[0] / MANIFEST_NAME):
        return below[0]
    return path
