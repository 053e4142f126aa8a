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

from pyserve.archive.limits import KEYS, LIMITS, Limits
from pyserve.archive.room import no_room
from pyserve.errors import InvalidModelError, shown

CHUNK_SIZE = 1 << 20
MANIFEST_NAME = "MAR-INF/MANIFEST.json"

_DRIVE = re.compile(r"[A-Za-z]:/")
# Cc control, Cs surrogate, Zl/Zp line ends.
_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Characters of these bidirectional classes make a name look like another: embeddings, overrides, isolates.
_REORDERING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


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
        number: of an entry in a tar, counted from 0; 0 elsewhere.
        link: of a link, the name in the archive that it leads to; its bytes are those of that entry.
    """

    name: str
    size: int
    packed_size: int
    is_folder: bool = False
    is_stored: bool = False
    offset: int = -1
    number: int = 0
    link: str = ""


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
        self.offset = offset

    def read_at(self, position: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``position``; raises InvalidModelError when the window ends before."""
        if position < 0 or size < 0 or position + size > self.size:
            refuse(self.label, "is damaged or cut short: it points outside itself; make or copy it again")
        found = os.pread(self.descriptor, size, self.offset + position)
        while len(found) < size:
            more = os.pread(self.descriptor, size - len(found), self.offset + position + len(found))
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


def normal_name(name: str) -> str:
    """``name`` as archivers of other systems would have written it: with ``/`` for a backslash, and without ``.`` and
    empty parts; a slash at the end stays. ``..`` and what makes a path absolute stay, too."""  # fmt: skip
    name = name.replace("\\", "/")
    path = "/".join(part for part in name.split("/") if part not in ("", "."))
    return ("/" if name.startswith("/") else "") + path + ("/" if path and name.endswith("/") else "")


def link_target(label: str, name: str, written: str, *, is_hard: bool = False) -> str:
    """The name in the archive that the link ``name`` leads to, with ``written`` in it: a path from where it lies, or
    of a hard link from the top.

    Raises:
        InvalidModelError: it leads out of the archive, or to its top.
    """
    parts = [] if is_hard else name.split("/")[:-1]
    for part in written.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part == ".." or written.startswith("/"):
            refuse(label, f"entry {shown(name)} is a link that leaves the archive; pack the file itself")
        elif part not in ("", "."):
            parts.append(part)
    if not parts:
        refuse(label, f"entry {shown(name)} is a link to the whole archive; take it out and pack again")
    return "/".join(parts)


def name_problem(name: str, limits: Limits = LIMITS) -> str | None:
    """Why ``name`` may not be a path inside an archive; None when it may."""
    if not name:
        return "is empty"
    if any(unicodedata.category(each) in _UNPRINTABLE or unicodedata.bidirectional(each) in _REORDERING
           for each in name):  # fmt: skip
        return "has control characters, or such as change the order of the others"
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
    return None


def type_problem(mode: int, is_folder: bool) -> str | None:
    """Why an entry with this Unix ``st_mode`` (0: not recorded) may not be unpacked; None when it may."""
    # What may run it as whom is of no matter: no mode is ever applied.
    kind = stat.S_IFMT(mode)
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return "is a device, pipe or socket"
    if kind and (kind == stat.S_IFDIR) != is_folder:
        return "is marked both as a file and as a folder"
    return None


def check_entries(label: str, entries: Sequence[Entry], limits: Limits = LIMITS) -> None:
    """Raises InvalidModelError for bad names, too many entries and too high ratios. Writes nothing."""
    if len(entries) > limits.entry_count_max:
        refuse_limit(label, f"holds {len(entries)} entries", "entry_count_max", limits)
    kinds: dict[str, bool] = {}  # name -> is_folder
    parents: set[str] = set()
    for entry in entries:
        problem = name_problem(entry.name, limits)
        if problem:
            refuse(label, f"entry {shown(entry.name)} {problem}; rename it and pack again")
        if kinds.setdefault(entry.name, entry.is_folder) != entry.is_folder:
            _refuse_file_and_folder(label, entry.name)
        _add_parents(entry.name, parents)
        _check_size(label, entry, limits)
    for parent in parents:
        if kinds.get(parent) is False:
            _refuse_file_and_folder(label, parent)


def check_unpacked_size(label: str, entries: Iterable[Entry], file_size: int, limits: Limits = LIMITS) -> None:
    """Judges the sum of what would be written against the size limit, the disk and the ratio of the whole."""
    total = sum(entry.size for entry in entries)
    if limits.unpacked_size_max is not None and total > limits.unpacked_size_max:
        refuse_limit(label, f"unpacks to {total} bytes", "unpacked_size_max", limits)
    if limits.room is not None and total > limits.room:
        raise no_room(label, total, limits.room)
    if is_bomb(total, file_size, limits):
        refuse_limit(label, f"unpacks from {file_size} to {total} bytes", "ratio_max", limits)


def is_bomb(size: int, packed_size: int, limits: Limits) -> bool:
    """Whether so many bytes came out of so few that it can hardly be an accident."""
    return size > limits.ratio_free_size and size > limits.ratio_max * packed_size


def refuse_limit(label: str, what: str, limit: str, limits: Limits) -> NoReturn:
    """Raises InvalidModelError for an archive that is beyond one of `Limits`.

    Args:
        what: it does, with the number that is too large.
        limit: field of ``limits``.
    """
    key, value = KEYS[limit], getattr(limits, limit)
    more = f"more than {key}={value}" if limit != "ratio_max" else f"more than {value} times as many ({key})"
    refuse(label, f"{what}, {more}; if that is meant, raise {key} in config.properties")


def _refuse_file_and_folder(label: str, name: str) -> NoReturn:
    refuse(label, f"entry {shown(name)} is both a file and a folder; rename one and pack again")


def _add_parents(name: str, parents: set[str]) -> None:
    path = name.rpartition("/")[0]
    while path and path not in parents:
        parents.add(path)
        path = path.rpartition("/")[0]


def _check_size(label: str, entry: Entry, limits: Limits) -> None:
    if limits.entry_size_max is not None and entry.size > limits.entry_size_max:
        refuse_limit(label, f"entry {shown(entry.name)} has {entry.size} bytes", "entry_size_max", limits)
    if is_bomb(entry.size, entry.packed_size, limits):
        what = f"entry {shown(entry.name)} unpacks from {entry.packed_size} to {entry.size} bytes"
        refuse_limit(label, what, "ratio_max", limits)
