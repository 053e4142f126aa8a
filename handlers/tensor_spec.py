"""The dtype and shape of one item, and turning bytes or nested lists into a tensor of that kind."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from pyserve.body_kind import begins_as_json
from pyserve.handler import InputError, ModelLoadError
from pyserve.handlers.json_numbers import KINDS, UnfitNumberError, tensor_of_numbers
from pyserve.handlers.rows import found
from pyserve.input_config import InputConfigError, InputSpec, Sizes, range_text, read_inputs, sizes_of_shape
from pyserve.json_array import JsonArray

HOST_IS_BIG_ENDIAN = sys.byteorder == "big"

# Size used for a free dimension (-1) in the example input.
EXAMPLE_DIMENSION = 16

# torch has no minimum of these, numpy has.
_WITHOUT_MINIMUM = (torch.uint16, torch.uint32, torch.uint64)

SEVERAL = '; send one item a request, or several as {"instances": [...]} to /v1/models/NAME:predict'
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
    wanted: str = field(init=False, repr=False)  # the beginning of what is said about an input that does not fit
    _limits: tuple[float, float] | None = field(init=False, repr=False)  # `values`, as the dtype holds them
    _has_equal_sizes: bool = field(init=False, repr=False)  # `same` has a name twice

    def __post_init__(self) -> None:
        torch_dtype = KINDS[self.dtype][0]
        object.__setattr__(self, "torch_dtype", torch_dtype)
        fixed = math.prod(size for size in self.shape if size >= 0)
        object.__setattr__(self, "fixed_size", fixed * torch_dtype.itemsize)
        object.__setattr__(self, "sizes", self.sizes or sizes_of_shape(self.shape, self.pad_to))
        object.__setattr__(self, "wanted", f"{self._called()}expected {self}")
        object.__setattr__(self, "_limits", _limits(self.values, torch_dtype))
        object.__setattr__(self, "_has_equal_sizes", len(set(self.same)) < len(self.same))

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
        values = f" of {self.values[0]} to {self.values[1]}" if self.values else ""
        return f"{self.dtype} [{', '.join(map(range_text, self.sizes))}]{values}"

    def _called(self) -> str:
        return f"input {self.name!r}: " if self.name else ""

    @property
    def has_to_be_read(self) -> bool:
        """Whether the right number of bytes is not yet an item: some values are not allowed."""
        return self.values is not None or self.torch_dtype is torch.bool

    def example(self) -> torch.Tensor:
        """A tensor [1, *shape] that is allowed: seeded numbers in [0, 1), ones for whole numbers, or as near as
        ``values`` lets them be; free dimensions get size 16, or the nearest that is allowed.

        Not zeros: to many models of texts an item of zeros is nothing but padding.
        """  # fmt: skip
        shape = [1, *(low if low == high else self._example_size(low, high) for low, high in self.sizes)]
        if not self.torch_dtype.is_floating_point:
            usual = 0 if self.torch_dtype is torch.bool else 1
            low, high = self._limits or (usual, usual)
            return torch.full(shape, min(max(usual, low), high), dtype=self.torch_dtype)
        numbers = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        if self.values:
            low, high = self.values
            if not (low <= 0 and high >= 1):
                numbers = numbers * (high - low) + low
        return self._clamped(numbers.to(self.torch_dtype))

    def _example_size(self, low: int, high: int | None) -> int:
        if self.pad_to:
            return next(size for size in self.pad_to if size >= low)
        return max(low, EXAMPLE_DIMENSION if high is None else min(EXAMPLE_DIMENSION, high))

    def _clamped(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers if self._limits is None else numbers.clamp(*self._limits)

    def from_bytes(self, body: bytes | bytearray | memoryview) -> torch.Tensor:
        """Raw little-endian numbers -> tensor [1, *shape], padded; without a copy when ``body`` is writable.

        Raises:
            InputError: the number of bytes does not make one item, or a size or a value is not allowed.
        """
        return self.padded(self.read_bytes(body))

    def read_bytes(self, body: bytes | bytearray | memoryview) -> torch.Tensor:
        """As `from_bytes`, but not padded."""
        free = self.shape.count(-1)
        size = len(body) if not isinstance(body, memoryview) else body.nbytes
        if size == 0 or free > 1 or (size != self.fixed_size if free == 0 else size % self.fixed_size):
            raise InputError(self._size_error(body, free))
        if HOST_IS_BIG_ENDIAN:
            body = _byte_swapped(body, self.torch_dtype.itemsize)
        elif not isinstance(body, bytearray) and (isinstance(body, bytes) or body.readonly):
            body = bytearray(body)  # torch writes to tensors; it cannot be kept from writing to this one
        if self.torch_dtype is torch.bool:
            self._check_bytes_are_bools(body)
        tensor = torch.frombuffer(body, dtype=self.torch_dtype).view(1, *self.shape)
        if free or self._limits is not None:
            self.check(tensor)
        return tensor

    def _check_bytes_are_bools(self, body: bytearray | memoryview) -> None:
        numbers = np.frombuffer(body, np.uint8)
        if numbers.max() > 1:
            position = int(numbers.argmax())
            raise InputError(f"{self.wanted}, got the byte {numbers[position]} at {position}, which is not 0 or 1")

    def _size_error(self, body: bytes | bytearray | memoryview, free: int) -> str:
        if free > 1:
            wanted = f"{self}, which has {free} free dimensions"
            return f"{self._called()}raw bytes do not give the sizes of {wanted}; send JSON"
        per = f"{self.fixed_size} bytes" if free == 0 else f"a multiple of {self.fixed_size} bytes"
        start = bytes(body[:64]).lstrip()
        fix = ""
        if begins_as_json(start) or start[:1].isdigit():
            fix = "; if this is JSON, check it and send Content-Type: application/json"
        return f"{self._called()}expected {per} of little-endian {self}, got {found(body)}{fix}"

    def from_nested(self, value: Any) -> torch.Tensor:
        """Nested lists of numbers, or a `JsonArray`, one level per dimension -> tensor [1, *shape], padded.

        Raises:
            InputError: levels, sizes or values do not fit.
        """
        return self.padded(self.read_nested(value))

    def read_nested(self, value: Any) -> torch.Tensor:
        """As `from_nested`, but not padded."""
        if isinstance(value, JsonArray):
            tensor = self._read_array(value)
            if tensor is not None:
                return tensor
            value = value.values()  # which say what does not fit, and where
        flat: Any = [value]
        sizes = []
        for depth, allowed in enumerate(self.sizes):
            size = len(flat[0]) if flat and isinstance(flat[0], list) else -1
            for part in flat:
                if not isinstance(part, list):
                    raise InputError(f"{self.wanted}, got {found(part)} where a list should be, {_at(depth)}")
                if len(part) != size:
                    raise InputError(f"{self.wanted}, got a ragged list: lengths {size} and {len(part)} {_at(depth)}")
            if not is_allowed(size, allowed):
                several = SEVERAL if depth == 0 and _levels(value) == len(self.sizes) + 1 else ""
                raise InputError(f"{self.wanted}, got a list of {self._refused_size(depth, size, _at(depth))}{several}")
            sizes.append(size)
            flat = flat[0] if len(flat) == 1 else list(chain.from_iterable(flat))
        try:
            tensor = tensor_of_numbers(flat, self.torch_dtype).view(1, *sizes)
        except UnfitNumberError as error:
            place = _place(error.position, sizes)
            raise InputError(f"{self.wanted}: {self._number_kind()}, got {error.text}{place}") from error
        if self._has_equal_sizes:
            self._check_equal_sizes(tensor)
        self._check_values(tensor)
        return tensor

    def _read_array(self, array: JsonArray) -> torch.Tensor | None:
        """None if the lists are needed to say what in it does not fit."""
        for depth, (size, allowed) in enumerate(zip(array.shape, self.sizes, strict=False)):
            if not is_allowed(size, allowed):
                several = SEVERAL if depth == 0 and len(array.shape) == len(self.sizes) + 1 else ""
                raise InputError(f"{self.wanted}, got a list of {self._refused_size(depth, size, _at(depth))}{several}")
        if len(array.shape) != len(self.sizes):
            return None
        tensor = array.tensor(self.torch_dtype)
        if tensor is None:
            return None
        tensor = tensor.unsqueeze(0)
        if self._has_equal_sizes:
            self._check_equal_sizes(tensor)
        self._check_values(tensor)
        return tensor

    def _number_kind(self) -> str:
        if self.torch_dtype is torch.bool:
            return "true and false, or 1 and 0"
        return "numbers" if self.torch_dtype.is_floating_point else "whole numbers in its range"

    def _refused_size(self, axis: int, size: int, place: str) -> str:
        low, high = self.sizes[axis]
        wanted = "any size but 0" if (low, high) == (1, None) else range_text((low, high))
        is_padded = self.pad_to and self.shape[axis] == -1 and size > self.pad_to[-1]
        fix = "; send less, or raise 'input.pad_to' in model-config.yaml" if is_padded else ""
        return f"{size} instead of {wanted} {place}{fix}"

    def check(self, tensor: torch.Tensor) -> None:
        """Whether all rows of ``tensor`` [n, ...], of the right dtype, are allowed.

        Raises:
            InputError: a size or a value is not; the text says which, where, and what is.
        """
        sizes = tensor.shape[1:]
        if len(sizes) != len(self.sizes):
            raise InputError(f"{self.wanted}, got {len(sizes)} dimensions instead of {len(self.sizes)}: {list(sizes)}")
        for axis, (size, allowed) in enumerate(zip(sizes, self.sizes, strict=True)):
            if not is_allowed(size, allowed):
                refused = self._refused_size(axis, size, f"in dimension {axis + 1}")
                raise InputError(f"{self.wanted}, got {list(sizes)}: {refused}")
        if self._has_equal_sizes:
            self._check_equal_sizes(tensor)
        self._check_values(tensor)

    def _check_equal_sizes(self, tensor: torch.Tensor) -> None:
        """Dimensions of one name have one size."""
        found_sizes: dict[str, int] = {}
        free = [axis for axis, size in enumerate(self.shape) if size == -1]
        for name, axis in zip(self.same, free, strict=True):
            size = tensor.shape[axis + 1]
            if found_sizes.setdefault(name, size) != size:
                raise InputError(
                    f"{self.wanted}, got {list(tensor.shape[1:])}: its dimensions named {name!r} must have one size"
                )

    def _check_values(self, tensor: torch.Tensor) -> None:
        if self._limits is None or not tensor.numel():
            return
        low, high = self._limits
        if tensor.dtype in _WITHOUT_MINIMUM:
            array_ = tensor.numpy()
            least, most = array_.min(), array_.max()
        else:
            least, most = (each.item() for each in torch.aminmax(tensor))
        if least >= low and most <= high:  # never so for NaN
            return
        numbers = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy().reshape(-1)
        position = int(np.flatnonzero(~((numbers >= low) & (numbers <= high)))[0])
        place = _place(position, tensor.shape if len(tensor) > 1 else tensor.shape[1:])
        raise InputError(f"{self.wanted}, got {numbers[position]}{place}")

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` [n, ...], its free dimension filled up to the next of ``pad_to``. InputError if it is larger."""
        if not self.pad_to:
            return tensor
        axis = self.shape.index(-1) + 1
        size = tensor.shape[axis]
        target = next((each for each in self.pad_to if each >= size), None)
        if target is None:
            raise InputError(
                f"{self.wanted} with a size of at most {self.pad_to[-1]}, got {size}; send less, or raise "
                "'input.pad_to' in model-config.yaml"
            )
        if target == size:
            return tensor
        padded = tensor.new_full([target if i == axis else each for i, each in enumerate(tensor.shape)], self.pad_value)
        padded.narrow(axis, 0, size).copy_(tensor)
        return padded


