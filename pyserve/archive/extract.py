"""Unpacks checked entries into a folder.

By the time this runs, `entries.check_entries` has judged the whole list. Files are created below a folder
descriptor with O_EXCL and O_NOFOLLOW, one path part at a time, so that neither a name nor a link can lead outside even
if a check were wrong, and every chunk is counted against the declared size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyserve.archive.entries import LIMITS, MANIFEST_NAME, Entry, Limits, Reader, SourceFile, refuse
from pyserve.archive.room import no_room, room_in
from pyserve.archive.tar_reader import TarReader
from pyserve.archive.zip_reader import ZipReader
from pyserve.errors import shown

# Above this many files one sync of everything is cheaper than one per file.
_SYNC_EACH_COUNT_MAX = 1000
# How often the room on the disk is looked at: others write to it too.
_ROOM_INTERVAL_SIZE = 64 << 20
_ZIP_MAGICS = (b"PK\3\4", b"PK\5\6")
_GZIP_MAGIC = b"\x1f\x8b"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def is_packed(head: bytes) -> bool:
    """Whether a file that begins with these 512 bytes is a zip, a tar or a tar.gz."""
    return head.startswith((*_ZIP_MAGICS, _GZIP_MAGIC)) or head[257:262] == b"ustar"


def open_reader(source: SourceFile, limits: Limits = LIMITS) -> Reader:
    """The reader for a file, chosen by its first bytes, not by its name.

    Raises:
        InvalidModelError: neither a zip nor a tar, or a damaged one.
    """
    if source.size == 0:
        refuse(source.label, "is empty (0 bytes); make or copy it again")
    head = source.read_at(0, min(source.size, 512))
    if head.startswith(_ZIP_MAGICS):
        return ZipReader(source, limits)
    if head.startswith(_GZIP_MAGIC):
        return TarReader(source, is_gzip=True, limits=limits)
    if is_packed(head):
        return TarReader(source, is_gzip=False, limits=limits)
    refuse(
        source.label,
        f"is neither a zip (.mar) nor a tar.gz: it begins with {head[:8]!r}; "
        "make it with `pyserve archive`, or download it again",
    )


def find_root(label: str, entries: Sequence[Entry]) -> str:
    """The folder in the archive that holds the model: empty, or one name with a slash (``"densenet161/"``).

    ``torch-model-archiver --archive-format tgz`` puts everything below a folder. Without a manifest it is the root.
    """
    names = {entry.name for entry in entries if not entry.is_folder}
    if MANIFEST_NAME in names:
        return ""
    roots = [name.removesuffix(MANIFEST_NAME) for name in names if name.endswith(f"/{MANIFEST_NAME}")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) > 1:
        refuse(label, f"holds {len(roots)} models ({', '.join(sorted(roots)[:3])}); make an archive of each")
    return roots[0] if roots else ""


def unpack(reader: Reader, entries: Sequence[Entry], folder: Path) -> None:
    """Writes ``entries`` below ``folder``, which exists and is empty, and syncs them to disk.

    Raises:
        InvalidModelError: bytes do not fit what their entry declares. The caller removes the folder.
        ModelLoadError: the disk would be full before all is written.
        OSError: the disk cannot be written, or the like.
    """
    room = _Room(reader.label, folder)
    root = os.open(folder, _FOLDER_FLAGS)
    sync_each = len(entries) <= _SYNC_EACH_COUNT_MAX
    try:
        for entry in entries:
            if entry.is_folder:
                os.close(_open_folder(root, entry.name.split("/")))
        files = [entry for entry in entries if not entry.is_folder and not _is_copy(reader, entry)]
        written = 0
        for entry, chunks in reader.contents(files):
            _write(reader.label, root, entry, room.watched(chunks), sync=sync_each)
            written += 1
        if written != len(files):
            refuse(reader.label, "changed while it was unpacked; write it elsewhere, then rename it into place")
        for entry in entries:
            if _is_copy(reader, entry):
                _link(root, entry)
        if sync_each:
            os.fsync(root)
        else:
            os.sync()
    finally:
        os.close(root)


def verify(reader: Reader, entries: Iterable[Entry]) -> None:
    """Reads entries that stay in the archive once, so that a wrong checksum shows now and not in an answer."""
    for _, chunks in reader.contents(entries):
        for _ in chunks:
            pass


class _Room:
    """Stops the writing of chunks before the disk of ``folder`` is full."""

    def __init__(self, label: str, folder: Path):
        self._label = label
        self._folder = folder
        self._size = 0
        self._looked_at = 0

    def watched(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._size += len(chunk)
            if self._size - self._looked_at >= _ROOM_INTERVAL_SIZE:
                self._looked_at = self._size
                room = room_in(self._folder)
                if room == 0:
                    raise no_room(self._label, self._size, room)
            yield chunk


def _is_copy(reader: Reader, entry: Entry) -> bool:
    """Whether its bytes can only be had from the file that it is a link to: a tar is read in one direction."""
    return bool(entry.link) and reader.kind != "zip"


def _link(root: int, entry: Entry) -> None:
    """Gives what was written for ``entry.link`` a second name."""
    *parents, name = entry.name.split("/")
    *target_parents, target = entry.link.split("/")
    source = _open_folder(root, target_parents)
    try:
        parent = _open_folder(root, parents)
        try:
            os.link(target, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)
    finally:
        os.close(source)


def _write(label: str, root: int, entry: Entry, chunks: Iterator[bytes], *, sync: bool) -> None:
    *parents, name = entry.name.split("/")
    parent = _open_folder(root, parents)
    try:
        descriptor = os.open(name, _FILE_FLAGS, 0o644, dir_fd=parent)
        try:
            size = 0
            for chunk in chunks:
                size += len(chunk)
                if size > entry.size:
                    break
                _write_all(descriptor, chunk)
            if size != entry.size:
                refuse(
                    label,
                    f"entry {shown(entry.name)} unpacks to another size than the {entry.size} bytes it "
                    "declares; make the archive again",
                )
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if sync and parents:
            os.fsync(parent)
    finally:
        os.close(parent)


def _write_all(descriptor: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _open_folder(root: int, parts: Sequence[str]) -> int:
    """A descriptor of the folder ``parts`` below ``root``, made where missing; never through a link."""
    folder = os.dup(root)
    for part in parts:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=folder)
            below = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
        folder = below
    return folder
