"""The dtype and shape of one item, and turning bytes or nested lists into a tensor of that kind."""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from pyserve.handler import InputError, ModelLoadError
from pyserve.handlers.rows import found
from pyserve.input_config import InputConfigError, InputSpec, Sizes, range_text, read_inputs, sizes_of_shape

HOST_IS_BIG_ENDIAN = sys.byteorder == "big"

# Size used for a free dimension (-1) in the example input.
EXAMPLE_DIMENSION = 16

# dtype name -> (torch dtype, typecode of the `array` that takes its numbers from Python, dtype of that array).
# `array` is strict about types and ranges, and five times as fast as torch.tensor on nested lists.
_DTYPES = {
    "float16": (torch.float16, "f", torch.float32),
    "bfloat16": (torch.bfloat16, "f", torch.float32),
    "float32": (torch.float32, "f", torch.float32),
    "float64": (torch.float64, "d", torch.float64),
    "uint8": (torch.uint8, "B", torch.uint8),
    "uint16": (torch.uint16, "H", torch.uint16),
    "uint32": (torch.uint32, "I", torch.uint32),
    "uint64": (torch.uint64, "Q", torch.uint64),
    "int8": (torch.int8, "b", torch.int8),
    "int16": (torch.int16, "h", torch.int16),
    "int32": (torch.int32, "i", torch.int32),
    "int64": (torch.int64, "q", torch.int64),
    "bool": (torch.bool, "B", torch.uint8),
}

_FORM = "add e.g. 'input: {dtype: float32, shape: [1, 8, 8]}' (shape of one item, -1 = any) to model-config.yaml"


