"""What an archive may hold: the limits, and the checks that every list of entries passes before a byte is written.

The readers (``zip_reader``, ``tar_reader``, ``folder_reader``) turn a file or folder into a list of `Entry`;
`check_entries` judges names, counts and sizes the same way for all of them. The operating system's and the
standard library's own repairs (dropping ``..``, cutting at NUL, following links) are never relied on.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from pyserve.errors import InvalidModelError, shown

CHUNK_SIZE = 1 << 20
MANIFEST_NAME = "MAR-INF/MANIFEST.json"

_DRIVE = re.compile(r"[A-Za-z]:")
# Cc control, Cf format (right-to-left marks, zero-width), Cs surrogate, Co private, Cn unassigned, Zl/Zp line ends.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


@dataclass(frozen=True)
class Limits:
    """Bounds of one archive; sizes in bytes."""

    entry_count_max: int = 100_000
    unpacked_size_max: int = 4 << 30  # what is written to disk; weights mapped from the archive are not
    ratio_max: int = 200  # unpacked : packed, judged only above ratio_free_size
    ratio_free_size: int = 64 << 20
    name_size_max: int = 1024  # UTF-8 bytes of a whole name
    part_size_max: int = 255  # UTF-8 bytes between two slashes; what Linux file systems take
    depth_max: int = 32
    directory_size_max: int = 64 << 20  # a zip's central directory, or all of a tar's long-name records
    manifest_size_max: int = 16 << 20
    config_size_max: int = 16 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Entry:
    """One file or folder of an archive.

    Attributes:
        name: path inside the archive with ``/`` between its parts, no trailing slash.
        size: bytes when unpacked.
        packed_size: bytes in the archive (``size`` in a tar or folder).
        is_folder: a folder; ``size`` is 0.
        is_stored: the bytes lie in the archive as they are, at ``offset``.
        offset: where the packed bytes start in the archive file; -1 in a tar or folder.
    """

    name: str
    size: int
    packed_size: int
    is_folder: bool = False
    is_stored: bool = False
    offset: int = -1


class Reader(Protocol):
    """An opened archive: its entries, and their bytes."""

    label: str
    kind: str
    file_size: int

    @property
    def entries(self) -> Sequence[Entry]: ...

    def read(self, entry: Entry, size_max: int) -> bytes:
        """The whole content of one entry; refused when it is larger than ``size_max`` bytes."""
        ...

    def contents(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        """Each of ``entries`` with its chunks, which add up to exactly ``entry.size`` or raise."""
        ...


class SourceFile:
    """A window of an open file, read by position, so that several threads may read and renames do not matter."""

    def __init__(self, descriptor: int, label: str, size: int, offset: int = 0):
        self.descriptor = descriptor
        self.label = label
        self.size = size
        self._offset = offset

    def read_at(self, position: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``position``; raises InvalidModelError when the window ends before."""
        if position < 0 or size < 0 or position + size > self.size:
            refuse(self.label, "is damaged or cut short: it points outside itself; make or copy it again")
        found = os.pread(self.descriptor, size, self._offset + position)
        while len(found) < size:
            more = os.pread(self.descriptor, size - len(found), self._offset + position + len(found))
            if not more:
                refuse(self.label, "became shorter while it was read; write it elsewhere, then rename it into place")
            found += more
        return found

    def chunks(self, position: int, size: int) -> Iterator[bytes]:
        while size > 0:
            chunk = self.read_at(position, min(size, CHUNK_SIZE))
            position += len(chunk)
            size -= len(chunk)
            yield chunk


def refuse(label: str, problem: str) -> NoReturn:
    """Raises InvalidModelError with the archive's file name first."""
    raise InvalidModelError(f"{label}: {problem}")


