"""Processes that a worker has started, wherever they went: found by a mark in their environment, and ended with it.

A process group ends what stayed in it. What began a session of its own, or was forked twice to get away, is still a
child of something that carried the worker's mark: an exec takes it over from ``os.environ``, a fork with the memory of
its parent. Only a process that was started with an environment of its own choice has none.

    PYSERVE_WORKER=<token of the supervisor's servers><zygote's token>.<number of the worker, 8 digits>

Needs no torch. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

MARK = "PYSERVE_WORKER"
_NUMBER_DIGITS = 8
# A killed process needs a moment to go, and may have forked just before.
_ROUNDS_MAX = 50
_ROUND_S = 0.002
_PR_SET_CHILD_SUBREAPER = 36


def new_token() -> str:
    """Of a zygote, or of all that one supervisor's servers start; no other has it."""
    return os.urandom(8).hex()


def mark_of(token: str, number: int = 0) -> str:
    """Of a worker; number 0 is the zygote's own."""
    return f"{token}.{number:0{_NUMBER_DIGITS}d}"


def take_mark(mark: str) -> None:
    """Marks this process and all that it starts. REQUIRES: it was started with a mark of the same length."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    # Where the kernel put it, and reads it for /proc/<pid>/environ: a new value would lie elsewhere.
    place = libc.getenv(MARK.encode())
    if place and len(os.environ.get(MARK, "")) == len(mark):
        ctypes.memmove(place, mark.encode(), len(mark))
    os.environ[MARK] = mark


def adopt_orphans() -> None:
    """From now on processes whose parents end below us become our children, so that somebody waits for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_marked(mark: str) -> int:
    """Kills all processes of this user whose mark begins with ``mark``; returns how many there were.

    Waits for them, a tenth of a second at most.
    """
    if not mark:
        return 0  # it would be everybody's
    ended: set[int] = set()
    for _ in range(_ROUNDS_MAX):
        found = [pid for pid in _own_processes() if _has_mark(pid, mark)]
        if not found:
            break
        for pid in found:
            ended.add(pid)
            _kill(pid, mark)
        time.sleep(_ROUND_S)
    return len(ended)


def _own_processes() -> list[int]:
    user, own = os.geteuid(), os.getpid()
    found = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal() and int(entry.name) != own:
                with contextlib.suppress(OSError):
                    if entry.stat().st_uid == user:
                        found.append(int(entry.name))
    return found


def _has_mark(pid: int, mark: str) -> bool:
    """A process that has ended and is not waited for yet has none."""
    wanted = f"{MARK}={mark}".encode()
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            content = file.read()
    except OSError:
        return False
    return content.startswith(wanted) or b"\0" + wanted in content


def _kill(pid: int, mark: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _has_mark(pid, mark):  # the number may have become another process's
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
