"""A folder of one registration's own with the files of its archive, for code that may write there.

    <cache>/models/<id>/        the files; the model folder that handlers see
    <cache>/models/<id>.lock    locked by the process that the folder belongs to, for as long as that lives

TorchServe extracts an archive anew for each registration, and handlers use that: they unpack, rename and overwrite
files of their own. What was unpacked once, in the cache, is therefore never given to such code, only copied: by sharing
blocks where the file system can do that, else byte by byte. A hard link would save that copy, and let a handler that
opens its weights for writing change them for everybody.

`Originals` says which files of a folder are still what they were copied from, so that weights are mapped from there:
they are in memory once, and stay as they are whatever becomes of the copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pyserve.archive.room import room_in

# Path of a copy -> path of its original, and the `file_identity` of both.
Originals = dict[str, tuple[str, list[int], list[int]]]

# Smaller files are read into memory by each process: that takes no time, and is just what it is everywhere else.
ORIGINAL_SIZE_MIN = 1 << 20
_COPY_SIZE = 1 << 30
_FICLONE = 0x40049409  # the copy shares the blocks of the original (btrfs, xfs)


def file_identity(path: str | Path) -> list[int]:
    """Device, inode, size in bytes, modification and change time in ns: equal only for a file nobody has written to.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class ModelFolder:
    """An empty folder below ``root``, which belongs to this process until `remove`, or until the process ends.

    Left-overs of processes that were killed are removed when another one is made. Any thread.

    Attributes:
        path: the folder.
        originals: of the large files in it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, root: Path):
        remove_left_overs(root)
        self.path = root / uuid.uuid4().hex
        self.originals: Originals = {}
        self._claim()
        try:
            self.path.mkdir(mode=0o755)
        except BaseException:
            self.remove()
            raise

    def _claim(self) -> None:
        lock = self.path.with_suffix(".lock")
        descriptor = _locked(lock)
        self._finalizer = weakref.finalize(self, _remove, self.path, lock, descriptor, os.getpid())

    def restore(self) -> None:
        """Makes it again, empty and under the same name, after somebody else has removed it.

        Raises:
            OSError: it cannot be made.
        """
        self.remove()  # what is left of it
        self.originals.clear()
        self._claim()
        self.path.mkdir(mode=0o755, exist_ok=True)

    def add(self, source: Path, names: Iterable[str]) -> None:
        """Copies files below ``source``, by their names in it, and makes the folders that ``source`` has.

        Raises:
            OSError: the disk is full or the like.
        """
        for folder, below, _ in os.walk(source):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for name in below:
                (self.path / os.path.relpath(folder, source) / name).mkdir(exist_ok=True)
        for name in names:
            original, copy = source / name, self.path / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if original.is_symlink():
                copy.symlink_to(os.readlink(original))
                continue
            before = file_identity(original)
            _copy(original, copy)
            if before[2] >= ORIGINAL_SIZE_MIN and file_identity(original) == before:
                self.originals[os.path.realpath(copy)] = (str(original), before, file_identity(copy))

    def remove(self) -> None:
        """Removes it, with what was written into it. A second call does nothing."""
        self._finalizer()


def remove_left_overs(root: Path) -> None:
    """Removes the folders below ``root`` whose process is gone."""
    with contextlib.suppress(FileNotFoundError):
        for lock in root.glob("*.lock"):
            try:
                # What is no file of ours must not block: a pipe, say.
                descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError:
                continue  # removed by its owner meanwhile
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_with_lock(lock.with_suffix(""), lock)
            except OSError:
                pass  # its process lives
            finally:
                os.close(descriptor)


def _locked(lock: Path) -> int:
    """A descriptor of the new file ``lock``, which holds its lock."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # One that was looking for left-overs may have been quicker, and have removed it.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove(path: Path, lock: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child ends
        return
    try:
        _remove_with_lock(path, lock)
    finally:
        os.close(descriptor)


def _remove_with_lock(path: Path, lock: Path) -> None:
    """Without descriptors, say, a folder cannot be removed: then the lock stays, by which it is found the next time."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        lock.unlink(missing_ok=True)


def _copy(original: Path, copy: Path) -> None:
    """OSError if the disk is full or the like; then there is no file, since half of one would be taken for all of it.

    Nothing is written if a file of some size would leave the disk no room.
    """
    with original.open("rb") as source, copy.open("xb") as target:
        try:
            _copy_content(source, target, copy.parent)
            target.flush()
        except BaseException:
            copy.unlink(missing_ok=True)
            raise


def _copy_content(source: BinaryIO, target: BinaryIO, folder: Path) -> None:
    size = os.fstat(source.fileno()).st_size
    with contextlib.suppress(OSError):  # not on this file system, or not between these two
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
        return
    if size >= ORIGINAL_SIZE_MIN and size > room_in(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        while size > 0 and (copied := os.copy_file_range(source.fileno(), target.fileno(), min(size, _COPY_SIZE))):
            size -= copied
    except OSError:
        pass  # not in this container; if the disk is full, the next try says so
    if size > 0:
        source.seek(0)
        target.seek(0)
        target.truncate()
        shutil.copyfileobj(source, target, 1 << 20)
