"""One end of the link between a front end and the engine process: frames in order, through two rings in shared memory.

Whoever writes goes on at once: what finds no room in the ring waits here, and leaves as the other end reads. Bodies
longer than PIECE_SIZE go in several frames, between which those of other messages pass. Each end has an eventfd on
which the other one wakes it, and a socket whose end tells that the other one has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyserve import _front

log = logging.getLogger(__name__)

Body = bytes | bytearray | memoryview
OnFrame = Callable[[int, int, int, bytes, "bytes | bytearray"], None]

RING_SIZE = 4 << 20
PIECE_SIZE = 128 << 10
# Frames that are taken at once, and how often before others have their turn of the loop: a front end that floods the
# engine delays the requests of others by no more than so many of its own.
FRAMES_MAX = 16
_ROUNDS = 4
_LAST_ROUNDS = RING_SIZE // 32 // (FRAMES_MAX * _ROUNDS) + 1
MEMORY_SIZE = 2 * (_front.STATE_SIZE + RING_SIZE)


class RubbishError(ValueError):
    """What came through the ring is not what the other end may send."""


class LinkFiles(NamedTuple):
    """What a link is made of: descriptors, which whoever has them closes."""

    memory: int
    engine_wake: int
    front_end_wake: int

    @classmethod
    def make(cls) -> LinkFiles:
        """New ones. The memory is sealed: nobody can cut it short under those who read it.

        Raises:
            OSError: there is no memory, or there are no descriptors.
        """
        import fcntl

        memory = os.memfd_create("pyserve-front", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        made = [memory]
        try:
            os.ftruncate(memory, MEMORY_SIZE)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            for _ in range(2):
                made.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            for fd in made:
                os.close(fd)
            raise
        return cls(*made)


class _Waiting:
    """A message that is not, or not completely, in the ring."""

    __slots__ = ("flags", "head", "is_begun", "kind", "pieces", "size", "ticket", "total")

    def __init__(  # noqa: PLR0917 - made in two places
        self, kind: int, flags: int, ticket: int, head: bytes, parts: Sequence[Body], piece_size: int = PIECE_SIZE
    ):
        self.kind = kind
        self.flags = flags
        self.ticket = ticket
        self.head = head
        views = [memoryview(part).cast("B") if len(part) else memoryview(b"") for part in parts]
        self.pieces = deque(
            view[start : start + piece_size] for view in views for start in range(0, len(view), piece_size)
        )
        self.total = sum(map(len, self.pieces))
        self.size = self.total + len(head)
        self.is_begun = False


class Channel:
    """Loop thread only.

    Args:
        sock: ends with the other end; the channel's from now on, as are ``files``.
        is_engine: which of the two ends this is.
        rings: the module that has `Writer` and `Reader`; the engine's own takes frames of kind ROW by itself.
        body_size_max: bytes of one body that comes.
        coming_size_max: bytes of all that are on their way through the ring.
        on_frame: is given each message: kind, flags, ticket, head, body. What it raises as ValueError ends the link.
        on_end: called once with the reason when the link is over, unless `close` was called.

    Attributes:
        waiting_size: bytes that the other end has not made room for yet.
        writer, reader: of the rings.
        other_wake: the eventfd on which the other end is woken.
        is_open: neither closed nor over.

    Raises:
        OSError: the memory cannot be mapped.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, files: LinkFiles, *, is_engine: bool,
        body_size_max: int, coming_size_max: int, on_frame: OnFrame, on_end: Callable[[str], None],
        rings: Any = _front,
    ):  # fmt: skip
        self.waiting_size = 0
        self.is_open = True
        self._loop = loop
        self._sock = sock
        self._files = files
        self._on_frame = on_frame
        self._on_end = on_end
        self._own_wake = files.engine_wake if is_engine else files.front_end_wake
        self.other_wake = files.front_end_wake if is_engine else files.engine_wake
        self._waiting: deque[_Waiting] = deque()
        self._counts: Counter[int] = Counter()  # of messages that wait, by ticket
        self._wakes = False
        self._reads_on = False
        offsets = (0, _front.STATE_SIZE + RING_SIZE)
        reads_at, writes_at = offsets if is_engine else reversed(offsets)
        self.writer = rings.Writer(files.memory, writes_at, RING_SIZE)
        self.reader = rings.Reader(
            files.memory, reads_at, RING_SIZE, body_size_max=body_size_max, coming_size_max=coming_size_max,
            keeps_bodies=is_engine,
        )  # fmt: skip
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), self._on_socket)
        loop.add_reader(self._own_wake, self._on_wake)
        loop.call_soon(self._read)

    def send(self, kind: int, flags: int, ticket: int, head: bytes = b"", body: Body = b"") -> None:
        """Sends a message, now or as soon as there is room."""
        size = len(body)
        if size <= PIECE_SIZE and not self._waiting and self.is_open:
            try:
                if self.writer.put(kind, flags, ticket, head, body, size):
                    self._wake_soon()
                    return
            except ValueError as error:
                self._end(str(error))
                return
        self.send_parts(kind, flags, ticket, head, (body,))

    def send_whole(self, kind: int, flags: int, ticket: int, head: bytes, body: Body) -> None:
        """As `send`, in one frame however large. REQUIRES: a ring has room for two of them."""
        size = len(body)
        if size <= PIECE_SIZE:
            self.send(kind, flags, ticket, head, body)
        else:
            self._wait(_Waiting(kind, flags, ticket, head, (body,), size))

    def send_parts(self, kind: int, flags: int, ticket: int, head: bytes, parts: Sequence[Body]) -> None:
        """Sends a message whose body is made of ``parts``, buffers of bytes that nobody changes until they are sent."""
        self._wait(_Waiting(kind, flags, ticket, head, parts))

    def _wait(self, message: _Waiting) -> None:
        if not self.is_open:
            return
        self.waiting_size += message.size
        self._waiting.append(message)
        self._counts[message.ticket] += 1
        self.writer.has_waiting = True
        self._push()

    def take_back(self, ticket: int) -> None:
        """Forgets what waits to be sent with this ticket. What was begun has to be taken back by another message."""
        if ticket in self._counts:
            del self._counts[ticket]
            self._waiting = deque(message for message in self._waiting if message.ticket != ticket)
            self.writer.has_waiting = bool(self._waiting)
            self.waiting_size = sum(message.size for message in self._waiting)

    def give_up(self, reason: str) -> None:
        """Ends the link, and has that said."""
        self._end(reason)

    def close(self) -> None:
        """Ends the link without a word; what is in the rings is lost."""
        if not self.is_open:
            return
        self.is_open = False
        self._waiting.clear()
        self._counts.clear()
        self.waiting_size = 0
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_reader(self._own_wake)
        self._sock.close()
        for fd in self._files:
            os.close(fd)
        del self.writer, self.reader

    def _end(self, reason: str) -> None:
        if self.is_open:
            self.close()
            self._on_end(reason)

    def _push(self) -> None:
        """Writes what waits, as far as there is room."""
        try:
            while self._waiting:
                if self._put_next():
                    continue
                self.writer.wait_for_room()
                if not self._put_next():
                    break
        except ValueError as error:
            self._end(str(error))
            return
        self.writer.has_waiting = bool(self._waiting)
        self._wake_soon()

    def _put_next(self) -> bool:
        message = self._waiting[0]
        piece = message.pieces[0] if message.pieces else b""
        if message.is_begun:
            done = self.writer.put(_front.MORE, 0, message.ticket, b"", piece, 0)
        else:
            done = self.writer.put(message.kind, message.flags, message.ticket, message.head, piece, message.total)
        if not done:
            return False
        written = len(piece) + (0 if message.is_begun else len(message.head))
        self.waiting_size -= written
        message.size -= written
        message.is_begun = True
        if message.pieces:
            message.pieces.popleft()
        self._waiting.popleft()
        if not message.pieces:
            self._counts[message.ticket] -= 1
            if not self._counts[message.ticket]:
                del self._counts[message.ticket]
        elif self._counts[message.ticket] == 1:
            self._waiting.append(message)  # others pass
        else:
            self._waiting.appendleft(message)  # the messages of one request have an order
        return True

    def _wake_soon(self) -> None:
        """Wakes the other end once for all that this turn of the loop sends."""
        if not self._wakes:
            self._wakes = True
            self._loop.call_soon(self._wake)

    def _wake(self) -> None:
        self._wakes = False
        if self.is_open and self.writer.reader_sleeps():
            self._wake_other()

    def _wake_other(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is awake, or does not want to be
            os.eventfd_write(self.other_wake, 1)

    def _on_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._own_wake)
        self._read()

    def _on_socket(self) -> None:
        try:
            said = self._sock.recv(16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"the link broke: {error.strerror}")
            return
        if said:
            self._end("it wrote to the socket, where nothing is said")
            return
        for _ in range(_LAST_ROUNDS):  # what it sent before it went
            if not self._take():
                break
        self._end("it has gone")

    def _read(self) -> None:
        self._reads_on = False
        if self._take() and not self._reads_on:
            self._reads_on = True
            self._loop.call_soon(self._read)

    def _take(self) -> bool:
        """Takes what has come; returns whether there may be more."""
        if not self.is_open:
            return False
        try:
            has_more = self._take_frames()
        except (ValueError, MemoryError) as error:
            self._end(str(error) or "there is no memory for what it sent")
            return False
        except Exception:
            log.exception("what came through a link cannot be worked on")
            self._end("what it sent could not be worked on")
            return False
        return self._settle() and has_more

    def _settle(self) -> bool:
        """Goes on with what the other end has made room for, and tells it of room here; returns whether it is open."""
        if not self.is_open:
            return False
        if self.reader.writer_waits():
            self._wake_other()
        if self._waiting:
            self._push()
        return self.is_open

    def _take_frames(self) -> bool:
        """Whether there may be more."""
        for _ in range(_ROUNDS):
            frames = self.reader.take(FRAMES_MAX)
            for frame in frames:
                self._on_frame(*frame)
                if not self.is_open:
                    return False
            if self.reader.sleep():
                return False
        return True
