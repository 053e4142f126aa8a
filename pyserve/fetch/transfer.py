"""One archive on its way into a folder: a hidden temporary file with limits, which becomes the archive or vanishes.

The temporary file is locked while it is written. One that is not belongs to a process that was killed, and is removed
by the next transfer into the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyserve.archive.room import room_in

CHUNK_SIZE = 1 << 20
_SUFFIX = ".pyserve-partial"
_ABANDONED_S = 60
_ROOM_INTERVAL_SIZE = 64 << 20


@dataclass(frozen=True)
class TransferLimits:
    """Bounds of one transfer; sizes in bytes, times in seconds.

    Attributes:
        size_max: None for what the disk has room for.
        window_s: in each such time at least ``window_size_min`` bytes must come.
    """

    size_max: int | None
    timeout_s: float
    window_s: float = 30.0
    window_size_min: int = 30 << 10
    connect_timeout_s: float = 10.0


class TransferError(Exception):
    """It failed; the text is a sentence without its end, fit for the client.

    Attributes:
        fix: what would help; may be empty.
        is_refused: nothing was fetched, because that is not allowed.
    """

    def __init__(self, text: str, *, fix: str = "", is_refused: bool = False):
        super().__init__(text)
        self.fix = fix
        self.is_refused = is_refused


class ExistsError(Exception):
    """There is a file of the archive's name already."""


class Abort:
    """Ends a transfer from another thread: its socket is shut down, and its next step fails. Any thread."""

    def __init__(self) -> None:
        self.reason = ""
        self.partial: Path | None = None  # the file of the transfer
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def watch(self, sock: socket.socket | None) -> None:
        """``sock`` is what the transfer waits for from now on."""
        with self._lock:
            self._socket = sock
            if self.reason:
                self._shut()

    def fire(self, reason: str) -> None:
        """The first ``reason`` becomes the error of the transfer."""
        with self._lock:
            self.reason = self.reason or reason
            self._shut()

    def remove_partial(self) -> None:
        """For a client that no longer waits. The transfer cannot commit any more: it was asked to end."""
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which would wait for the peer


class Transfer:
    """Writes a temporary file in ``folder``; one thread. A context: what was not committed is gone after it.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, limits: TransferLimits, abort: Abort,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.target = folder / name
        self.limits = limits
        self.abort = abort
        self.size = 0
        self._clock = clock
        self._window_end = clock() + limits.window_s
        self._window_size = 0
        self._looked_at = 0
        _remove_abandoned(folder)
        # Not the archive's own name, which may be as long as a name can be.
        self.partial = folder / f".{os.urandom(8).hex()}{_SUFFIX}"
        abort.partial = self.partial
        self._file = open(self.partial, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def expect(self, size: int) -> None:
        """``size`` bytes will come.

        Raises:
            TransferError: they are too many, or there is no room for them.
        """
        self._check_size(size)
        room = room_in(self.partial.parent)
        if size > room:
            raise TransferError(f"it has {size} bytes, and the model store has room for {room}")

    def write(self, chunk: bytes) -> None:
        """Appends ``chunk``.

        Raises:
            TransferError: too many bytes, too slow, no room, or told to end.
        """
        self.check()
        self.size += len(chunk)
        self._check_size(self.size)
        if self.size >= self._looked_at + _ROOM_INTERVAL_SIZE:  # others write to the disk too
            self._looked_at = self.size
            if room_in(self.partial.parent) < len(chunk):
                raise TransferError(f"it has {self.size} bytes or more, and the model store has no room for more")
        try:
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _cannot_be_kept(error) from None
        self._window_size += len(chunk)
        now = self._clock()
        if now >= self._window_end:
            if self._window_size < self.limits.window_size_min:
                raise TransferError(
                    f"only {self._window_size} bytes came in {self.limits.window_s:g} s; the least is "
                    f"{self.limits.window_size_min}"
                )
            self._window_end, self._window_size = now + self.limits.window_s, 0

    def check(self) -> None:
        """Raises TransferError when the transfer was asked to end."""
        if self.abort.reason:
            raise TransferError(self.abort.reason)

    def commit(self, *, replaces: bool = False) -> None:
        """The file appears under its name, complete and on disk.

        Raises:
            ExistsError: there is one, and ``replaces`` is false.
            TransferError: it cannot be kept.
        """
        self.check()
        try:
            os.fsync(self._file.fileno())
            if replaces:
                os.replace(self.partial, self.target)
            else:
                _put_in_place(self.partial, self.target)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except FileExistsError:
            raise ExistsError from None
        except OSError as error:
            raise _cannot_be_kept(error) from None

    def _check_size(self, size: int) -> None:
        if self.limits.size_max is not None and size > self.limits.size_max:
            raise TransferError(
                f"it has {size} bytes or more; the most is download_size_max={self.limits.size_max}",
                fix="raise download_size_max in config.properties",
            )

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.partial.unlink(missing_ok=True)


def _cannot_be_kept(error: OSError) -> TransferError:
    return TransferError(f"it cannot be kept in the model store: {error.strerror or type(error).__name__}")


def _put_in_place(partial: Path, target: Path) -> None:
    """A rename that replaces nothing. Raises FileExistsError."""
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError from None
        os.replace(partial, target)


def _without_waiting(path: str, flags: int) -> int:
    """A pipe in the place of a file of ours must not block."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError), open(path, "rb", opener=_without_waiting) as file:
            if time.time() - path.stat().st_mtime < _ABANDONED_S:  # it may have been made just now
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
