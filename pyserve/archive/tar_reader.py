"""Reads ``.tar.gz``, ``.tgz`` and ``.tar`` strictly, in one direction, with bounded memory.

Follows POSIX.1-2017 (pax) and the GNU long-name records. The standard library's ``tarfile`` reads a long-name record
of any declared size into memory, and its unpacking has let links escape; here only regular files and folders exist.
The list is made by one pass that writes nothing; every later pass must find the same list again.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import BinaryIO

from pyserve.archive.entries import (
    CHUNK_SIZE,
    LIMITS,
    Entry,
    Limits,
    SourceFile,
    is_bomb,
    link_target,
    normal_name,
    refuse,
    refuse_limit,
)
from pyserve.archive.room import no_room
from pyserve.errors import shown

_BLOCK = 512
_RECORD_SIZE_MAX = 64 << 10  # one long-name or pax record; names are at most 1 KiB
_TAIL_SIZE_MAX = 1 << 20  # zero blocks after the end
_GZIP_RATIO_MAX = 1100  # deflate makes at most 1032 bytes of one
_FILE_TYPES, _FOLDER_TYPE = (b"0", b"\0"), b"5"
_LINK_TYPES = (b"1", b"2")
_TYPE_NAMES = {
    b"1": "is a hard link to nothing, or with content",
    b"2": "is a symbolic link to nothing, or with content",
    b"3": "is a device",
    b"4": "is a device",
    b"6": "is a pipe",
    b"S": "is a sparse file",
}


class _SourceStream(io.RawIOBase):
    """`SourceFile` as a sequential stream, for ``gzip``."""

    def __init__(self, source: SourceFile):
        super().__init__()
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), self._source.size - self._position)
        buffer[:size] = self._source.read_at(self._position, size)
        self._position += size
        return size


class TarReader:
    """A tar file, gzipped or plain; listed when `entries` is first asked for.

    Raises:
        InvalidModelError: the file is damaged, or holds what this reader refuses.
    """

    def __init__(self, source: SourceFile, *, is_gzip: bool, limits: Limits = LIMITS):
        self.label = source.label
        self.kind = "tar.gz" if is_gzip else "tar"
        self.file_size = source.size
        self._source = source
        self._is_gzip = is_gzip
        self._limits = limits

    @cached_property
    def entries(self) -> list[Entry]:
        found: list[Entry] = []
        total = 0
        with _TarStream(self._source, self._is_gzip, self._limits) as stream:
            for entry in stream.headers():
                found.append(entry)
                total += entry.size
                if len(found) > self._limits.entry_count_max:
                    refuse_limit(self.label, f"holds {len(found)} entries or more", "entry_count_max", self._limits)
                if total > self.file_size * (_GZIP_RATIO_MAX if self._is_gzip else 1):
                    refuse(self.label, "is damaged: it declares more bytes than can be in it; make or copy it again")
                if self._limits.unpacked_size_max is not None and total > self._limits.unpacked_size_max:
                    what = f"unpacks to {total} bytes or more"
                    refuse_limit(self.label, what, "unpacked_size_max", self._limits)
                if self._limits.room is not None and total > self._limits.room:
                    raise no_room(self.label, total, self._limits.room)
                for _ in stream.body(entry):
                    pass
            stream.finish()
        if not found:
            refuse(self.label, "is an empty tar: it holds no files")
        return found

    def read(self, entry: Entry, size_max: int) -> bytes:
        if entry.size > size_max:
            refuse(self.label, f"entry {shown(entry.name)} has {entry.size} bytes, more than the {size_max} allowed")
        return b"".join(b"".join(chunks) for _, chunks in self.contents([entry]))

    def contents(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        """In the order of the tar, whatever the order of ``entries``. Each one's chunks must be used up at once."""
        wanted = {entry.number: entry for entry in entries}
        with _TarStream(self._source, self._is_gzip, self._limits) as stream:
            expected = iter(self.entries)
            for entry in stream.headers():
                if entry != next(expected, None):
                    refuse(self.label, "changed while it was read; write it elsewhere, then rename it into place")
                if entry.number in wanted:
                    yield wanted.pop(entry.number), stream.body(entry)
                    if not wanted:
                        return
                else:
                    for _ in stream.body(entry):
                        pass
        if wanted:
            refuse(self.label, "changed while it was read; write it elsewhere, then rename it into place")


