"""Whether a file of compiled code is whole, before it is mapped.

The dynamic loader believes what the header of a shared library says of its file: at the first page that is not there
the process ends (SIGBUS), and of zeros in place of the tables it reads addresses. A package's list of files can be
whole when a library within it is not: it was cut short before it was packed.
"""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path
from typing import IO

from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import ModelLoadError

FIX = "copy the file again, or compile it again with torch._inductor.aoti_compile_and_package"

_SUFFIX = ".so"
# ELF of 64 bits, of which torch makes no others; big-endian machines have their own bytes, and never run ours.
_MAGIC = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SHARED_OBJECT = 3
_LOAD, _DYNAMIC = 1, 2
_NO_SECTION, _TEXTS, _NO_BITS = 0, 3, 8
_BEYOND = 0xFFFF  # of an index or a count: the first section has it
# More than any has; a header that names more is none.
_SECTIONS_MAX = 1 << 20


def check_package_code(path: Path, label: str) -> None:
    """Checks each library in the package at ``path``.

    Raises:
        ModelLoadError: one is not whole, or the package cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as package:
            for entry in package.infolist():
                if entry.filename.lower().endswith(_SUFFIX):
                    with package.open(entry) as file:
                        _check(file, entry.file_size, f"{label}: its compiled code ({Path(entry.filename).name})")
    except ModelLoadError:
        raise
    except DAMAGED_ZIP as error:
        raise ModelLoadError(f"{label}: the package cannot be read: {error}") from error


def check_library(path: Path) -> None:
    """Checks a library that is a file of its own.

    Raises:
        ModelLoadError: it is not whole, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            _check(file, os.fstat(file.fileno()).st_size, path.name)
    except OSError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error.strerror or type(error).__name__}") from error


def _check(file: IO[bytes], size: int, what: str) -> None:
    """Raises ModelLoadError."""
    library = _File(file, size, what)
    header = library.read(0, _HEADER.size)
    (magic, kind, _, _, _, segments_at, sections_at, _, _, segment_size, segments, section_size, sections,
     names_at) = _HEADER.unpack(header)  # fmt: skip
    if not magic.startswith(_MAGIC) or kind != _SHARED_OBJECT:
        raise library.damaged("it is no shared library of 64 bits")
    if segments in (0, _BEYOND) or segment_size != _SEGMENT.size:
        raise library.damaged("its header does not say what is to be mapped")
    ends = [segments_at + segments * _SEGMENT.size]
    table = b""
    if sections_at:  # else they were stripped, and only the segments can be looked at
        if section_size != _SECTION.size:
            raise library.damaged("its header does not say how large its sections are")
        first = _SECTION.unpack(library.read(sections_at, _SECTION.size))
        sections, names_at = sections or first[5], first[6] if names_at == _BEYOND else names_at
        if first[1] != _NO_SECTION or not names_at < sections <= _SECTIONS_MAX:
            raise library.damaged("it has no list of its sections")
        table = library.read(sections_at, sections * _SECTION.size)
        if _SECTION.unpack_from(table, names_at * _SECTION.size)[1] != _TEXTS:
            raise library.damaged("the list of its sections was overwritten")
        ends += [each[4] + each[5] for each in _SECTION.iter_unpack(table) if each[1] not in (_NO_SECTION, _NO_BITS)]
    mapped = list(_SEGMENT.iter_unpack(library.read(segments_at, segments * _SEGMENT.size)))
    library.require(max(*ends, *(each[2] + each[5] for each in mapped)))
    if not {_LOAD, _DYNAMIC} <= {each[0] for each in mapped}:
        raise library.damaged("its header does not say what is to be mapped")


class _File:
    """A file that is as long as it should be, or a ModelLoadError."""

    def __init__(self, file: IO[bytes], size: int, what: str):
        self._file, self._size, self._what = file, size, what

    def read(self, offset: int, count: int) -> bytes:
        self.require(offset + count)
        self._file.seek(offset)
        data = self._file.read(count)
        if len(data) < count:
            raise self._cut_short(offset + count)
        return data

    def require(self, end: int) -> None:
        if end > self._size:
            raise self._cut_short(end)

    def damaged(self, why: str) -> ModelLoadError:
        return ModelLoadError(f"{self._what} is damaged: {why}; {FIX}")

    def _cut_short(self, end: int) -> ModelLoadError:
        return ModelLoadError(f"{self._what} is cut short: it has {self._size} bytes of {end} or more; {FIX}")
