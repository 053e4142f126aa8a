"""Log files that log agents tail: written by a thread of their own, rotated, and never in the way of serving.

Whoever logs appends to a bounded list and goes on. The thread takes what has gathered a few times a second, and sleeps
while there is nothing. Lines that cannot be written, or come faster than they can be, are lost and counted; a warning
says so at most once a minute. A file is rotated at 100 MB or with the day, whichever comes first; five compressed
ones are kept. One that is moved or deleted by somebody else is opened anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import logging
import os
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Longer than it need be: each round takes the interpreter from the event loop a few times.
FLUSH_INTERVAL_S = 0.25
WAITING_MAX = 50_000
# Entries that are made text of in one go, and a pause after them: meanwhile the event loop has the interpreter. Without
# it, what has gathered in FLUSH_INTERVAL_S would hold up requests for several ms.
PIECE_COUNT = 256
_PIECE_PAUSE_S = 0.001
SIZE_MAX = 100 << 20
KEPT_COUNT = 5
LOSS_REPORT_INTERVAL_S = 60.0
# How long ending waits for what has not been written.
CLOSE_TIMEOUT_S = 2.0
_COPY_SIZE = 1 << 20
_LINE_END = 0x0A


class RotatingFile:
    """A file that is appended to. The writer's thread only, but for what is compressed.

    Args:
        size_max: bytes after which it is rotated.
        today: for its age.
    """

    def __init__(self, path: Path, size_max: int = SIZE_MAX, today: Callable[[], date] = date.today):
        self.path = path
        self._size_max = size_max
        self._today = today
        self._fd = -1
        self._identity = (0, 0)
        self._is_regular = False
        self._size = 0
        self._is_torn = False  # the disk was full in the middle of a line
        self._day = today()
        self._compressing: threading.Thread | None = None

    def write(self, content: bytes) -> None:
        """Appends ``content``, in a new file if it is time for one.

        Raises:
            OSError: it cannot be written, or not completely.
        """
        self._open()
        if self._is_regular and self._size and (self._day != self._today() or self._size >= self._size_max):
            self._rotate()
            self._open()
            self._is_torn = False
        rest = memoryview(b"\n" + content if self._is_torn and content else content)
        while rest:
            count = os.write(self._fd, rest)
            self._is_torn = rest[count - 1] != _LINE_END
            rest = rest[count:]
            self._size += count

    def close(self) -> None:
        """Waits briefly for rotated files to be compressed, too; the next server continues with them."""
        self.let_go()
        if self._compressing is not None:
            self._compressing.join(CLOSE_TIMEOUT_S)

    def let_go(self) -> None:
        """Opens it anew for the next write."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                now = os.stat(self.path)
                if (now.st_dev, now.st_ino) == self._identity:
                    self._size = now.st_size  # other processes may append to it, too
                    return
            self.let_go()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A pipe that nobody reads must not hold the thread.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, 0o644)
        found = os.fstat(self._fd)
        self._identity = (found.st_dev, found.st_ino)
        self._is_regular = stat.S_ISREG(found.st_mode) and not self.path.is_symlink()
        self._size = found.st_size
        self._day = date.fromtimestamp(found.st_mtime) if self._size else self._today()

    def _rotate(self) -> None:
        """Compressing takes seconds, in which lines would be lost; a thread of its own does that."""
        if self._compressing is not None:
            self._compressing.join()
        lock = self._lock()
        if lock is None:
            return  # another process does it; until it has, the file grows
        try:
            with contextlib.suppress(OSError):
                now = os.stat(self.path)
                if (now.st_dev, now.st_ino) != self._identity:
                    os.close(lock)
                    return  # another process has done it
            self.let_go()
            recent = self.path.with_name(f"{self.path.name}.1")
            if recent.exists():  # left there by a server that ended while it compressed
                self._compress(recent)
            os.replace(self.path, recent)
        except BaseException:
            os.close(lock)
            raise
        self._compressing = threading.Thread(
            target=self._try_compress, args=(recent, lock), name="log-gzip", daemon=True
        )
        self._compressing.start()

    def _lock(self) -> int | None:
        """A descriptor that keeps other processes from rotating files of this folder; None while one does."""
        lock = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:  # a file system without locks
            return lock
        return lock

    def _try_compress(self, recent: Path, lock: int) -> None:
        try:
            self._compress(recent)
        except OSError as error:
            log.warning("%s cannot be compressed: %s", recent, error.strerror or error)
        finally:
            os.close(lock)

    def _compress(self, recent: Path) -> None:
        partial = recent.with_name(f"{recent.name}.part")
        try:
            with open(recent, "rb") as source, gzip.open(partial, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target, _COPY_SIZE)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        for number in range(KEPT_COUNT - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._kept(number), self._kept(number + 1))
        os.replace(partial, self._kept(1))
        recent.unlink()

    def _kept(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}.gz")


