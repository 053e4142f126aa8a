"""Zip files: opened with the files that the standard library finds in them too, or refused."""

from __future__ import annotations

import io
import stat
import zipfile
import zlib

from pyserve.archive.entries import normal_name
from tests.fuzz.archive_files import unpacked


def check(data: bytes) -> None:
    files = unpacked(data, ".mar")
    if files is None:
        return
    others = _by_the_standard_library(data)
    for name, content in files.items():
        # Names below a folder that holds the manifest begin there.
        found = [other for path, other in others.items() if path == name or path.endswith(f"/{name}")]
        assert not others or not found or content in found, f"{name!r} has other bytes than zipfile finds"


def _by_the_standard_library(data: bytes) -> dict[str, bytes]:
    """Content by name; ``{}`` for what it does not read, which may be read here."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {
                normal_name(info.filename): archive.read(info)
                for info in archive.infolist()
                if not stat.S_ISLNK(info.external_attr >> 16)
            }  # of a link it has the path
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, OSError, ValueError):
        return {}
