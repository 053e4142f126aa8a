"""Reads ``.safetensors`` files: named tensors after a header of JSON, no code. No library is needed for it.

The format, as its own description has it: eight bytes with the header's length (little-endian), the header, which gives
each name a dtype, a shape and where its bytes begin and end behind the header, and those bytes, without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pyserve.handler import ModelLoadError

SUFFIX = ".safetensors"
_HEADER_SIZE_MAX = 100_000_000  # bytes; the limit of the format
_LENGTH_SIZE = 8

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def looks_like_safetensors(file: Path | BinaryIO) -> bool:
    """Whether ``file`` begins as one of this format does, whatever its name is."""
    with _mapped(file) as data:
        length = int.from_bytes(data[:_LENGTH_SIZE], "little")
        return 2 <= length <= min(_HEADER_SIZE_MAX, len(data) - _LENGTH_SIZE) and data[_LENGTH_SIZE] == ord("{")


def read_safetensors(file: Path | BinaryIO, name: str) -> dict[str, torch.Tensor]:
    """The tensors of ``file`` by their names, in its order, on the CPU, each in memory of its own.

    Args:
        name: what to call the file in messages.

    Raises:
        FileNotFoundError: there is no such file.
        ModelLoadError: it is damaged, cut short, of another format, or has a dtype that torch has not.
    """
    with _mapped(file) as data:
        header, start = _header(data, name)
        entries = {key: _entry(key, entry, name) for key, entry in header.items() if key != "__metadata__"}
        _check_places(entries, len(data) - start, name)
        return {key: _tensor(data, start + begin, dtype, shape) for key, (dtype, shape, begin, _) in entries.items()}


_Entry = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte and the one after the last


@contextmanager
def _mapped(file: Path | BinaryIO) -> Iterator[memoryview]:
    """The bytes of ``file``; mapped if it is a path or a window of an archive."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            if not size:  # which cannot be mapped
                yield memoryview(b"")
                return
            with mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                yield view
        return
    window = getattr(file, "getbuffer", None)
    if window is not None:
        with window() as view:
            yield view
        return
    position = file.tell()
    yield memoryview(file.read())
    file.seek(position)


def _header(data: memoryview, name: str) -> tuple[dict[str, Any], int]:
    """The header, and the place of the first byte behind it."""
    # A header's length may begin with the same bytes.
    if (data[:2] == b"PK" or data[:1] == b"\x80") and data[_LENGTH_SIZE : _LENGTH_SIZE + 1] != b"{":
        raise ModelLoadError(f"{name} was written by torch.save, not as safetensors; rename it to end in .pth")
    length = int.from_bytes(data[:_LENGTH_SIZE], "little")
    room = len(data) - _LENGTH_SIZE
    if room < 2 or length > _HEADER_SIZE_MAX:
        raise ModelLoadError(f"{name} is not a safetensors file ({len(data)} bytes); save it again with save_file")
    if length > room:
        raise ModelLoadError(
            f"{name} is cut short: its header has {length} bytes, and {room} are there; copy the file again"
        )
    start = _LENGTH_SIZE + length
    try:
        header = json.loads(bytes(data[_LENGTH_SIZE:start]))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{name} is not a safetensors file, or damaged: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ModelLoadError(f"{name} is not a safetensors file: its header is a {type(header).__name__}, not a table")
    return header, start


def _entry(key: str, entry: Any, name: str) -> _Entry:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ModelLoadError(
            f"{name} is damaged: its header does not say dtype, shape and place of {key!r}; save it again"
        ) from None
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise ModelLoadError(
            f"{name}: {key!r} is of dtype {str(kind)[:40]}, which this torch has no word for; save it as one of "
            f"{', '.join(_DTYPES)}"
        )
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in (*shape, begin, end)):
        raise ModelLoadError(f"{name} is damaged: shape or place of {key!r} is not of whole numbers; save it again")
    size = math.prod(shape) * dtype.itemsize
    if end - begin != size:
        raise ModelLoadError(
            f"{name} is damaged: {key!r}, {kind} of shape {shape}, needs {size} bytes and has {end - begin}; "
            "save it again"
        )
    return dtype, tuple(shape), begin, end


def _check_places(entries: dict[str, _Entry], size: int, name: str) -> None:
    """Checks that the tensors lie one after the other and fill all ``size`` bytes behind the header."""
    position = 0
    for key, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise ModelLoadError(
                f"{name} is damaged: {key!r} begins at byte {begin} instead of {position}; save it again"
            )
        if end > size:
            raise ModelLoadError(
                f"{name} is cut short: {key!r} ends at byte {end}, and the file has {size} bytes of tensors; copy it "
                "again"
            )
        position = end
    if position != size:
        raise ModelLoadError(f"{name} is damaged: {size - position} bytes belong to no tensor; save it again")


def _tensor(data: memoryview, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A copy: in the file tensors are not aligned as torch's own are, and kernels may round differently then."""
    size = math.prod(shape) * dtype.itemsize
    copied = torch.empty(size, dtype=torch.uint8)
    copied.numpy()[:] = np.frombuffer(data[start : start + size], np.uint8)
    # A byte that is neither 0 nor 1 is no bool of torch's.
    return (copied != 0 if dtype is torch.bool else copied.view(dtype)).reshape(shape)