class QueuedFile:
    """One log file, as those see it who write to it.

    Args:
        encode: makes text of what was put in; called on the writer's thread, so that it costs no request anything.
        writer: whose thread that is.
        piece_count: entries that it is given at once.

    Attributes:
        lost_count: entries lost since that was last told.
        lost_reason: why the last ones were.
    """

    def __init__(
        self, file: RotatingFile, encode: Callable[[list[Any]], str], writer: LogWriter, piece_count: int = PIECE_COUNT
    ):
        self.file = file
        self.lost_count = 0
        self.lost_reason = ""
        self._encode = encode
        self._piece_count = piece_count
        self._writer = writer
        self._waiting: deque[Any] = deque()

    def put(self, entry: Any) -> None:
        """Any thread; never waits and never raises."""
        waiting = self._waiting
        if len(waiting) >= WAITING_MAX:
            self.lost_count += 1
            self.lost_reason = "they came faster than they could be written"
            return
        waiting.append(entry)
        if not self._writer.is_awake:
            self._writer.wake()

    def put_all(self, entries: list[Any]) -> None:
        """As `put`, of several."""
        waiting = self._waiting
        if len(waiting) + len(entries) > WAITING_MAX:
            for entry in entries:
                self.put(entry)
            return
        waiting.extend(entries)
        if not self._writer.is_awake:
            self._writer.wake()

    def flush(self, pause: Callable[[], object] = lambda: None) -> None:
        """Writes what has gathered, in pieces with a ``pause`` between. The writer's thread."""
        waiting = self._waiting
        rest = len(waiting)  # what comes meanwhile waits for the next round
        while rest:
            entries = [waiting.popleft() for _ in range(min(rest, self._piece_count))]
            rest -= len(entries)
            try:
                self.file.write(self._encode(entries).encode("utf-8", "backslashreplace"))
            except OSError as error:
                self.lost_count += len(entries)
                self.lost_reason = error.strerror or str(error)
                self.file.let_go()
            except Exception:
                self.lost_count += len(entries)
                self.lost_reason = "they cannot be made text of"
                log.exception("lines for %s cannot be made text of", self.file.path)
            if rest:
                pause()


class LogWriter:
    """The thread that writes log files. Started with the first line, so that a process without any has none.

    Attributes:
        is_awake: the thread will look at all files before it sleeps.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.is_awake = False
        self._clock = clock
        self._files: list[QueuedFile] = []
        self._news = threading.Event()
        self._is_closing = threading.Event()
        self._written = threading.Condition()
        self._rounds = 0
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._told_at = -LOSS_REPORT_INTERVAL_S

    def open(
        self, path: Path, encode: Callable[[list[Any]], str] = "".join, *, piece_count: int = PIECE_COUNT
    ) -> QueuedFile:
        """A file for entries of which ``encode`` makes text; it is created now if it can be, else later."""
        file = QueuedFile(RotatingFile(path), encode, self, piece_count)
        try:
            file.file.write(b"")
        except OSError as error:
            file.lost_reason = error.strerror or str(error)
        self._files.append(file)
        return file

    def tell_unwritable(self) -> None:
        """Warns once of the files that could not be opened."""
        failed = [file for file in self._files if file.lost_reason]
        if failed:
            self._told_at = self._clock()
            told = ", ".join(f"{each.file.path} ({each.lost_reason})" for each in failed)
            log.warning("cannot be written, their lines are lost until they can be: %s; set LOG_LOCATION and "
                        "METRICS_LOCATION to folders that can be written", told)  # fmt: skip

    def wake(self) -> None:
        """Has the thread look at all files. Any thread."""
        self.is_awake = True
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._is_closing.is_set():
                    self._thread = threading.Thread(target=self._run, name="log-files", daemon=True)
                    self._thread.start()
        self._news.set()

    def sync(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits until what was put in before is written or lost. Not on the event loop."""
        deadline = time.monotonic() + timeout_s
        with self._written:
            target = self._rounds + 2  # the round that is under way may have passed a file already
            while self._rounds < target and self._thread is not None and self._thread.is_alive():
                self._news.set()
                if time.monotonic() >= deadline:
                    return
                self._written.wait(0.05)

    def close(self) -> None:
        """Writes what is left, and ends the thread."""
        self._is_closing.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._news.wait()
            self._is_closing.wait(FLUSH_INTERVAL_S)  # more may come meanwhile
            self._news.clear()
            self.is_awake = False  # before the look: what comes after it wakes this thread again
            self._flush()
        self._flush()
        for file in self._files:
            file.file.close()

    def _flush(self) -> None:
        for file in self._files:
            file.flush(lambda: self._is_closing.wait(_PIECE_PAUSE_S))
        self._tell_losses()
        with self._written:
            self._rounds += 1
            self._written.notify_all()

    def _tell_losses(self) -> None:
        losses = [file for file in self._files if file.lost_count]
        now = self._clock()
        if not losses or now - self._told_at < LOSS_REPORT_INTERVAL_S:
            return
        self._told_at = now
        told = ", ".join(f"{each.lost_count} of {each.file.path} ({each.lost_reason})" for each in losses)
        for each in losses:
            each.lost_count = 0
        log.warning("lines of log files were lost: %s", told)


class FileHandler(logging.Handler):
    """Records of the log in a file."""

    def __init__(self, file: QueuedFile, writer: LogWriter):
        super().__init__()
        self._file = file
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # arguments that do not fit the text are the caller's mistake
            line = f"{record.name}: log record {record.msg!r} cannot be formatted: {error!r}"
        self._file.put(f"{line}\n")

    def flush(self) -> None:
        """Waits until it is written; called by ``logging.shutdown``, before the process ends."""
        self._writer.sync()
