"""The archives of a cluster that lie on a node: each once, under the SHA-256 of its bytes, for all replicas there.

    <cache>/cluster/<sha256>/<file>      whole, or not there
    <cache>/cluster/<sha256>.lock        held by the process that brings it

From there it is unpacked into the archive cache and its weights are mapped, as of any archive: once per node, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from pyserve.archive.cache import open_cache
from pyserve.archive.entries import name_problem
from pyserve.archive.room import room_in
from pyserve.errors import InvalidModelError, ModelLoadError
from pyserve.os_errors import cause_of

CHUNK_SIZE = 32 << 20
# A replica that joins may be about to open one that nobody serves any more.
_KEPT_S = 3600.0
_DRAFT_PREFIX = ".draft-"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def part_of(path: Path, offset: int) -> bytes:
    """At most CHUNK_SIZE bytes of a file from ``offset`` on; none at its end. Blocks.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_SIZE)


class NodeArchives:
    """Those of this node. Any thread, any number of processes; everything blocks.

    Args:
        root: of the archive cache; by default that of this process.
    """

    def __init__(self, root: Path | None = None):
        self._folder = (root or open_cache().root) / "cluster"

    def path(self, sha256: str, file: str) -> Path:
        """Where it lies, or is to lie.

        Raises:
            InvalidModelError: what is given is no key, or no plain name of a file.
        """
        if "/" in file or file.startswith(".") or name_problem(file):
            raise InvalidModelError(f"{file!r} is no name of an archive")
        return self.folder(sha256) / file

    def folder(self, key: str) -> Path:
        """That of a key, a SHA-256: of an archive, or of a URL that archives are fetched from.

        Raises:
            InvalidModelError: it is none.
        """
        if not _SHA256.fullmatch(key):
            raise InvalidModelError(f"{key!r} is no key of an archive")
        return self._folder / key

    def has(self, sha256: str, file: str) -> bool:
        return self.path(sha256, file).is_file()

    @contextlib.contextmanager
    def lock(self, sha256: str) -> Iterator[None]:
        """Held by the one that brings an archive; the others wait. Freed by the system when its holder dies.

        Raises:
            ModelLoadError: there is no room for it, or no permission.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = self._locked(sha256, fcntl.LOCK_EX)
        except OSError as error:
            raise ModelLoadError(f"{self._folder} cannot be written to: {cause_of(error)}") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def _locked(self, key: str, how: int) -> int:
        path = self._folder / f"{key}.lock"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, how)
                if _is_at(path, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the one before has removed the archive, and this file with it

    def draft(self, sha256: str, file: str, size: int) -> Draft:
        """A new file for the content of an archive.

        Raises:
            ModelLoadError: there is no room for it.
        """
        target = self.path(sha256, file)
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if size > room_in(target.parent):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return Draft(target, sha256)
        except OSError as error:
            raise ModelLoadError(f"{file} ({size >> 20} MB) cannot be kept in the cache: {cause_of(error)}") from None

    def read(self, sha256: str, file: str, offset: int) -> bytes:
        """See `part_of`."""
        return part_of(self.path(sha256, file), offset)

    def remove(self, keys: Collection[str]) -> None:
        """Removes archives by their keys, whether or not they are there; nothing of what is being brought."""
        for key in keys:
            with contextlib.suppress(OSError):
                descriptor = self._locked(key, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    shutil.rmtree(self.folder(key), ignore_errors=True)
                    (self._folder / f"{key}.lock").unlink()
                finally:
                    os.close(descriptor)

    def remove_others(self, kept: Collection[str]) -> None:
        """Removes archives, by their keys, that are not among ``kept``, and what processes left that were killed while
        they wrote one; all of it an hour after it came, and nothing of what is being brought."""  # fmt: skip
        try:
            names = [name for name in os.listdir(self._folder) if _SHA256.fullmatch(name)]
        except OSError:
            return
        for name in names:
            with contextlib.suppress(OSError):
                descriptor = self._locked(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    self._tidy(name, is_kept=name in kept)
                finally:
                    os.close(descriptor)

    def _tidy(self, name: str, *, is_kept: bool) -> None:
        folder = self._folder / name
        is_old, drafts = _is_old(folder), list(folder.glob(f"{_DRAFT_PREFIX}*"))
        left = [draft for draft in drafts if _is_old(draft)]
        for draft in left:
            draft.unlink(missing_ok=True)
        if not is_kept and is_old and len(left) == len(drafts):
            shutil.rmtree(folder, ignore_errors=True)
            (self._folder / f"{name}.lock").unlink()


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_old(path: Path) -> bool:
    """Not of what has gone meanwhile."""
    try:
        return time.time() - path.stat().st_mtime > _KEPT_S
    except OSError:
        return False


class Draft:
    """An archive that is being written. `commit` puts it in place, `close` removes what is left of it."""

    def __init__(self, target: Path, sha256: str):
        self._target = target
        self._sha256 = sha256
        self._digest = hashlib.sha256()
        self._path = target.with_name(f"{_DRAFT_PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
        self._file = self._path.open("xb")
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises ModelLoadError if there is no room for it."""
        try:
            self._file.write(data)
        except OSError as error:
            raise ModelLoadError(f"{self._target.name} cannot be kept in the cache: {cause_of(error)}") from None
        self._digest.update(data)
        self.size += len(data)

    def commit(self) -> Path:
        """Where it lies now.

        Raises:
            InvalidModelError: it is not the content that it should be.
            ModelLoadError: there is no room for it.
        """
        if self._digest.hexdigest() != self._sha256:
            raise InvalidModelError(
                f"{self._target.name} came damaged, or was changed while it was sent; send it again"
            )
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._path, self._target)
        except OSError as error:
            raise ModelLoadError(f"{self._target.name} cannot be kept in the cache: {cause_of(error)}") from None
        return self._target

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is still to be written on a full disk
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
