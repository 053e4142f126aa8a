"""What an error of the operating system means, in plain words, for people who have to do something about it."""

from __future__ import annotations

import errno
import os

_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.EFBIG: "files may not be that large here (ulimit -f)",
    errno.EIO: "the disk reports an error",
    errno.EMFILE: "this process has no file descriptors left (ulimit -n)",
    errno.ENFILE: "the machine has no file descriptors left",
    errno.ENOMEM: "there is no memory left",
    errno.ENOENT: "there is no such file or folder",
    errno.ESTALE: "the network file system has lost it",
}


def cause_of(error: OSError) -> str:
    """Such as ``the disk is full (ENOSPC: No space left on device)``; never a path."""
    if error.errno is None:
        return str(error) or type(error).__name__
    told = f"{errno.errorcode.get(error.errno, error.errno)}: {error.strerror or os.strerror(error.errno)}"
    words = _WORDS.get(error.errno)
    return f"{words} ({told})" if words else told
