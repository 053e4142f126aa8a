"""The supervisor's own folder, among the temporary files and for its owner only: the state, keys and certificates.

A supervisor holds a lock on it for as long as it lives, however that ends. The next one removes those without a holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "pyserve-server-"


class OwnFolder:
    """A new, empty folder, until `remove`.

    Attributes:
        path: the folder.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            _remove_left_over(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._descriptor = _opened(self.path)
            with contextlib.suppress(OSError):  # no locks on this file system; then others see none either
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            # One that was looking for left-overs may have been quicker, and have removed it.
            if self.path.exists():
                return
            os.close(self._descriptor)

    def remove(self) -> None:
        """Removes it, with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _remove_left_over(folder: Path) -> None:
    try:
        descriptor = _opened(folder)
    except OSError:
        return  # removed meanwhile, or no folder, or not for us
    try:
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its supervisor lives
    finally:
        os.close(descriptor)


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
