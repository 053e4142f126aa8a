"""Request bodies: the bytes after the head -> one bytearray. Two framings, one interface, no I/O.

The framing is read here and not by httptools because the exact place where a body ends, the bytes spent on framing and
the number of chunks must be known, and httptools tells none of them.
"""

from __future__ import annotations

import ctypes
import re

from pyserve.http1.errors import BodyTooLargeError, HeadTooLargeError, InvalidHttpError
from pyserve.http1.limits import Http1Limits

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?)*\Z"
)
_TRAILER_LINE = re.compile(rb"(" + _TOKEN + rb"):[\t -~\x80-\xff]*\Z")
_FRAMING_NAMES = (b"content-length", b"transfer-encoding", b"host")
_SIZE, _CONTENT, _CONTENT_END, _TRAILER = range(4)

# A bytearray of so many bytes, and one made longer, that nobody has set to 0: nothing is read of it before it was
# received, and pages that never come cost no memory. Python's own way to have one, so called rather than written again.
_uncleared = ctypes.pythonapi.PyByteArray_FromStringAndSize
_uncleared.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_uncleared.restype = ctypes.py_object
_resize = ctypes.pythonapi.PyByteArray_Resize
_resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]
_resize.restype = ctypes.c_int

# Of an announced body, memory is asked for when bytes of it come: so much at first, then for so many times what came.
# A kernel that gives out huge pages gives 2 MB where one byte is written, so less is asked for than was announced.
FIRST_SIZE_MIN = 64 * 1024
GROWTH = 16


class SizedBody:
    """A body announced by Content-Length.

    Args:
        first_size: bytes of memory to ask for when the first byte comes, if so many were announced.

    Attributes:
        content: the place for what has come, ``size`` bytes, and for some more; empty once ``discard`` was called.
        size: bytes of content that have come.
        complete: whether all has come; ``content`` is as long as announced then.
        announced: the Content-Length.
    """

    __slots__ = ("_first_size", "_keep", "announced", "complete", "content", "size")

    def __init__(self, announced: int, first_size: int = FIRST_SIZE_MIN):
        self._first_size = first_size
        self.announced = announced
        self.content = bytearray()
        self.size = 0
        self.complete = announced == 0
        self._keep = True

    def feed(self, data: bytes, start: int) -> int:
        """Takes what belongs to the body from ``data[start:]``; returns where the rest begins.

        Raises:
            MemoryError: there is no memory for it. Nothing was taken.
        """
        end = min(len(data), start + self.announced - self.size)
        if self._keep:
            until = self.size + end - start
            if until > len(self.content):
                self._extend(until)
            memoryview(self.content)[self.size : until] = memoryview(data)[start:end]
        self.took(end - start)
        return end

    def place(self) -> memoryview:
        """Where the next bytes belong; a caller that fills some of it calls ``took``.

        REQUIRES: nobody has a view of ``content``.

        Raises:
            MemoryError: there is no memory for them.
        """
        if self.size == len(self.content):
            self._extend(self.size + 1)
        return memoryview(self.content)[self.size :]

    def took(self, size: int) -> None:
        """So many bytes more have come to their place."""
        self.size += size
        self.complete = self.size == self.announced

    def discard(self) -> None:
        """Keeps nothing from here on; the body is only read to its end."""
        self._keep = False
        self.content = bytearray()

    def _extend(self, size: int) -> None:
        size = min(self.announced, max(self._first_size, GROWTH * size))
        if self.content:
            _resize(self.content, size)
        else:
            self.content = _uncleared(None, size)