class _TarStream:
    """One pass over the unpacked bytes."""

    def __init__(self, source: SourceFile, is_gzip: bool, limits: Limits):
        self._label = source.label
        self._packed_size = source.size
        self._limits = limits
        raw = io.BufferedReader(_SourceStream(source), 256 << 10)
        self._file: BinaryIO = gzip.GzipFile(fileobj=raw, mode="rb") if is_gzip else raw  # type: ignore[assignment]
        self._read_size = 0
        self._record_total = 0

    def __enter__(self) -> _TarStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def headers(self) -> Iterator[Entry]:
        """Each entry; the caller uses up `body` of one before it asks for the next."""
        name: str | None = None
        size: int | None = None
        link: str | None = None
        number = 0
        while True:
            block = self._take(_BLOCK)
            if not block.strip(b"\0"):
                return
            kind, entry = self._parse(block)
            if kind in {b"L", b"x", b"g", b"K"}:
                record = self._read_record(entry)
                if kind == b"L":
                    name = self._text(record.rstrip(b"\0"))
                elif kind == b"K":
                    link = self._text(record.rstrip(b"\0"))
                elif kind == b"x":
                    fields = self._pax_fields(record)
                    name = fields.get("path", name)
                    link = fields.get("linkpath", link)
                    size = self._pax_size(fields.get("size"), size)
                elif kind == b"g" and self._pax_fields(record).keys() & {"path", "size"}:
                    refuse(self._label, "gives one name or size to all its entries; make it again with plain tar")
                continue
            if name is not None:
                entry = replace(entry, name=name)
            if size is not None:
                entry = replace(entry, size=size, packed_size=size)
            if link is None and kind in _LINK_TYPES:
                link = self._text(block[157:257].split(b"\0", 1)[0])
            entry = self._judge(kind, entry, link or "")
            name = size = link = None
            if entry.name:  # else the folder itself, as `tar -C folder .` writes it
                yield replace(entry, number=number)
                number += 1

    def body(self, entry: Entry) -> Iterator[bytes]:
        left = entry.size
        while left:
            chunk = self._take(min(left, CHUNK_SIZE))
            left -= len(chunk)
            yield chunk
        self._take(-entry.size % _BLOCK)

    def finish(self) -> None:
        """Reads to the end, so that gzip's checksum is seen; only zeros may follow the entries."""
        seen = 0
        while chunk := self._read(CHUNK_SIZE):
            seen += len(chunk)
            if seen > _TAIL_SIZE_MAX or chunk.strip(b"\0"):
                refuse(self._label, "has bytes after its end; make it again with plain tar")

    def _judge(self, kind: bytes, entry: Entry, link: str) -> Entry:
        """``link``: what the header says as the target of a link."""
        name = normal_name(entry.name)
        is_folder = kind == _FOLDER_TYPE or (kind in _FILE_TYPES and entry.name.endswith(("/", "\\")))
        name = name.removesuffix("/")
        if kind in _LINK_TYPES and link and not entry.size:
            # A hard link names its target from the top, a symbolic one from where it lies.
            return replace(entry, name=name, link=link_target(self._label, name, link, is_hard=kind == b"1"))
        if kind not in _FILE_TYPES and kind != _FOLDER_TYPE:
            problem = _TYPE_NAMES.get(kind, f"has the unknown type {kind!r}")
            refuse(
                self._label,
                f"entry {shown(name)} {problem}; pack plain files and folders only "
                "(`tar --dereference --hard-dereference`)",
            )
        if is_folder and entry.size:
            refuse(self._label, f"entry {shown(name)} is a folder with content; make the archive again")
        return replace(entry, name=name, is_folder=is_folder)

    def _parse(self, block: bytes) -> tuple[bytes, Entry]:
        declared = self._number(block[148:156])
        unsigned = sum(block[:148]) + 32 * 8 + sum(block[156:])
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if declared not in {unsigned, signed}:
            refuse(self._label, "is damaged, or not a tar file: a header's checksum is wrong; make or copy it again")
        name = self._text(block[:100].split(b"\0", 1)[0])
        prefix = self._text(block[345:500].split(b"\0", 1)[0]) if block[257:263] == b"ustar\0" else ""
        size = self._number(block[124:136])
        if size < 0:
            refuse(self._label, f"entry {shown(name)} has a negative size; make the archive again")
        entry = Entry(f"{prefix}/{name}" if prefix else name, size, size)
        return block[156:157], entry

    def _read_record(self, entry: Entry) -> bytes:
        self._record_total += entry.size + _BLOCK
        if entry.size > _RECORD_SIZE_MAX or self._record_total > self._limits.directory_size_max:
            refuse(
                self._label,
                f"has a name or attribute record of {entry.size} bytes (at most {_RECORD_SIZE_MAX}, "
                f"together {self._limits.directory_size_max}); use shorter names and no extended attributes",
            )
        return b"".join(self.body(entry))

    def _pax_fields(self, record: bytes) -> dict[str, str]:
        fields: dict[str, str] = {}
        while record:
            digits, _, _ = record.partition(b" ")
            if not digits.isdigit() or len(digits) > 6 or not len(digits) + 2 < int(digits) <= len(record):
                refuse(self._label, "is damaged: a pax record is broken; make or copy it again")
            line, record = record[len(digits) + 1 : int(digits)], record[int(digits) :]
            key, equals, value = line.removesuffix(b"\n").partition(b"=")
            if not equals or key.startswith(b"GNU.sparse"):
                refuse(self._label, "has a sparse file or a broken pax record; pack it without --sparse")
            if key in {b"path", b"size", b"linkpath"}:
                fields[key.decode()] = self._text(value)
        return fields

    def _pax_size(self, text: str | None, default: int | None) -> int | None:
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            refuse(self._label, f"is damaged: a pax record gives the size {shown(text)}; make or copy it again")
        return int(text)

    def _number(self, field: bytes) -> int:
        if field[0] & 0x80:  # GNU: big-endian, for what does not fit in octal digits
            return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if not digits.isdigit() or digits.strip(b"01234567"):
            if not digits:
                return 0
            refuse(self._label, "is damaged, or not a tar file: a header's number is not octal; make or copy it again")
        return int(digits, 8)

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            refuse(self._label, f"has a name that is not UTF-8: {shown(raw.decode('latin-1'))}; rename it")

    def _take(self, size: int) -> bytes:
        chunk = self._read(size)
        if len(chunk) != size:
            refuse(self._label, "is cut short: the tar ends in the middle; make or copy it again")
        return chunk

    def _read(self, size: int) -> bytes:
        try:
            chunk = self._file.read(size)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            refuse(self._label, "is damaged or cut short: it cannot be gunzipped; make or copy it again")
        self._read_size += len(chunk)
        if is_bomb(self._read_size, self._packed_size, self._limits):
            what = f"unpacks from {self._packed_size} to {self._read_size} bytes or more"
            refuse_limit(self._label, what, "ratio_max", self._limits)
        return chunk