@dataclass(frozen=True)
class TensorSpec:
    """Kind of one item.

    Attributes:
        dtype: name as in torch, without ``torch.``.
        shape: without the batch dimension; -1 stands for any size.
        pad_to: sizes, rising, to the next of which the one free dimension is filled up, so that items of similar
            size share a batch; empty for none.
        pad_value: what it is filled up with.
        name: of the input; ``""`` if model-config.yaml gives it none.
        sizes: smallest and largest of each dimension, without the batch; None for no known largest.
        values: smallest and largest number that is allowed; None for all.
        same: per free dimension the name under which inputs share its size; empty if nothing is said.
    """

    dtype: str
    shape: tuple[int, ...]
    pad_to: tuple[int, ...] = ()
    pad_value: float = 0
    name: str = ""
    sizes: tuple[Sizes, ...] = ()
    values: tuple[float, float] | None = None
    same: tuple[str, ...] = ()
    # Derived, computed once because they are used for every request.
    torch_dtype: torch.dtype = field(init=False, repr=False)
    fixed_size: int = field(init=False, repr=False)  # bytes, or of one step of the free dimensions

    def __post_init__(self) -> None:
        torch_dtype = _DTYPES[self.dtype][0]
        object.__setattr__(self, "torch_dtype", torch_dtype)
        fixed = math.prod(size for size in self.shape if size >= 0)
        object.__setattr__(self, "fixed_size", fixed * torch_dtype.itemsize)
        object.__setattr__(self, "sizes", self.sizes or sizes_of_shape(self.shape, self.pad_to))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TensorSpec:
        """The one under ``input`` in model-config.yaml: ``{dtype: float32, shape: [1, 8, 8]}``.

        Raises:
            ModelLoadError: there is none or more than one, or it is not of that form.
        """
        specs = input_specs(config)
        if len(specs) > 1:
            raise ModelLoadError(
                f"'input' in model-config.yaml describes {len(specs)} inputs; of the built-in handlers only 'tensor' "
                "takes more than one"
            )
        return specs[0]

    @classmethod
    def of(cls, entry: InputSpec) -> TensorSpec:
        """From one description."""
        return cls(
            entry.dtype, entry.shape, entry.pad_to, entry.pad_value, entry.name, entry.sizes, entry.values, entry.same
        )

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(range_text, self.sizes))}]"

    def example(self) -> torch.Tensor:
        """A tensor [1, *shape]: seeded numbers in [0, 1), zeros for whole numbers; free dimensions get size 16."""
        free = self.pad_to[0] if self.pad_to else EXAMPLE_DIMENSION
        shape = [1, *(free if size == -1 else size for size in self.shape)]
        if not self.torch_dtype.is_floating_point:
            return torch.zeros(shape, dtype=self.torch_dtype)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.torch_dtype)

    def from_bytes(self, body: bytes | bytearray | memoryview) -> torch.Tensor:
        """Raw little-endian numbers -> tensor [1, *shape], without a copy when ``body`` is writable.

        Raises:
            InputError: the number of bytes does not make one item, or it is larger than ``pad_to`` allows.
        """
        free = self.shape.count(-1)
        size = len(body) if not isinstance(body, memoryview) else body.nbytes
        if size == 0 or free > 1 or (size != self.fixed_size if free == 0 else size % self.fixed_size):
            raise InputError(self._size_error(body, free))
        if HOST_IS_BIG_ENDIAN:
            body = _byte_swapped(body, self.torch_dtype.itemsize)
        elif not isinstance(body, bytearray) and (isinstance(body, bytes) or body.readonly):
            body = bytearray(body)  # torch writes to tensors; it cannot be kept from writing to this one
        return self.padded(torch.frombuffer(body, dtype=self.torch_dtype).view(1, *self.shape))

    def _size_error(self, body: bytes | bytearray | memoryview, free: int) -> str:
        if free > 1:
            return f"raw bytes do not tell the sizes of {self}, which has {free} free dimensions; send JSON"
        per = f"{self.fixed_size} bytes" if free == 0 else f"a multiple of {self.fixed_size} bytes"
        start = bytes(body[:64]).lstrip()
        hint = ""
        if start[:1] in (b"[", b"{") or start[:1].isdigit():
            hint = "; if this is JSON, check it and send Content-Type: application/json"
        return f"expected {per} of little-endian {self}, got {found(body)}{hint}"

    def from_nested(self, value: Any) -> torch.Tensor:
        """Nested lists of numbers, one list level per dimension -> tensor [1, *shape].

        Raises:
            InputError: levels, sizes or values do not fit, or it is larger than ``pad_to`` allows.
        """
        flat: Any = [value]
        sizes = []
        for depth, expected in enumerate(self.shape):
            size = len(flat[0]) if flat and isinstance(flat[0], list) else -1
            for part in flat:
                if not isinstance(part, list):
                    raise InputError(f"expected {self}, got {found(part)} where a list should be, {_at(depth)}")
                if len(part) != size:
                    raise InputError(f"expected {self}, got a ragged list: lengths {size} and {len(part)} {_at(depth)}")
            if size != expected and (expected != -1 or size == 0):
                wanted = "any size but 0" if expected == -1 else str(expected)
                raise InputError(f"expected {self}, got a list of {size} instead of {wanted} {_at(depth)}")
            sizes.append(size)
            flat = flat[0] if len(flat) == 1 else list(chain.from_iterable(flat))
        dtype, typecode, array_dtype = _DTYPES[self.dtype]
        try:
            numbers = array.array(typecode, flat)
        except (TypeError, OverflowError) as error:
            raise InputError(self._value_error(flat)) from error
        tensor = torch.frombuffer(numbers, dtype=array_dtype).view(1, *sizes)
        if dtype is array_dtype:
            return self.padded(tensor)
        if dtype is torch.bool and tensor.max().item() > 1:
            raise InputError(f"expected {self}, got numbers other than 0 and 1")
        return self.padded(tensor.to(dtype))

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [n, ...], its free dimension filled up to the next of ``pad_to``. InputError if it is larger."""
        if not self.pad_to:
            return tensor
        axis = self.shape.index(-1) + 1
        size = tensor.shape[axis]
        target = next((each for each in self.pad_to if each >= size), None)
        if target is None:
            raise InputError(
                f"expected {self} with a size of at most {self.pad_to[-1]}, got {size}; send less, or raise "
                "'input.pad_to' in model-config.yaml"
            )
        if target == size:
            return tensor
        padded = tensor.new_full([target if i == axis else each for i, each in enumerate(tensor.shape)], self.pad_value)
        padded.narrow(axis, 0, size).copy_(tensor)
        return padded

    def _value_error(self, flat: list[Any]) -> str:
        typecode = _DTYPES[self.dtype][1]
        for position, value in enumerate(flat):
            try:
                array.array(typecode, (value,))
            except (TypeError, OverflowError):
                kind = "numbers" if typecode in "fd" else "whole numbers in its range"
                return f"expected {self}: {kind}, got {found(value)} at flat position {position}"
        return f"expected {self}"


def input_specs(config: Mapping[str, Any]) -> list[TensorSpec]:
    """What ``input`` in model-config.yaml describes: one input, or a list of them with a name each.

    Raises:
        ModelLoadError: there is none, or it is not of that form.
    """
    entry = config.get("input")
    if entry is None:
        raise ModelLoadError(f"the model's input is not described; {_FORM}")
    try:
        return [TensorSpec.of(each) for each in read_inputs(entry, "model-config.yaml: input")]
    except InputConfigError as error:
        raise ModelLoadError(str(error)) from error


def output_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the model's outputs in order, as ``output`` in model-config.yaml gives them; empty if it does not.

    ``output: scores``, ``output: [scores, boxes]``, ``output: {name: scores}`` or a list of such.

    Raises:
        ModelLoadError: it is not of that form, or a name stands there twice.
    """
    entry = config.get("output", config.get("outputs"))
    if entry is None:
        return ()
    entries = entry if isinstance(entry, list) else [entry]
    found_names = [each.get("name") if isinstance(each, Mapping) else each for each in entries]
    names = tuple(name for name in found_names if isinstance(name, str) and name)
    if len(set(names)) < len(entries):
        raise ModelLoadError(f"'output' in model-config.yaml is {entry!r}; give each output a name: 'output: [scores]'")
    return names


def _byte_swapped(body: bytes | bytearray | memoryview, itemsize: int) -> bytearray:
    return bytearray(np.frombuffer(body, np.uint8).reshape(-1, itemsize)[:, ::-1].tobytes())


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The numbers of a CPU tensor as little-endian bytes, row by row."""
    tensor = tensor.detach().contiguous() if tensor.requires_grad else tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)  # numpy has no bfloat16
    array_ = tensor.numpy()
    return array_.byteswap().tobytes() if HOST_IS_BIG_ENDIAN else array_.tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _at(depth: int) -> str:
    return "at the top level" if depth == 0 else f"at level {depth + 1}"
