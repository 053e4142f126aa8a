"""What a server that takes over from one that crashed has to know: in memory that outlives servers, and in a folder.

The supervisor makes two anonymous files and hands their descriptors to each server that it starts. Nobody can clear
them away, and no disk has to have room. A write goes to the older of the two, with a number and a checksum, so that
one that was killed while it wrote leaves what was there before.

The folder holds copies, for people, for OpenSSL, and for a server whose memory could not be written. One that was
removed is made again, with all that was in it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from pyserve.os_errors import cause_of
from pyserve.server.own_folder import OwnFolder

log = logging.getLogger(__name__)

_HEAD = struct.Struct("<QQ32s")  # number of the write, bytes, SHA-256 of them
_DRAFT_PREFIX = ".draft-"


class SharedMemory:
    """One value of any size that a process and those that start it share. One writer at a time.

    Args:
        descriptors: of the two files; None for new ones.
    """

    def __init__(self, descriptors: Sequence[int] | None = None):
        self.descriptors = tuple(descriptors) if descriptors else tuple(
            os.memfd_create("pyserve-state", os.MFD_CLOEXEC) for _ in range(2)
        )  # fmt: skip

    def read(self) -> bytes:
        """What was written last; empty if nothing was."""
        return max((self._read(each) for each in self.descriptors), key=lambda found: found[0])[1]

    def stamp(self) -> bytes:
        """Another one for each write."""
        return b"".join(os.pread(each, _HEAD.size, 0) for each in self.descriptors)

    def write(self, content: bytes, on_step: Callable[[str], None] = lambda _: None) -> None:
        """Replaces it. ``on_step`` is told of each step, for tests, which end there.

        Raises:
            OSError: it is as it was.
        """
        numbers = [self._read(each)[0] for each in self.descriptors]
        descriptor = self.descriptors[numbers.index(min(numbers))]
        head = _HEAD.pack(max(numbers) + 1, len(content), hashlib.sha256(content).digest())
        os.pwrite(descriptor, bytes(_HEAD.size), 0)
        on_step("cleared")
        rest, offset = memoryview(content), _HEAD.size
        while rest:
            count = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[count:], offset + count
        on_step("written")
        os.pwrite(descriptor, head, 0)
        os.ftruncate(descriptor, offset)

    def close(self) -> None:
        for each in self.descriptors:
            os.close(each)

    def _read(self, descriptor: int) -> tuple[int, bytes]:
        head = os.pread(descriptor, _HEAD.size, 0)
        if len(head) < _HEAD.size:
            return 0, b""
        number, size, digest = _HEAD.unpack(head)
        content = b""
        if size <= os.fstat(descriptor).st_size:
            content = os.pread(descriptor, size, _HEAD.size)
        return (number, content) if hashlib.sha256(content).digest() == digest else (0, b"")


class KeptFiles:
    """Small files by name. Any thread.

    Args:
        folder: for the copies; who made it removes it.
        memory: who made it closes it.
    """

    def __init__(self, folder: OwnFolder, memory: SharedMemory):
        self.folder = folder
        self._memory = memory
        self._changing = threading.Lock()
        self._seen: tuple[bytes, dict[str, bytes]] = (b"", {})
        self._problem = ""

    def get(self, name: str) -> bytes | None:
        """What was put under ``name`` last; None if nothing was."""
        with self._changing:
            content = self._contents().get(name)
        if content is None and self.folder.path is not None:
            with contextlib.suppress(OSError):
                content = (self.folder.path / name).read_bytes()
        return content

    def put(self, name: str, content: bytes) -> str:
        """Keeps ``content`` for the next server. Blocks.

        Returns:
            Why it is in memory only, without a path; ``""`` if the folder has a copy.

        Raises:
            OSError: it is kept nowhere.
        """
        with self._changing:
            failure: OSError | None = None
            try:
                self._memory.write(_packed({**self._contents(), name: content}))
            except OSError as error:
                failure = error
            problem = self._write_copy(name, content)
            self._tell(problem)
            if failure is not None and problem:
                raise failure
            return problem

    def look(self) -> None:
        """Makes the folder again if it is gone, and copies that are gone or for which there was no room. Blocks."""
        with self._changing:
            self.folder.look()
            for name, content in self._contents().items():
                if self.folder.path is not None and _size(self.folder.path / name) != len(content):
                    with contextlib.suppress(OSError):
                        _replace(self.folder.path / name, content)

    def _write_copy(self, name: str, content: bytes) -> str:
        if self.folder.look():
            for other, kept in self._contents().items():
                if other != name:
                    with contextlib.suppress(OSError):  # the one below tells
                        _replace(self.folder.path / other, kept)  # type: ignore[operator]
        if self.folder.path is None:
            return "there is no folder that can be written; name one with state_dir"
        try:
            _replace(self.folder.path / name, content)
        except OSError as error:
            return f"the folder for it (state_dir) cannot be written: {cause_of(error)}"
        return ""

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            if problem:
                log.warning("state and keys are kept in memory only, %s: %s", self.folder.path or self.folder.problem,
                            problem)  # fmt: skip
            else:
                log.info("state and keys are copied to %s again", self.folder.path)
        self._problem = problem

    def _contents(self) -> dict[str, bytes]:
        stamp = self._memory.stamp()
        if stamp != self._seen[0]:
            packed = self._memory.read()
            found = {name: base64.b64decode(text) for name, text in json.loads(packed).items()} if packed else {}
            self._seen = stamp, found
        return self._seen[1]


def _packed(contents: dict[str, bytes]) -> bytes:
    return json.dumps({name: base64.b64encode(content).decode() for name, content in contents.items()}).encode()


def _size(path: Path) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _replace(path: Path, content: bytes) -> None:
    """In one step; not synced to the disk, because no other start reads it."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=_DRAFT_PREFIX)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
