"""Namespaces of the campaign's own, so that full disks, floods and killed processes stay within it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

VARIABLE = "PYSERVE_CHAOS_NAMESPACES"
_FLAGS = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_DISK_SIZE = 192 << 20


def enter(module: str, arguments: list[str]) -> None:
    """Continues as ``python -m module`` inside namespaces; returns where we are inside already, or cannot have them."""
    if VARIABLE in os.environ:
        return
    try:
        tried = subprocess.run(["unshare", *_FLAGS, "true"], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return
    if tried.returncode == 0:
        os.environ[VARIABLE] = "1"
        os.execvp("unshare", ["unshare", *_FLAGS, sys.executable, "-m", module, *arguments])


def are_ours() -> bool:
    return VARIABLE in os.environ


def become_init() -> None:
    """As process 1 of the namespace: the campaign continues in a child, this one collects orphans and ends with it."""
    if os.getpid() != 1:
        return
    child = os.fork()
    if child == 0:
        return
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def raise_loopback() -> None:
    """Sets 127.0.0.1 up; in a new network namespace it is down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        (flags,) = struct.unpack("16xh14x", asked)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def unmount_disk(folder: Path) -> None:
    """Undoes `mount_disk`, also while somebody has files open there."""
    lazily = 2
    ctypes.CDLL(None).umount2(os.fsencode(folder), lazily)


def mount_disk(folder: Path, size: int = _DISK_SIZE) -> None:
    """A disk of ``size`` bytes in memory at ``folder``, for us alone.

    Raises:
        OSError: the kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size},mode=0755".encode()) != 0:
        raise OSError(ctypes.get_errno(), f"tmpfs cannot be mounted at {folder}")
