"""Makes archives for the tests: good ones, and by hand the ones that no honest tool would write."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HANDLER = b"def handle(data, context):\n    return data\n"
WEIGHTS = bytes(range(256)) * 64


def manifest(**model: Any) -> bytes:
    """A manifest's text; a field given as None is left out."""
    fields = {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py", "serializedFile": "w.bin", **model}
    return json.dumps(
        {
            "createdOn": "01/01/2024 00:00:00",
            "runtime": "python",
            "archiverVersion": "1.0",
            "model": {key: value for key, value in fields.items() if value is not None},
        }
    ).encode()


def good_files(**model: Any) -> dict[str, bytes]:
    return {"MAR-INF/MANIFEST.json": manifest(**model), "handler.py": HANDLER, "w.bin": WEIGHTS}


@dataclass
class Member:
    """One zip member whose every field can lie; None means the truth."""

    name: bytes
    content: bytes = b""
    method: int = 0
    flags: int = 0
    mode: int = 0o100644
    local_name: bytes | None = None
    crc: int | None = None
    size: int | None = None
    packed_size: int | None = None
    local_size: int | None = None
    packed: bytes | None = None
    offset: int | None = None  # of the local header, in the central directory


def zip_bytes(
    *members: Member,
    junk: bytes = b"",
    tail: bytes = b"",
    entry_count: int | None = None,
    directory_offset: int | None = None,
) -> bytes:
    out = bytearray(junk)
    directory = bytearray()
    for member in members:
        packed = member.packed
        if packed is None:
            packed = deflate(member.content) if member.method == 8 else member.content
        crc = zlib.crc32(member.content) if member.crc is None else member.crc
        size = len(member.content) if member.size is None else member.size
        packed_size = len(packed) if member.packed_size is None else member.packed_size
        offset = len(out) if member.offset is None else member.offset
        local_name = member.name if member.local_name is None else member.local_name
        local_size = size if member.local_size is None else member.local_size
        out += (
            struct.pack(
                "<4s5HL2L2H",
                b"PK\3\4",
                20,
                member.flags,
                member.method,
                0,
                33,
                crc,
                packed_size,
                local_size,
                len(local_name),
                0,
            )
            + local_name
            + packed
        )
        directory += (
            struct.pack(
                "<4s4B4HL2L5H2L",
                b"PK\1\2",
                20,
                3,
                20,
                0,
                member.flags,
                member.method,
                0,
                33,
                crc,
                packed_size,
                size,
                len(member.name),
                0,
                0,
                0,
                0,
                member.mode << 16,
                offset,
            )
            + member.name
        )
    at = len(out) if directory_offset is None else directory_offset
    count = len(members) if entry_count is None else entry_count
    return bytes(out + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), at, 0)) + tail


def deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def good_members(**model: Any) -> list[Member]:
    return [
        Member(name.encode(), content, method=8 if name == "handler.py" else 0)
        for name, content in good_files(**model).items()
    ]


def write_mar(path: Path, *extra: Member, **model: Any) -> Path:
    path.write_bytes(zip_bytes(*good_members(**model), *extra))
    return path


def write_plain_mar(path: Path, files: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    """With the standard library, as torch-model-archiver does."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_bytes(
    files: dict[str, bytes], *extra: tarfile.TarInfo, prefix: str = "m/", tar_format: int = tarfile.PAX_FORMAT
) -> bytes:
    """An uncompressed tar; ``extra`` headers without content come last."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as archive:
        for name, content in files.items():
            header = tarfile.TarInfo(prefix + name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        for header in extra:
            archive.addfile(header)
    return out.getvalue()


def write_tgz(path: Path, *extra: tarfile.TarInfo, **kwargs: Any) -> Path:
    path.write_bytes(gzip.compress(tar_bytes(good_files(), *extra, **kwargs), mtime=0))
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def tree(folder: Path) -> set[str]:
    """Everything below a folder, as text."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
