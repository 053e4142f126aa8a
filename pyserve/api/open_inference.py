"""The Open Inference Protocol, version 2, whatever carries it: requests, answers, and their tensors.

A tensor's data is either raw, little-endian numbers row by row in a memoryview, or a list of values as JSON has them.
Raw numbers become a torch tensor that looks into that memory, unless they lie at an odd address.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from pyserve.errors import InputError
from pyserve.handlers.json_numbers import UnfitNumberError, tensor_of_numbers
from pyserve.json_array import JsonArray
from pyserve.request.datatypes import _DATATYPE_OF, _DATATYPES, BYTES, DATATYPES, dtype_of
from pyserve.tensor_lists import to_lists

Element = bytes | bytearray | memoryview | str


RANK_MAX = 64
TEXT_SHOWN_MAX = 200
ELEMENT_COUNT_MAX = 1 << 48
LENGTH = struct.Struct("<I")  # before each element of BYTES


@dataclass(slots=True)
class InferInput:
    """One input tensor.

    Attributes:
        datatype: one of DATATYPES.
        shape: with the batch dimension, which comes first.
        data: raw, or values, flat or nested (many numbers as `JsonArray`). Values of BYTES are text or bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: memoryview | list[Any] | JsonArray
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        # A client's own words come back cut, however long they were.
        sizes = str(list(self.shape[:RANK_MAX]))[:TEXT_SHOWN_MAX]
        return f"input {quoted(self.name)} ({self.datatype[:TEXT_SHOWN_MAX]} {sizes})"


@dataclass(slots=True)
class RequestedOutput:
    """An output that the client asks for by name."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferRequest:
    """One inference request.

    Attributes:
        outputs: those wanted, in this order; empty for all.
    """

    inputs: list[InferInput]
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class InferOutput:
    """One output tensor; a tensor on the CPU, or the elements of BYTES."""

    name: str
    data: torch.Tensor | list[bytes]

    @property
    def datatype(self) -> str:
        """One of DATATYPES. KeyError for a tensor of another kind, such as complex numbers."""
        return _DATATYPE_OF[self.data.dtype] if isinstance(self.data, torch.Tensor) else BYTES

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape) if isinstance(self.data, torch.Tensor) else [len(self.data)]

    def raw(self) -> bytes | memoryview:
        """The data as the binary extension and ``raw_output_contents`` have it, without a copy if there is no need."""
        if not isinstance(self.data, torch.Tensor):
            return b"".join(part for each in self.data for part in (LENGTH.pack(len(each)), each))
        tensor = self.data.detach().contiguous()
        if not tensor.numel():
            return b""
        return tensor.reshape(-1).view(torch.uint8).numpy().data

    def values(self) -> list[Any]:
        """The data flat, as JSON has it: text of BYTES, numbers of all others, those of 16 bits too.

        Raises:
            InputError: JSON has no form for it: bytes that are no text.
        """
        if not isinstance(self.data, torch.Tensor):
            try:
                return [str(each, "utf-8") for each in self.data]
            except UnicodeDecodeError as error:
                raise InputError(f"output {self.name!r} is not text; {_ASK_BINARY}") from error
        return to_lists(self.data.reshape(-1))


_ASK_BINARY = 'ask for it with the parameter "binary_data": true'


@dataclass(slots=True)
class InferResponse:
    """One answer."""

    model_name: str
    model_version: str
    outputs: list[InferOutput]
    id: str = ""


def quoted(text: str) -> str:
    """A client's own words, for a message: cut, however long they were."""
    return repr(text[:TEXT_SHOWN_MAX])


def check_input(tensor: InferInput) -> None:
    """Checks what must be so whatever the model: datatype, shape and size of the data.

    Raises:
        InputError: it is not; the text names the input.
    """
    if tensor.datatype not in DATATYPES:
        raise InputError(f"{tensor} has an unknown datatype; one of {', '.join(DATATYPES)}")
    if not 1 <= len(tensor.shape) <= RANK_MAX or any(size < 0 for size in tensor.shape):
        raise InputError(f"{tensor} needs a shape of 1 to {RANK_MAX} sizes, none of them negative")
    if not _is_countable(tensor.shape):  # told without the numbers: there may be thousands of digits
        raise InputError(f"the shape of input {quoted(tensor.name)} has more elements than there can be")
    if isinstance(tensor.data, memoryview) and tensor.datatype != BYTES:
        wanted = element_count(tensor) * dtype_of(tensor.datatype).itemsize
        if tensor.data.nbytes != wanted:
            raise InputError(f"{tensor} needs {wanted} bytes, got {tensor.data.nbytes}")


