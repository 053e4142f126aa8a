"""torch.load in worker processes: weights are mapped from their file, where that gives the same numbers as reading it.

A mapped file is in memory once, whoever maps it. torch can be asked to map everything, but then refuses what has no
path or is of its old format, takes the packed bytes of a compressed file for numbers, and follows whoever writes to the
file.
"""

from __future__ import annotations

import functools
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

CACHE_VARIABLE = "PYSERVE_WEIGHTS_CACHE"
# Numbers of the largest dtype, complex128, begin at a multiple of this.
ALIGNMENT = 16
_LOCAL_HEADER_SIZE = 30


def map_loads() -> None:
    """From now on torch.load maps what `can_be_mapped`, unless its caller says whether to."""
    if getattr(torch.load, "maps", False):
        return
    plain = torch.load

    @functools.wraps(plain)
    def load(f: Any, *arguments: Any, mmap: bool | None = None, **named: Any) -> Any:
        if mmap is None:
            mmap = isinstance(f, (str, os.PathLike)) and can_be_mapped(Path(os.fspath(f)))
        return plain(f, *arguments, mmap=mmap, **named)

    load.maps = True  # type: ignore[attr-defined]
    torch.load = load


def can_be_mapped(path: Path) -> bool:
    """Whether ``path`` is a file of torch.save whose numbers lie in it as they lie in memory, and nobody but pyserve
    writes to it."""  # fmt: skip
    try:
        return _is_cached(path) and _lies_as_in_memory(path)
    except (OSError, ValueError, struct.error, zipfile.BadZipFile):
        return False


def _is_cached(path: Path) -> bool:
    """A file in a folder that is served where it lies may be replaced in place, which would change a model's numbers
    while it is served."""
    cache = os.environ.get(CACHE_VARIABLE)
    return bool(cache) and path.resolve().is_relative_to(Path(cache or "").resolve().parent)


def _lies_as_in_memory(path: Path) -> bool:
    """Whether all tensors in it are stored, not compressed, and at the places that their dtypes need."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                return False
            if "/data/" not in entry.filename or not entry.file_size:
                continue
            file.seek(entry.header_offset)
            name_size, extra_size = struct.unpack("<26xHH", file.read(_LOCAL_HEADER_SIZE))
            if (entry.header_offset + _LOCAL_HEADER_SIZE + name_size + extra_size) % ALIGNMENT:
                return False
    return True
