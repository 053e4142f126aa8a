"""Folders of our own that a process holds for as long as it lives, however that ends: the next one removes the others.

A lock on the folder says that it is held; the system frees it. Where homes are shared between machines whose locks do
not reach each other, another machine's folder counts as held until it was not touched for an hour.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

LEFT_AFTER_S = 3600.0
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.]")


def make_held(base: Path, prefix: str) -> tuple[Path, int]:
    """A new, empty folder in ``base``, for its owner only, and the descriptor that holds it.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{prefix}{_host()}-", dir=base))
        descriptor = hold(path)
        if descriptor is not None:
            return path, descriptor
        # One that was looking for left-overs was quicker, and has removed it.


def hold(path: Path) -> int | None:
    """The descriptor that holds ``path``, as others may too; None if it is not there, or others could write to it."""
    try:
        descriptor = _opened(path)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if _is_ours(os.fstat(descriptor)):
            with contextlib.suppress(OSError):  # no locks on this file system; then others see none either
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if is_at(descriptor, path):
                return descriptor
    os.close(descriptor)
    return None


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the folder that ``descriptor`` is open for lies at ``path``."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def remove_unheld(base: Path, prefix: str) -> None:
    """Removes the folders in ``base`` that were made with ``prefix`` and that nobody holds any more."""
    try:
        names = os.listdir(base)
    except OSError:
        return
    for name in names:
        if name.startswith(prefix):
            _remove_if_unheld(base / name, is_here=name.startswith(f"{prefix}{_host()}-"))


def _remove_if_unheld(folder: Path, *, is_here: bool) -> None:
    try:
        descriptor = _opened(folder)
    except OSError:
        return  # removed meanwhile, or no folder, or not for us
    try:
        status = os.fstat(descriptor)
        if _is_ours(status) and (is_here or time.time() - status.st_mtime > LEFT_AFTER_S):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its holder lives
    finally:
        os.close(descriptor)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU


def _host() -> str:
    return _NOT_IN_NAMES.sub("_", socket.gethostname())[:64] or "localhost"


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
