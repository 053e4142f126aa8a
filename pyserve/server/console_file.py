"""The file that a process in the background prints to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

OUTPUTS = (1, 2)  # descriptors


class ConsoleFile:
    """Has this process print to a new file where its own was moved or removed by somebody else. Any thread.

    Args:
        path: of the file.
        outputs: the descriptors that it prints to.
    """

    def __init__(self, path: Path, outputs: tuple[int, ...] = OUTPUTS):
        self._path = path
        self._outputs = outputs

    def look(self) -> None:
        """OSError while there is no room for a file, or it cannot be made."""
        try:
            if os.path.samestat(os.stat(self._path), os.fstat(self._outputs[-1])):
                return
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # A pipe that nobody reads must not hold the thread.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o644)
        os.set_blocking(descriptor, True)
        sys.stdout.flush()
        for each in self._outputs:
            os.dup2(descriptor, each)
        os.close(descriptor)
