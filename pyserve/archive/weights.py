"""The weights of a model as a window of a file: a stored zip member is mapped where it lies, never copied out.

The window is pinned by an open descriptor, so an archive that is replaced by a rename while it is being served keeps
giving the bytes it was opened with. An archive must not be overwritten in place while it is mapped: a file that is cut
short under a map ends the process (SIGBUS). Every tool that writes to a temporary name and renames is safe.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pyserve.archive.entries import Limits, SourceFile, is_bomb, refuse, refuse_limit
from pyserve.archive.room import memory_size
from pyserve.archive.zip_reader import ZipReader


@dataclass(frozen=True)
class FileIdentity:
    """Distinguishes one content of a file from another without reading it. Times in ns."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileIdentity:
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class MappedWindow(io.RawIOBase):
    """A read-only, seekable binary file over ``size`` bytes at ``offset`` of a file, mapped, not read."""

    def __init__(self, descriptor: int, offset: int, size: int):
        super().__init__()
        before = offset % mmap.ALLOCATIONGRANULARITY
        self._map = mmap.mmap(descriptor, before + size, offset=offset - before, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)[before : before + size]
        self._position = 0

    def getbuffer(self) -> memoryview:
        """The window's bytes without a copy; the map lives as long as the view does."""
        return self._view[:]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._view)}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}, which is before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        chunk = self._view[self._position : self._position + len(buffer)]
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._view) if size is None or size < 0 else self._position + size
        chunk = bytes(self._view[self._position : end])
        self._position += len(chunk)
        return chunk

    def close(self) -> None:
        if not self.closed:
            self._view.release()
            try:
                self._map.close()
            except BufferError:
                pass  # someone still holds getbuffer(): the map goes when they let go
        super().close()


class Weights:
    """``size`` bytes at ``offset`` of the file ``path``.

    Attributes:
        name: name inside the archive, e.g. ``"densenet161-8d451a50.pth"``.
        path: the archive, or a plain file. Another process that opens it should compare: see `open`.
        offset, size: bytes.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        offset: int,
        size: int,
        *,
        descriptor: int | None = None,
        unpack_to: Path | None = None,
    ):
        """
        Args:
            descriptor: an open descriptor of ``path``; duplicated here and closed with this object. Without one
                ``path`` is opened at each `open`.
            unpack_to: where `as_file` puts a copy of a window that is not a whole file.
        """
        self.name = name
        self.path = path
        self.offset = offset
        self.size = size
        self._unpack_to = unpack_to
        self._descriptor: int | None = None
        self._identity: FileIdentity | None = None
        self._closer: weakref.finalize | None = None
        if descriptor is not None:
            self._identity = FileIdentity.of(descriptor)
            self._descriptor = os.dup(descriptor)
            self._closer = weakref.finalize(self, os.close, self._descriptor)

    def __repr__(self) -> str:
        return f"Weights({self.name!r}, {str(self.path)!r}, offset={self.offset}, size={self.size})"

    def __getstate__(self) -> dict[str, Any]:
        # A descriptor means nothing in another process; the identity lets that process see a replaced file.
        return {**self.__dict__, "_descriptor": None, "_closer": None}

    @property
    def suffix(self) -> str:
        """Lower-case extension with its dot: ``".pt"``."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def is_mapped(self) -> bool:
        """The bytes lie inside an archive, not in a file of their own."""
        return self._unpack_to is not None

    def open(self) -> BinaryIO:
        """A seekable read-only file over a memory map of just these bytes.

        Raises:
            InvalidModelError: the file was replaced or overwritten since it was opened first.
        """
        with self.pinned() as descriptor:
            return MappedWindow(descriptor, self.offset, self.size)  # type: ignore[return-value]

    def as_file(self) -> Path:
        """A real file of exactly these bytes, for loaders that take only paths.

        Unpacks a window once, beside the archive's other files: the model folder is then as TorchServe's is.
        """
        target = self._unpack_to
        if target is None:
            return self.path
        if target.is_file() and target.stat().st_size == self.size:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(6).hex()}.partial")
        try:
            with self.open() as window, partial.open("xb") as file:
                while chunk := window.read(1 << 20):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def close(self) -> None:
        """Lets go of the file. Maps that are open stay."""
        if self._closer is not None:
            self._closer()
        self._closer = self._descriptor = None

    @contextlib.contextmanager
    def pinned(self) -> Iterator[int]:
        """A descriptor of the file the window lies in, checked to be the one that was opened first.

        It is the caller's own: `close` in another thread does not take it away.
        """
        ours = self._descriptor
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC) if ours is None else os.dup(ours)
        try:
            if self._identity is not None and FileIdentity.of(descriptor) != self._identity:
                refuse(self.path.name, "was replaced or overwritten while it was in use; register it again")
            yield descriptor
        finally:
            os.close(descriptor)


def check_inflation(weights: Weights, limits: Limits, label: str) -> None:
    """Judges what loading would inflate: ``torch.save`` files are zips themselves, whose records may be deflated.

    Raises:
        InvalidModelError: the weights begin like a zip but are not one, or inflate beyond the limits.
    """
    with weights.pinned() as descriptor:
        source = SourceFile(descriptor, f"{label}: {weights.name}", weights.size, weights.offset)
        if weights.size < 4 or source.read_at(0, 4) != b"PK\3\4":
            return
        inflated = sum(entry.size for entry in ZipReader(source, limits).entries if not entry.is_stored)
    label = source.label
    if limits.unpacked_size_max is not None and inflated > limits.unpacked_size_max:
        refuse_limit(label, f"inflates to {inflated} bytes when loaded", "unpacked_size_max", limits)
    if is_bomb(inflated, weights.size, limits):
        what = f"inflates from {weights.size} to {inflated} bytes when loaded"
        refuse_limit(label, what, "ratio_max", limits)
    memory = memory_size()
    if memory is not None and inflated > memory:
        refuse(
            label,
            f"inflates to {inflated} bytes when loaded, and there are {memory} of memory; save it again with "
            "torch.save, which does not deflate",
        )
