"""Folders in which something is made that the cache is to keep: what is there under its own name is whole.

A process that is killed meanwhile leaves one. Its lock is gone with it, so that the next start knows, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pyserve.held_folder import make_held, remove_unheld

_PREFIX = ".draft-"


@contextlib.contextmanager
def draft_folder(beside: Path) -> Iterator[Path]:
    """An empty folder beside a path that is to be made; gone afterwards, unless it was renamed.

    Raises:
        OSError: it cannot be made.
    """
    folder, descriptor = make_held(beside.parent, _PREFIX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Has ``write`` write a file, whose name it is given, and puts that in the place of ``path`` once it is whole.

    Raises:
        Exception: whatever ``write`` raises; ``path`` is as it was.
        OSError: there is no room for it.
    """
    with draft_folder(path) as folder:
        made = folder / path.name
        write(str(made))
        os.replace(made, path)


def check_writable(path: Path, size: int) -> None:
    """That a file of ``size`` bytes can be written at ``path``, where none is: by a disk's room, a quota and a limit.

    Libraries in C++ tell of a disk that becomes full meanwhile in words of nobody's, or end the process.

    Raises:
        OSError: it cannot.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if size:
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot do it
            raise
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def remove_left_drafts(folder: Path) -> None:
    """Removes what processes left in ``folder`` that are not there any more. Blocks; raises nothing."""
    remove_unheld(folder, _PREFIX)