def _is_countable(shape: tuple[int, ...]) -> bool:
    """Whether torch can have a tensor of it; sizes of zero do not make the others smaller."""
    product = 1
    for size in shape:
        product *= min(max(1, size), ELEMENT_COUNT_MAX + 1)
        if product > ELEMENT_COUNT_MAX:
            return False
    return True


def element_count(tensor: InferInput) -> int:
    return math.prod(tensor.shape)


def tensor_of(tensor: InferInput, *, is_for_engine: bool = False) -> torch.Tensor:
    """The input as a tensor of its shape, on the CPU. Raw data that is writable and lies as numbers must is not copied.

    REQUIRES: `check_input` has passed; the datatype is not BYTES.

    Args:
        is_for_engine: the tensor goes into a batch of the engine, which takes numbers from any address.

    Raises:
        InputError: the values do not fit datatype and shape.
    """
    dtype = _DATATYPES[tensor.datatype]
    count = element_count(tensor)
    if not count:
        return torch.empty(tensor.shape, dtype=dtype)
    if isinstance(tensor.data, memoryview):
        # torch writes to tensors; it cannot be kept from writing to this one.
        memory = bytearray(tensor.data) if tensor.data.readonly else tensor.data
        if tensor.datatype == "BOOL" and torch.frombuffer(memory, dtype=torch.uint8).max() > 1:
            raise InputError(f"{tensor} has a byte other than 0 and 1")
        found = torch.frombuffer(memory, dtype=dtype).view(tensor.shape)
        # Where the JSON before it leaves the numbers at an odd address, they are moved: kernels may rely on it.
        return found if is_for_engine or found.data_ptr() % dtype.itemsize == 0 else found.clone()
    if isinstance(tensor.data, JsonArray) and tensor.data.shape in (tensor.shape, (count,)):
        array = tensor.data.tensor(dtype)
        if array is not None:
            return array.view(tensor.shape)
    flat = flat_values(tensor)
    try:
        return tensor_of_numbers(flat, dtype).view(tensor.shape)
    except UnfitNumberError as error:
        position = f"{error.text} at position {error.position}"
        raise InputError(f"{tensor} has a value that is no {tensor.datatype}: {position}") from error


def flat_values(tensor: InferInput) -> list[Any]:
    """Values in JSON form, which may be flat or nested, as one flat list.

    REQUIRES: the data is a list.

    Raises:
        InputError: their number, or how they are nested, does not fit the shape.
    """
    assert isinstance(tensor.data, (list, JsonArray))
    flat: list[Any] = tensor.data.values() if isinstance(tensor.data, JsonArray) else tensor.data
    if flat and isinstance(flat[0], list):
        if len(flat) != tensor.shape[0]:
            raise InputError(f"{tensor} has a list of {len(flat)} where its shape says {tensor.shape[0]}")
        for size in tensor.shape[1:]:
            if not all(isinstance(part, list) and len(part) == size for part in flat):
                raise InputError(f"the lists of {tensor} are not nested as its shape says")
            flat = list(chain.from_iterable(flat))
    if len(flat) != element_count(tensor):
        raise InputError(f"{tensor} needs {element_count(tensor)} values, got {len(flat)}")
    return flat


def elements_of(tensor: InferInput) -> list[Element]:
    """The elements of a BYTES input: text from JSON, views into raw data.

    REQUIRES: the datatype is BYTES.

    Raises:
        InputError: the data is broken, or there are more or fewer elements than the shape says.
    """
    if isinstance(tensor.data, (list, JsonArray)):
        elements = flat_values(tensor)
        for position, element in enumerate(elements):
            if not isinstance(element, (str, bytes, bytearray, memoryview)):
                raise InputError(f"{tensor} has a value that is no text at position {position}")
        return elements
    found: list[Element] = []
    raw, at, wanted = tensor.data, 0, element_count(tensor)
    while at < raw.nbytes and len(found) < wanted:
        start = at + LENGTH.size
        end = start + LENGTH.unpack_from(raw, at)[0] if start <= raw.nbytes else raw.nbytes + 1
        if end > raw.nbytes:
            raise InputError(f"element {len(found)} of {tensor} ends after the {raw.nbytes} bytes of its data")
        found.append(raw[start:end])
        at = end
    if len(found) != wanted or at != raw.nbytes:
        more = f"{len(found)} of them and {raw.nbytes - at} bytes"
        raise InputError(f"{tensor} needs {wanted} elements, its data has {more} more")
    return found