def is_allowed(size: int, sizes: Sizes) -> bool:
    """Whether a dimension may have ``size``."""
    low, high = sizes
    return low <= size and (high is None or size <= high)


def _limits(values: tuple[float, float] | None, dtype: torch.dtype) -> tuple[float, float] | None:
    """``values`` rounded to what ``dtype`` holds, since that is what they are compared with."""
    if values is None or not dtype.is_floating_point:
        return values
    most = torch.finfo(dtype).max
    low, high = (torch.tensor(min(max(each, -most), most), dtype=torch.float64).to(dtype).item() for each in values)
    return low, high


def _levels(value: Any) -> int:
    """How deep lists are nested in ``value``, going by the first element of each."""
    levels = 0
    while isinstance(value, list) and levels < 64:
        value = value[0] if value else None
        levels += 1
    return levels


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
    # Conjugated or negated by a mark only, which numpy does not know.
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)  # numpy has no bfloat16
    array_ = tensor.numpy()
    return array_.byteswap().tobytes() if HOST_IS_BIG_ENDIAN else array_.tobytes()


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _at(depth: int) -> str:
    return "at the top level" if depth == 0 else f"at level {depth + 1}"


def _place(position: int, sizes: Sequence[int]) -> str:
    """Where a value stands, for a message: ``" at position [0, 3]"``; nothing for the only one of an item."""
    return f" at position {[int(each) for each in np.unravel_index(position, tuple(sizes))]}" if len(sizes) else ""