class ChunkedBody:
    """A chunked body (RFC 9112, 7.1), read strictly. Extensions are checked and ignored, trailers checked and dropped.

    Attributes:
        content, size, complete: as in ``SizedBody``.
        announced: 0.
    """

    __slots__ = (
        "_chunk_count", "_keep", "_left", "_limits", "_line", "_overhead", "_state", "_trailer_count",
        "announced", "complete", "content", "size",
    )  # fmt: skip

    def __init__(self, limits: Http1Limits):
        self.announced = 0
        self.content = bytearray()
        self.size = 0
        self.complete = False
        self._limits = limits
        self._keep = True
        self._state = _SIZE
        self._left = 0
        self._line = b""
        self._overhead = 0
        self._chunk_count = 0
        self._trailer_count = 0

    def feed(self, data: bytes, start: int) -> int:
        """Takes what belongs to the body from ``data[start:]``; returns where the rest begins.

        Raises:
            InvalidHttpError: broken framing, or too much of it for the size of the body.
            BodyTooLargeError: the next chunk would pass ``body_size_max``.
            HeadTooLargeError: too many trailers.
        """
        while start < len(data) and not self.complete:
            take = self._take_content if self._state == _CONTENT else self._take_line
            start = take(data, start)
        return start

    def discard(self) -> None:
        """Keeps nothing from here on; the body is only read to its end."""
        self._keep = False
        self.content = bytearray()

    def _take_content(self, data: bytes, start: int) -> int:
        end = min(len(data), start + self._left)
        if self._keep:
            self.content += memoryview(data)[start:end]
        self.size += end - start
        self._left -= end - start
        if not self._left:
            self._state = _CONTENT_END
        return end

    def _take_line(self, data: bytes, start: int) -> int:
        size_max = self._limits.line_size_max
        feed = data.find(b"\n", start, start + size_max + 2)
        end = feed + 1 if feed >= 0 else min(len(data), start + size_max + 2)
        line = self._line + data[start:end]
        self._count_overhead(end - start)
        if self._state == _CONTENT_END and not b"\r\n".startswith(line):
            raise InvalidHttpError("a chunk does not end where its size says")
        if len(line) > size_max + (1 if feed < 0 else 2):
            raise InvalidHttpError(f"a chunk-size or trailer line is over {size_max} bytes")
        if feed < 0:
            self._line = line
            return end
        self._line = b""
        if line[-2:] != b"\r\n":
            raise InvalidHttpError("a chunk-size or trailer line does not end with CRLF")
        self._read_line(line[:-2])
        return end

    def _read_line(self, line: bytes) -> None:
        if self._state == _CONTENT_END:
            self._state = _SIZE
        elif self._state == _SIZE:
            self._read_size(line)
        elif line:
            self._read_trailer(line)
        else:
            self.complete = True

    def _read_size(self, line: bytes) -> None:
        match = _CHUNK_LINE.match(line)
        if not match:
            raise InvalidHttpError("a chunk-size line is not a hexadecimal size with extensions")
        self._left = int(match[1], 16)
        if not self._left:
            self._state = _TRAILER
            return
        limits = self._limits
        self._chunk_count += 1
        chunk_count_max = max(limits.chunk_count_max, limits.body_size_max // 1024)
        if self._chunk_count > chunk_count_max:
            raise InvalidHttpError(f"the body has more than {chunk_count_max} chunks; send larger ones")
        if self.size + self._left > limits.body_size_max:
            raise BodyTooLargeError(self.size + self._left, limits.body_size_max)
        self._state = _CONTENT

    def _read_trailer(self, line: bytes) -> None:
        match = _TRAILER_LINE.match(line)
        if not match:
            raise InvalidHttpError("a trailer line is not 'name: value'")
        if match[1].lower() in _FRAMING_NAMES:
            raise InvalidHttpError(f"{match[1].decode()} in the trailer of a chunked body")
        self._trailer_count += 1
        if self._trailer_count > self._limits.header_count_max:
            raise HeadTooLargeError(f"Trailer has more than {self._limits.header_count_max} headers.")

    def _count_overhead(self, size: int) -> None:
        limits = self._limits
        self._overhead += size
        if self._overhead > limits.chunk_overhead_size_max + limits.chunk_overhead_ratio_max * self.size:
            raise InvalidHttpError("the chunked body spends too many bytes on framing")


class UnframedBody:
    """A body whose pieces come without their framing, from somebody who has read that; `end` says that it was the last.

    Attributes:
        content, size, complete: as in ``SizedBody``.
        announced: 0.
    """

    __slots__ = ("_keep", "_size_max", "announced", "complete", "content", "size")

    def __init__(self, limits: Http1Limits):
        self.announced = 0
        self.content = bytearray()
        self.size = 0
        self.complete = False
        self._keep = True
        self._size_max = limits.body_size_max

    def feed(self, data: bytes, start: int) -> int:
        """Takes all of ``data[start:]``.

        Raises:
            BodyTooLargeError: the body passes ``body_size_max``.
        """
        size = self.size + len(data) - start
        if size > self._size_max:
            raise BodyTooLargeError(size, self._size_max)
        if self._keep:
            self.content += memoryview(data)[start:]
        self.size = size
        return len(data)

    def end(self) -> None:
        """No more comes."""
        self.complete = True

    def discard(self) -> None:
        """Keeps nothing from here on; the body is only read to its end."""
        self._keep = False
        self.content = bytearray()
