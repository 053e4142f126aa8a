"""torch.load in worker processes: weights are mapped from the cache, where that gives the same tensors as reading them.

A mapped file is in memory once, whoever maps it. torch can be asked to map everything, but then refuses what has no
path or is of its old format, takes the packed bytes of a compressed file for numbers, and follows whoever writes to the
file. So only one thing is mapped: a large file of the model's folder that is still what was copied there, and then not
that file but its original in the cache, which no handler writes to. Everything else is read as torch reads it.
"""

from __future__ import annotations

import functools
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from mmap import MAP_PRIVATE
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as defaults

# Tensors of torch.load are aligned so, and so are those of a file that torch.save has written: kernels may round
# differently by alignment.
ALIGNMENT = 64
_LOCAL_HEADER_SIZE = 30

# Path of a file in the model's folder -> path of its original, identity of the original, identity of the file.
_originals: dict[str, tuple[str, Sequence[int], Sequence[int]]] = {}


def map_loads(originals: Mapping[str, tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """From now on torch.load maps what has a `mapped_file`, unless its caller or torch's settings say whether to.

    Args:
        originals: see `pyserve.archive.model_folder.Originals`.
    """
    _originals.clear()
    _originals.update(originals)
    if not originals or getattr(torch.load, "maps", False):
        return
    plain = torch.load

    @functools.wraps(plain)
    def load(f: Any, *arguments: Any, mmap: bool | None = None, **named: Any) -> Any:
        if mmap is None and isinstance(f, (str, os.PathLike)) and _loads_plainly():
            original = mapped_file(f)
            if original is not None:
                return plain(original, *arguments, mmap=True, **named)
        return plain(f, *arguments, mmap=mmap, **named)

    load.maps = True  # type: ignore[attr-defined]
    torch.load = torch.serialization.load = load


def _loads_plainly() -> bool:
    """Whether torch would read a file, and make of it what is in it: nobody has chosen another way for this process."""
    return (
        not defaults.load.mmap
        and defaults.load.mmap_flags == MAP_PRIVATE
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def original_of(path: str | os.PathLike[str]) -> Path | None:
    """The file in the cache that ``path``, in the model's folder, was copied from; None if there is none, or either
    was written to since."""  # fmt: skip
    known = _originals.get(os.path.realpath(os.fspath(path)))
    if known is None:
        return None
    original, original_identity, identity = known
    try:
        if _identity(original) == list(original_identity) and _identity(path) == list(identity):
            return Path(original)
    except OSError:
        pass
    return None


def mapped_file(path: str | os.PathLike[str]) -> Path | None:
    """The file to map instead of reading ``path``: its original, if it is of torch.save and its numbers lie in it as
    they lie in memory; else None."""  # fmt: skip
    original = original_of(path) if _originals else None
    try:
        return original if original is not None and _lies_as_in_memory(original) else None
    except (OSError, ValueError, struct.error, zipfile.BadZipFile):
        return None


def _identity(path: str | os.PathLike[str]) -> list[int]:
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _lies_as_in_memory(path: Path) -> bool:
    """Whether all tensors in it are stored, not compressed, and aligned as in memory, and it is not TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.filename.endswith("/constants.pkl"):
                return False
            if "/data/" not in entry.filename or not entry.file_size:
                continue
            file.seek(entry.header_offset)
            name_size, extra_size = struct.unpack("<26xHH", file.read(_LOCAL_HEADER_SIZE))
            if (entry.header_offset + _LOCAL_HEADER_SIZE + name_size + extra_size) % ALIGNMENT:
                return False
    return True