def name_problem(name: str, limits: Limits = LIMITS) -> str | None:
    """Why ``name`` may not be a path inside an archive; None when it may."""
    if not name:
        return "is empty"
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        return "has control, invisible or unassigned characters"
    if len(name.encode()) > limits.name_size_max:
        return f"has {len(name.encode())} bytes, more than the {limits.name_size_max} allowed"
    if "\\" in name:
        return "has a backslash"
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path"
    parts = name.split("/")
    if len(parts) > limits.depth_max:
        return f"lies {len(parts)} folders deep, more than the {limits.depth_max} allowed"
    if ".." in parts:
        return "leaves the archive with '..'"
    if "." in parts or "" in parts:
        return "has an empty or '.' part"
    if any(len(part.encode()) > limits.part_size_max for part in parts):
        return f"has a part of more than {limits.part_size_max} bytes"
    if not unicodedata.is_normalized("NFC", name):
        return "is not in Unicode normal form NFC"
    return None


def type_problem(mode: int, is_folder: bool) -> str | None:
    """Why an entry with this Unix ``st_mode`` (0: not recorded) may not be unpacked; None when it may."""
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return "is a device, pipe or socket"
    if kind and (kind == stat.S_IFDIR) != is_folder:
        return "is marked both as a file and as a folder"
    # On folders the set-group bit only says who owns new files, and no mode is ever applied.
    if not is_folder and mode & (stat.S_ISUID | stat.S_ISGID):
        return "is a set-user or set-group file"
    return None


def check_entries(label: str, entries: Sequence[Entry], limits: Limits = LIMITS) -> None:
    """Raises InvalidModelError for bad names, twins, too many entries and too high ratios. Writes nothing."""
    if len(entries) > limits.entry_count_max:
        refuse(label, f"holds {len(entries)} entries, more than the {limits.entry_count_max} allowed; pack data apart")
    spelled: dict[str, str] = {}  # case-folded path -> its one spelling, parents included
    kinds: dict[str, bool] = {}  # spelled entry -> is_folder
    parents: set[str] = set()
    for entry in entries:
        problem = name_problem(entry.name, limits)
        if problem:
            refuse(label, f"entry {shown(entry.name)} {problem}; rename it and pack again")
        if entry.name in kinds and not (entry.is_folder and kinds[entry.name]):
            refuse(label, f"entry {shown(entry.name)} is there twice; keep one and pack again")
        kinds[entry.name] = entry.is_folder
        _check_twins(label, entry.name, spelled, parents)
        _check_ratio(label, entry, limits)
    for parent in parents:
        if kinds.get(parent) is False:
            refuse(label, f"entry {shown(parent)} is both a file and a folder; rename one and pack again")


def check_unpacked_size(label: str, entries: Iterable[Entry], file_size: int, limits: Limits = LIMITS) -> None:
    """Judges the sum of what would be written against the size limit and the ratio of the whole."""
    total = sum(entry.size for entry in entries)
    if total > limits.unpacked_size_max:
        refuse(
            label,
            f"unpacks to {total} bytes, more than the {limits.unpacked_size_max} allowed; "
            "store the weights uncompressed (`pyserve archive` does), then they are not unpacked",
        )
    if total > limits.ratio_free_size and total > limits.ratio_max * file_size:
        refuse(
            label,
            f"unpacks from {file_size} to {total} bytes, more than {limits.ratio_max} times; "
            "store its entries uncompressed",
        )


def _check_twins(label: str, name: str, spelled: dict[str, str], parents: set[str]) -> None:
    """Refuses names that differ only in case: on some file systems they are one file."""
    path = name
    while True:
        first = spelled.setdefault(unicodedata.normalize("NFC", path.casefold()), path)
        if first != path:
            refuse(label, f"entries {shown(first)} and {shown(path)} differ only in case; rename one and pack again")
        path = path.rpartition("/")[0]
        if not path or path in parents:
            return
        parents.add(path)


def _check_ratio(label: str, entry: Entry, limits: Limits) -> None:
    if entry.size > limits.ratio_free_size and entry.size > limits.ratio_max * entry.packed_size:
        refuse(
            label,
            f"entry {shown(entry.name)} unpacks from {entry.packed_size} to {entry.size} bytes, more than "
            f"{limits.ratio_max} times; store it uncompressed",
        )
