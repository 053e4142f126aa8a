"""The folder of one archive object, and of its shallow copies, for code that may write there: made once it is needed,
and put back when it vanishes.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pyserve.archive.cache import ArchiveCache
from pyserve.archive.model_folder import ModelFolder, Originals
from pyserve.archive.weights import Weights


class Unpacked(Protocol):
    """What is asked of an archive."""

    sha256: str
    model_dir: Path
    weights: Weights | None
    files: dict[str, int]


class OwnFolder:
    """The folder of ``archive`` below ``cache``. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: ModelFolder | None = None
        self._has_weights = False
        self._is_over = False

    @property
    def path(self) -> Path | None:
        """The folder; None while it is not made."""
        folder = self._folder
        return folder.path if folder is not None else None

    @property
    def originals(self) -> Originals:
        """What its large files were copied from."""
        return self._folder.originals if self._folder is not None else {}

    def filled(
        self, archive: Unpacked, cache: ArchiveCache, unpack: Callable[[], None], *, with_weights: bool,
        completes: bool = False,
    ) -> Path:  # fmt: skip
        """The folder with the archive's files.

        What code of the archive has removed from it stays away, unless the folder itself is gone.

        Args:
            unpack: sees to it that the archive is unpacked in the cache.
            with_weights: the serialized file is in it too.
            completes: single files that are gone are put back too.

        Raises:
            OSError: it cannot be written, or was removed for good: nobody would remove another one.
        """
        weights = archive.weights
        mapped = weights.name if weights is not None and weights.is_mapped else None
        names = [name for name in archive.files if name != mapped]
        with self._lock:
            if self._is_over:
                raise FileNotFoundError(errno.ENOENT, "the model was unregistered")
            folder = self._folder
            if folder is None or not folder.path.is_dir():
                folder = self._made(cache, folder)
                completes = True
            wants_weights = mapped is not None and (with_weights or self._has_weights)
            if completes:
                missing = [name for name in names if not os.path.lexists(folder.path / name)]
                lost = wants_weights and self._has_weights and not os.path.lexists(folder.path / str(mapped))
                if missing or lost:
                    unpack()
                    folder.add(archive.model_dir, missing)
                if lost:
                    self._has_weights = False
                self._folder = folder
            if wants_weights and weights is not None and mapped is not None and not self._has_weights:
                with cache.lock(archive.sha256):  # unpacked twice at once, the second would replace what the first maps
                    weights.as_file()
                folder.add(archive.model_dir, [mapped])
                self._has_weights = True
            return folder.path

    def _made(self, cache: ArchiveCache, before: ModelFolder | None) -> ModelFolder:
        """An empty folder; the one ``before``, under its name, if it is only gone from the disk."""
        root = cache.models()
        if before is None:
            return ModelFolder(root)
        before.restore()
        return before

    def remove(self) -> None:
        """For good. A thread that is about to fill it, though nobody waits for it any more, makes no other one."""
        with self._lock:
            self._is_over = True
            folder, self._folder, self._has_weights = self._folder, None, False
        if folder is not None:
            folder.remove()
