"""Opens files that may be something else: a pipe in the place of a file would be waited for without end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_whole(path: Path) -> bytes:
    """What a file, or a pipe until its end, has.

    Raises:
        OSError: it cannot be read, or is a device, most of which never end.
    """
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if (stat.S_ISCHR(mode) and not file.isatty() and not _is_null(file.fileno())) or stat.S_ISBLK(mode):
            raise OSError(errno.EINVAL, "it is a device, not a file")
        return file.read()


def _is_null(descriptor: int) -> bool:
    return os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev


def open_regular(path: Path, flags: int = 0) -> int:
    """A descriptor for reading.

    Args:
        flags: for ``open(2)``, beside those that all have.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor
