"""Reads zip files strictly: what two readers could understand differently is refused.

Follows PKWARE's APPNOTE 6.3.10. The standard library's ``zipfile`` rewrites names, skips junk in front, trusts the
central directory over the local headers and does not notice entries that share bytes; a server that runs what it
unpacks needs one reading only. Entries are stored or deflated, on one disk, not encrypted; zip64 is understood.
"""

from __future__ import annotations

import itertools
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pyserve.archive.entries import (
    CHUNK_SIZE,
    LIMITS,
    Entry,
    Limits,
    SourceFile,
    link_target,
    normal_name,
    refuse,
    refuse_limit,
    type_problem,
)
from pyserve.errors import shown

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s4B4HL2L5H2L")
_LOCAL = struct.Struct("<4s5HL2L2H")
_MAGIC_END, _MAGIC_END64, _MAGIC_LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_MAGIC_CENTRAL, _MAGIC_LOCAL = b"PK\1\2", b"PK\3\4"

_COMMENT_SIZE_MAX = 0xFFFF
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_FLAG_ENCRYPTED, _FLAG_DESCRIPTOR, _FLAG_PATCH, _FLAG_STRONG, _FLAG_UTF8, _FLAG_MASKED = 1, 8, 32, 64, 2048, 8192
_ZIP64_EXTRA = 1


@dataclass(frozen=True)
class ZipEntry(Entry):
    """An entry with what is needed to check its bytes."""

    crc: int = 0
    method: int = _STORED


