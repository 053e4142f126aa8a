"""Arrays as numpy.save writes them (.npy, versions 1 to 3): one item of a model that takes tensors.

The format is numpy's: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import re
import struct

import numpy as np
import torch

from pyserve.body_kind import NPY_MAGIC
from pyserve.handler import InputError
from pyserve.handlers.tensor_spec import SEVERAL, TensorSpec

HEADER_SIZE_MAX = 4096  # bytes; numpy's own for an array of numbers has 118
# The header is a dict as Python writes it. Only what describes plain numbers is read, so Python's parser is not needed.
_MEMBER = re.compile(
    r"""(?P<quote>['"])(?P<name>descr|fortran_order|shape)(?P=quote)\s*:\s*"""
    r"""(?P<value>['"][<>|=]?[A-Za-z?][0-9]{0,4}['"]|True|False|\([0-9, ]{0,700}\))\s*,?\s*"""
)
_LENGTHS = {1: "<H", 2: "<I", 3: "<I"}  # of the header, by version

Body = bytes | bytearray | memoryview


def is_numpy_file(body: Body) -> bool:
    """Whether it begins as such a file does."""
    return len(body) > len(NPY_MAGIC) and bytes(body[: len(NPY_MAGIC)]) == NPY_MAGIC


def read_numpy_file(body: Body, spec: TensorSpec) -> torch.Tensor:
    """The file of one item -> tensor [1, *shape], not padded; without a copy where the numbers lie as torch has them.

    Raises:
        InputError: the file is damaged, holds objects, or an array that ``spec`` does not allow.
    """
    dtype, shape, is_fortran, start = _header(body, spec)
    found = f"a .npy file of {dtype.name} {list(shape)}"
    wanted = _dtype_of(spec)
    if wanted is None:
        raise InputError(f"{spec.wanted}, which numpy does not have, got {found}; send raw bytes or JSON")
    if dtype.hasobject:
        raise InputError(
            f"{spec.wanted}, got a .npy file of Python objects, which is not read; save an array of numbers"
        )
    if dtype.newbyteorder("=") != wanted:
        raise InputError(f"{spec.wanted}, got {found}; save it with array.astype('{wanted.name}')")
    size, count = len(body) - start, _count(shape)
    if size != count * dtype.itemsize:
        raise InputError(
            f"{spec.wanted}, got {found} with {size} bytes behind its header instead of {count * dtype.itemsize}"
        )
    if not count:
        raise InputError(f"{spec.wanted}, got {found}, which holds nothing")
    if len(shape) != len(spec.sizes):  # numpy takes no array of more than some dozens
        is_several = len(shape) == len(spec.sizes) + 1
        why = SEVERAL if is_several else f": {len(shape)} dimensions instead of {len(spec.sizes)}"
        raise InputError(f"{spec.wanted}, got {found}{why}")
    if spec.torch_dtype is torch.bool and np.frombuffer(body, np.uint8, offset=start).max() > 1:
        raise InputError(f"{spec.wanted}, got {found} with bytes that are neither 0 nor 1")
    numbers = np.frombuffer(body, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
    # A copy where torch could not have the memory as it is, or would have to leave it alone.
    array = np.require(numbers.astype(wanted, copy=False), requirements=["C", "A", "W"])
    tensor = torch.from_numpy(array).unsqueeze(0)
    spec.check(tensor)
    return tensor


def _dtype_of(spec: TensorSpec) -> np.dtype[np.generic] | None:
    try:
        return np.dtype(spec.dtype)
    except TypeError:
        return None


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _header(body: Body, spec: TensorSpec) -> tuple[np.dtype[np.generic], tuple[int, ...], bool, int]:
    """dtype, shape, whether its order is Fortran's, and where the numbers begin."""
    major, at = body[len(NPY_MAGIC)], len(NPY_MAGIC) + 2
    if major not in _LENGTHS:
        raise InputError(f"{spec.wanted}, got a .npy file of version {major}; numpy writes 1, 2 and 3")
    form = _LENGTHS[major]
    start = at + struct.calcsize(form)
    if len(body) >= start:
        (length,) = struct.unpack(form, bytes(body[at:start]))
        if length > HEADER_SIZE_MAX:
            raise InputError(
                f"{spec.wanted}, got a .npy file with a header of {length} bytes; at most {HEADER_SIZE_MAX} are read"
            )
        start += length
    if len(body) < start:
        raise InputError(f"{spec.wanted}, got a .npy file of {len(body)} bytes that ends within its header")
    text = bytes(body[start - length : start]).decode("latin-1")
    members = {match["name"]: match["value"] for match in _MEMBER.finditer(text)}
    if _MEMBER.sub("", text).strip(" \t\n{}") or members.keys() != {"descr", "fortran_order", "shape"}:
        raise InputError(f"{spec.wanted}, got a .npy file whose header is damaged, or describes no plain numbers")
    shape = tuple(int(size) for size in re.findall(r"\d+", members["shape"]))
    try:
        dtype = np.dtype(members["descr"][1:-1])
    except (TypeError, ValueError):
        raise InputError(f"{spec.wanted}, got a .npy file of {members['descr']}, which is no kind of number") from None
    return dtype, shape, members["fortran_order"] == "True", start