@dataclass(frozen=True)
class _Central:
    """A record of the central directory, zip64 values already put in."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_size: int
    size: int
    header_offset: int
    mode: int


class ZipReader:
    """A zip file, listed and checked for structure when built.

    Raises:
        InvalidModelError: the file is damaged, or holds what this reader refuses.
    """

    kind = "zip"

    def __init__(self, source: SourceFile, limits: Limits = LIMITS):
        self.label = source.label
        self.file_size = source.size
        self._source = source
        self._limits = limits
        offset, size, count = self._find_directory()
        self.entries: list[ZipEntry] = self._list(offset, size, count)

    def read(self, entry: Entry, size_max: int) -> bytes:
        if entry.size > size_max:
            refuse(self.label, f"entry {shown(entry.name)} has {entry.size} bytes, more than the {size_max} allowed")
        return b"".join(self._chunks(entry))

    def contents(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        for entry in entries:
            yield entry, self._chunks(entry)

    # ---- the end of the file: where the list is

    def _find_directory(self) -> tuple[int, int, int]:
        """(offset, size, count) of the central directory, which must end where the end record begins."""
        source = self._source
        tail_size = min(source.size, _END.size + _COMMENT_SIZE_MAX)
        tail = source.read_at(source.size - tail_size, tail_size)
        position = tail.rfind(_MAGIC_END)
        while position >= 0:
            if position + _END.size <= len(tail):
                comment_size = struct.unpack_from("<H", tail, position + 20)[0]
                if position + _END.size + comment_size == len(tail):
                    break
            position = tail.rfind(_MAGIC_END, 0, position)
        else:
            refuse(self.label, "is cut short, or not a zip file: its end record is missing; make or copy it again")
        disk, start_disk, count_here, count, size, offset = _END.unpack_from(tail, position)[1:7]
        end = source.size - tail_size + position
        if end >= _LOCATOR64.size and source.read_at(end - _LOCATOR64.size, 4) == _MAGIC_LOCATOR64:
            end, disk, start_disk, count_here, count, size, offset = self._read_end64(
                end - _LOCATOR64.size, (disk, start_disk, count_here, count, size, offset)
            )
        elif _U16 in {count_here, count} or _U32 in {size, offset}:
            refuse(self.label, "is damaged: its zip64 end record is missing; make or copy it again")
        if disk != 0 or start_disk != 0 or count_here != count:
            refuse(self.label, "is one part of a split zip; pack it as one file")
        if count > self._limits.entry_count_max:
            refuse_limit(self.label, f"holds {count} entries", "entry_count_max", self._limits)
        if size > self._limits.directory_size_max:
            refuse(
                self.label,
                f"has a list of entries of {size} bytes, more than the "
                f"{self._limits.directory_size_max} allowed; use shorter and fewer names",
            )
        if offset + size != end:
            refuse(
                self.label,
                "has bytes in front of the zip or inside it that belong to no entry, or is damaged; make it again",
            )
        if count == 0:
            refuse(self.label, "is an empty zip: it holds no files")
        return offset, size, count

    def _read_end64(self, locator_at: int, small: tuple[int, ...]) -> tuple[int, ...]:
        """(position of the zip64 end record, then its values); a value stated twice must be the same twice."""
        _, _, end64_at, disk_count = _LOCATOR64.unpack(self._source.read_at(locator_at, _LOCATOR64.size))
        record = _END64.unpack(self._source.read_at(end64_at, _END64.size))
        magic, record_size = record[0], record[1]
        values = record[4:10]
        saturated = (_U16, _U16, _U16, _U16, _U32, _U32)
        agrees = all(low in {high, most} for low, high, most in zip(small, values, saturated, strict=True))
        if magic != _MAGIC_END64 or disk_count > 1 or end64_at + 12 + record_size != locator_at or not agrees:
            refuse(self.label, "is damaged: its zip64 end record contradicts the end record; make or copy it again")
        return (end64_at, *values)

    # ---- the list

    def _list(self, offset: int, size: int, count: int) -> list[ZipEntry]:
        directory = self._source.read_at(offset, size)
        entries: list[ZipEntry] = []
        spans: list[tuple[int, int, str]] = []
        position = 0
        for _ in range(count):
            record, position = self._read_central(directory, position)
            entry = self._read_local(record, offset)
            if entry.name:  # else the folder that all lies in
                entries.append(entry)
            spans.append((record.header_offset, entry.offset + entry.packed_size, entry.name))
        if position != size:
            refuse(self.label, "is damaged: its list of entries is longer than it says; make or copy it again")
        self._check_spans(spans)
        return entries

    def _read_central(self, directory: bytes, position: int) -> tuple[_Central, int]:
        if position + _CENTRAL.size > len(directory):
            refuse(self.label, "is damaged: its list of entries is shorter than it says; make or copy it again")
        fields = _CENTRAL.unpack_from(directory, position)
        flags, method, crc, packed_size, size = fields[5], fields[6], fields[9], fields[10], fields[11]
        name_size, extra_size, comment_size, disk = fields[12:16]
        attributes, header_offset = fields[17], fields[18]
        name_at = position + _CENTRAL.size
        extra_at = name_at + name_size
        next_at = extra_at + extra_size + comment_size
        if fields[0] != _MAGIC_CENTRAL or next_at > len(directory):
            refuse(self.label, "is damaged: its list of entries is broken; make or copy it again")
        raw_name = directory[name_at:extra_at]
        name = self._decode(raw_name, flags)
        wide = self._zip64_values(directory[extra_at : extra_at + extra_size], name)
        if size == _U32:
            size = self._take(wide, name)
        if packed_size == _U32:
            packed_size = self._take(wide, name)
        if header_offset == _U32:
            header_offset = self._take(wide, name)
        if disk not in {0, _U16}:
            refuse(self.label, "is one part of a split zip; pack it as one file")
        mode = attributes >> 16
        return _Central(name, raw_name, flags, method, crc, packed_size, size, header_offset, mode), next_at

    def _read_local(self, record: _Central, directory_at: int) -> ZipEntry:
        """Compares the header in front of the bytes with the list and returns the entry with its data offset."""
        name = record.name
        if record.flags & (_FLAG_ENCRYPTED | _FLAG_STRONG | _FLAG_MASKED):
            refuse(self.label, f"entry {shown(name)} is encrypted; pack it without a password")
        if record.flags & _FLAG_PATCH or record.method not in {_STORED, _DEFLATED}:
            refuse(self.label, f"entry {shown(name)} uses zip method {record.method}; pack it stored or deflated")
        raw = self._source.read_at(record.header_offset, _LOCAL.size + len(record.raw_name))
        magic, _, flags, method, _, _, crc, packed_size, size, name_size, extra_size = _LOCAL.unpack_from(raw)
        data_at = record.header_offset + _LOCAL.size + name_size + extra_size
        compared = _FLAG_ENCRYPTED | _FLAG_DESCRIPTOR | _FLAG_UTF8
        agrees = (
            magic == _MAGIC_LOCAL
            and method == record.method
            and flags & compared == record.flags & compared
            and name_size == len(record.raw_name)
            and raw[_LOCAL.size :] == record.raw_name
        )
        if agrees and _U32 in {packed_size, size}:
            extra = self._source.read_at(data_at - extra_size, extra_size)
            wide = self._zip64_values(extra, name)
            size = self._take(wide, name) if size == _U32 else size
            packed_size = self._take(wide, name) if packed_size == _U32 else packed_size
        # With a data descriptor the writer did not know crc and sizes yet and may have left zeros.
        unknown = {0} if flags & _FLAG_DESCRIPTOR else set()
        agrees = (
            agrees
            and crc in {record.crc} | unknown
            and packed_size in {record.packed_size} | unknown
            and size in {record.size} | unknown
        )
        if not agrees:
            refuse(self.label, f"entry {shown(name)} is described in two ways that disagree; make the archive again")
        if data_at + record.packed_size > directory_at:
            refuse(self.label, f"entry {shown(name)} reaches past the end of the entries; make the archive again")
        name = normal_name(name)
        is_folder = record.name.endswith(("/", "\\"))
        is_link = stat.S_ISLNK(record.mode)
        problem = None if is_link else type_problem(record.mode, is_folder)
        if problem:
            refuse(self.label, f"entry {shown(name)} {problem}; pack plain files and folders only")
        is_stored = record.method == _STORED
        if (is_folder and record.size) or (is_stored and record.size != record.packed_size):
            refuse(self.label, f"entry {shown(name)} lies about its size; make the archive again")
        entry = ZipEntry(
            name=name.removesuffix("/"),
            size=record.size,
            packed_size=record.packed_size,
            is_folder=is_folder,
            is_stored=is_stored,
            offset=data_at,
            crc=record.crc,
            method=record.method,
        )
        if is_link and not is_folder:
            written = self.read(entry, self._limits.name_size_max).decode("utf-8", "replace")
            return replace(entry, link=link_target(self.label, name, written))
        return entry

    def _check_spans(self, spans: list[tuple[int, int, str]]) -> None:
        spans.sort()
        if spans[0][0] != 0:
            refuse(self.label, "has bytes in front of its first entry; make it again as a plain zip")
        for (_, end, name), (start, _, next_name) in itertools.pairwise(spans):
            if start < end:
                refuse(self.label, f"entries {shown(name)} and {shown(next_name)} overlap; make the archive again")

    def _decode(self, raw_name: bytes, flags: int) -> str:
        try:
            return raw_name.decode()
        except UnicodeDecodeError:
            # Without the flag the format means code page 437, which maps every byte to something; but many archivers
            # write UTF-8 and no flag, and what is UTF-8 by chance is rare.
            if not flags & _FLAG_UTF8:
                return raw_name.decode("cp437")
            refuse(self.label, f"has a name that is not UTF-8: {shown(raw_name.decode('latin-1'))}; rename it")

    def _zip64_values(self, extra: bytes, name: str) -> list[int]:
        position = 0
        while position + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, position)
            body = extra[position + 4 : position + 4 + size]
            if len(body) != size:
                break
            if kind == _ZIP64_EXTRA:
                return [value for (value,) in struct.iter_unpack("<Q", body[: size // 8 * 8])]
            position += 4 + size
        return []

    def _take(self, wide: list[int], name: str) -> int:
        if not wide:
            refuse(self.label, f"entry {shown(name)} has no zip64 size; make the archive again")
        return wide.pop(0)

    # ---- the bytes

    def _chunks(self, entry: Entry) -> Iterator[bytes]:
        if not isinstance(entry, ZipEntry):
            raise TypeError("the entry belongs to another archive")
        packed = self._source.chunks(entry.offset, entry.packed_size)
        crc = size = 0
        for chunk in packed if entry.method == _STORED else self._inflate(packed, entry):
            size += len(chunk)
            if size > entry.size:
                refuse(self.label, f"entry {shown(entry.name)} unpacks to more than the {entry.size} bytes it declares")
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if size != entry.size or crc != entry.crc:
            refuse(
                self.label,
                f"entry {shown(entry.name)} is damaged: its size or checksum (CRC-32) does not fit; "
                "make or copy the archive again",
            )

    def _inflate(self, packed: Iterator[bytes], entry: Entry) -> Iterator[bytes]:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            for chunk in packed:
                rest = chunk
                while rest and not inflater.eof:
                    yield inflater.decompress(rest, CHUNK_SIZE)
                    rest = inflater.unconsumed_tail
                if inflater.eof and (rest or inflater.unused_data):
                    break
            while not inflater.eof and (more := inflater.decompress(b"", CHUNK_SIZE)):
                yield more
        except zlib.error:
            refuse(self.label, f"entry {shown(entry.name)} is damaged: it cannot be inflated; make the archive again")
        if not inflater.eof or inflater.unused_data:
            refuse(
                self.label,
                f"entry {shown(entry.name)} is damaged: its deflated bytes end early or late; make the archive again",
            )
