"""``input`` in model-config.yaml: what one item of each of a model's inputs is.

    input: {dtype: int64, shape: [2..64], vocabulary: 30522, same: length, name: ids}

A dimension of ``shape`` is a size, -1 for any, or a range: ``2..64``, ``..64`` (1 to 64), ``2..`` (2 and more). What is
said here is checked in every request before the model runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pyserve.errors import shown

DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)

Sizes = tuple[int, int | None]  # smallest and largest of a dimension, both allowed; None for no known largest

_KEYS = {"name", "dtype", "shape", "pad_to", "pad_value", "vocabulary", "values", "same"}
_FORM = "e.g. 'input: {dtype: float32, shape: [1, 8, 8]}' (shape of one item, -1 = any)"
_RANGE = re.compile(r"([0-9]{0,12})\.\.([0-9]{0,12})")
_SHAPE_SIZE_MAX = 16
_PAD_COUNT_MAX = 64
_ELEMENT_COUNT_MAX = 1 << 31
_FLOAT_DTYPES = ("float32", "float64", "float16", "bfloat16")


class InputConfigError(ValueError):
    """A description is not of the form; the text names the key, what stands there, and what may."""


class Described(Protocol):
    """What `shared_dimensions` reads of an input; `InputSpec` and the handlers' `TensorSpec` have it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def same(self) -> tuple[str, ...]: ...

    @property
    def pad_to(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class InputSpec:
    """One item of an input.

    Attributes:
        dtype: as torch names it, without ``torch.``.
        shape: without the batch dimension; -1 for a free one.
        name: ``""`` if there is none.
        sizes: smallest and largest of each dimension; (1, None) for a free one of which nothing is said.
        values: smallest and largest number, both allowed; None if all that the dtype has are.
        same: per free dimension the name under which inputs share its size; empty if nothing is said.
        pad_to: sizes, rising, to which the one free dimension is filled up.
        pad_value: what it is filled up with.
    """

    dtype: str
    shape: tuple[int, ...]
    name: str = ""
    sizes: tuple[Sizes, ...] = ()
    values: tuple[float, float] | None = None
    same: tuple[str, ...] = ()
    pad_to: tuple[int, ...] = ()
    pad_value: float = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", self.sizes or sizes_of_shape(self.shape, self.pad_to))


def sizes_of_shape(shape: tuple[int, ...], pad_to: tuple[int, ...] = ()) -> tuple[Sizes, ...]:
    """Of a shape without ranges: what is padded ends at the largest size, and any other free dimension nowhere."""
    largest = pad_to[-1] if pad_to else None
    return tuple((1, largest) if size == -1 else (size, size) for size in shape)


def read_inputs(value: Any, label: str) -> list[InputSpec]:
    """All inputs: one description, or a list of them with a name each.

    Args:
        value: what stands under ``input``.
        label: what to call it in messages.

    Raises:
        InputConfigError: it is not of the form, or its inputs contradict each other.
    """
    if not isinstance(value, list):
        return _narrowed([read_input(value, label)], label)
    if not value:
        raise InputConfigError(f"{label} is an empty list; describe one input, {_FORM}, or several with a name each")
    inputs = [read_input(each, f"{label}[{index}]") for index, each in enumerate(value)]
    names = {each.name for each in inputs}
    if len(inputs) > 1 and (len(names) < len(inputs) or "" in names):
        raise InputConfigError(f"{label} lists several inputs; give each a name of its own")
    return _narrowed(inputs, label)


def shared_dimensions(inputs: Sequence[Described]) -> dict[str, list[tuple[int, int]]]:
    """Which dimensions have one size in every request: name -> places, each an input's index and a dimension's.

    Of a mask that was forgotten to be filled up with its text nobody could tell the numbers that are missing, so
    inputs that are padded share their free dimension unless ``same`` gives them different names. Its name is ``""``.
    """
    names_by_input = [each.same or ("",) * bool(each.pad_to) for each in inputs]
    places: dict[str, list[tuple[int, int]]] = {}
    for index, (each, names) in enumerate(zip(inputs, names_by_input, strict=True)):
        free = [axis for axis, size in enumerate(each.shape) if size == -1]
        for name, axis in zip(names, free, strict=False):
            places.setdefault(name, []).append((index, axis))
    return {name: found for name, found in places.items() if len(found) > 1}


def _narrowed(inputs: list[InputSpec], label: str) -> list[InputSpec]:
    """``inputs``, each dimension that is shared with the sizes that all who share it allow."""
    padded = [each for each in inputs if each.pad_to]
    unpadded = next((each for each in inputs if -1 in each.shape and not (each.pad_to or each.same)), None)
    if padded and unpadded is not None:
        raise InputConfigError(
            f"{label}: {shown(unpadded.name)} has a free dimension, and {shown(padded[0].name)} is padded; give "
            f"{shown(unpadded.name)} the same pad_to, or a name of its own for its dimension, such as 'same: own'"
        )
    if any(each.same for each in padded) and not all(each.same for each in padded):
        raise InputConfigError(f"{label}: several inputs are padded, and some have 'same'; give it to all of them")
    narrowed = [list(each.sizes) for each in inputs]
    for name, places in shared_dimensions(inputs).items():
        told = f"'same: {shown(name)}'" if name else "padding"
        who = ", ".join(shown(inputs[index].name) for index in dict.fromkeys(index for index, _ in places))
        if len({inputs[index].pad_to for index, _ in places}) > 1:
            raise InputConfigError(
                f"{label}: {who} share a dimension ({told}), so they need one pad_to; if each has a size of its own, "
                "give each a different name under 'same'"
            )
        low = max(inputs[index].sizes[axis][0] for index, axis in places)
        high = min((high for index, axis in places if (high := inputs[index].sizes[axis][1])), default=None)
        if high is not None and low > high:
            raise InputConfigError(f"{label}: {who} share a dimension ({told}), but no size that all of them allow")
        for index, axis in places:
            narrowed[index][axis] = (low, high)
    return [replace(each, sizes=tuple(sizes)) for each, sizes in zip(inputs, narrowed, strict=True)]


def read_input(value: Any, label: str) -> InputSpec:
    """One input.

    Raises:
        InputConfigError: it is not of the form.
    """
    if not isinstance(value, Mapping) or "shape" not in value:
        raise InputConfigError(f"{label} has no dtype and shape: it is {shown(str(value))}; write {_FORM}")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise InputConfigError(f"{label} has an unknown key {shown(str(unknown[0]))}; it may have {known}")
    dtype = value.get("dtype", "float32")
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in DTYPES:
        raise InputConfigError(f"{label}.dtype must be one of {', '.join(DTYPES)}, not {shown(str(dtype))}")
    dtype = dtype.removeprefix("torch.")
    name = value.get("name", "")
    if not isinstance(name, str):
        raise InputConfigError(f"{label}.name must be text, not {shown(str(name))}")
    sizes = _sizes(value["shape"], label)
    shape = tuple(low if low == high else -1 for low, high in sizes)
    pad_to = _pad_to(value.get("pad_to", []), shape, sizes, label)
    if pad_to:
        sizes = tuple((low, pad_to[-1]) if size == -1 else (low, high)
                      for size, (low, high) in zip(shape, sizes, strict=True))  # fmt: skip
    if math.prod(high or low for low, high in sizes) > _ELEMENT_COUNT_MAX:
        raise InputConfigError(f"{label}.shape allows more than the {_ELEMENT_COUNT_MAX} elements of one item")
    values = _values(value, dtype, label)
    pad_value = _pad_value(value.get("pad_value", 0), dtype, values if pad_to else None, label)
    return InputSpec(dtype, shape, name, sizes, values, _same(value.get("same"), shape, label), pad_to, pad_value)


def _sizes(shape: Any, label: str) -> tuple[Sizes, ...]:
    if not isinstance(shape, list | tuple) or len(shape) > _SHAPE_SIZE_MAX:
        raise InputConfigError(
            f"{label}.shape is {shown(str(shape))}; it must be a list of at most {_SHAPE_SIZE_MAX} sizes, {_FORM}"
        )
    return tuple(_size(each, shape, label) for each in shape)


def _size(dimension: Any, shape: Any, label: str) -> Sizes:
    if type(dimension) is int and (dimension > 0 or dimension == -1):
        return (1, None) if dimension == -1 else (dimension, dimension)
    found = _RANGE.fullmatch(dimension.strip()) if isinstance(dimension, str) else None
    if found and (found[1] or found[2]):
        low, high = int(found[1] or 1), int(found[2]) if found[2] else None
        if low > 0 and (high is None or high >= low):
            return low, high
    raise InputConfigError(
        f"{label}.shape is {shown(str(list(shape)))}; each dimension must be a whole number above 0, -1 for any, or a "
        f"range such as 2..64, not {shown(str(dimension))}"
    )


def _pad_to(pad_to: Any, shape: tuple[int, ...], sizes: tuple[Sizes, ...], label: str) -> tuple[int, ...]:
    are_sizes = isinstance(pad_to, list | tuple) and all(type(size) is int and size > 0 for size in pad_to)
    if not are_sizes or len(pad_to) > _PAD_COUNT_MAX or sorted(set(pad_to)) != list(pad_to):
        raise InputConfigError(
            f"{label}.pad_to must be a list of at most {_PAD_COUNT_MAX} rising sizes such as [32, 64, 128], not "
            f"{shown(str(pad_to))}"
        )
    if not pad_to:
        return ()
    if shape.count(-1) != 1:
        raise InputConfigError(f"{label}.pad_to needs exactly one -1 or range in its shape, which is {list(shape)}")
    low, high = sizes[shape.index(-1)]
    if low > pad_to[-1] or high not in (None, pad_to[-1]):
        raise InputConfigError(
            f"{label}.pad_to ends at {pad_to[-1]}, but its shape allows {range_text((low, high))}; make them end "
            "at the same size"
        )
    return tuple(pad_to)


def _values(value: Mapping[str, Any], dtype: str, label: str) -> tuple[float, float] | None:
    vocabulary, values = value.get("vocabulary"), value.get("values")
    if vocabulary is not None:
        if values is not None:
            raise InputConfigError(f"{label} has both vocabulary and values, which say the same; keep one")
        if type(vocabulary) is not int or vocabulary < 1:
            raise InputConfigError(f"{label}.vocabulary must be a whole number above 0, not {shown(str(vocabulary))}")
        if dtype in _FLOAT_DTYPES or dtype == "bool":
            raise InputConfigError(f"{label}.vocabulary needs whole numbers, but its dtype is {dtype}; use values")
        values, key = [0, vocabulary - 1], "vocabulary"
    elif values is None:
        return None
    else:
        key = "values"
    numbers = isinstance(values, list | tuple) and len(values) == 2 and all(_is_number(each, dtype) for each in values)
    if not numbers or dtype == "bool" or values[0] > values[1]:
        raise InputConfigError(
            f"{label}.{key} must be the smallest and the largest number that {dtype} may have here, such as [0, 1], "
            f"not {shown(str(value[key]))}"
        )
    return values[0], values[1]


def _is_number(value: Any, dtype: str) -> bool:
    """Whether ``value`` is one that a tensor of ``dtype`` can hold, up to rounding."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if dtype in _FLOAT_DTYPES:
        return True
    low, high = _bounds(dtype)
    return isinstance(value, int) and low <= value <= high


def _bounds(dtype: str) -> tuple[int, int]:
    if dtype == "bool":
        return 0, 1
    bits = int(dtype.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _pad_value(value: Any, dtype: str, values: tuple[float, float] | None, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputConfigError(f"{label}.pad_value is {shown(str(value))}, not a number")
    if not (dtype in _FLOAT_DTYPES or _is_number(value, dtype)):
        raise InputConfigError(f"{label}.pad_value is {shown(str(value))}, which {dtype} cannot hold")
    if values is not None and not values[0] <= value <= values[1]:
        raise InputConfigError(
            f"{label}.pad_value is {shown(str(value))}, but the model takes {values[0]} to {values[1]}; "
            "give one of these"
        )
    return value


def _same(same: Any, shape: tuple[int, ...], label: str) -> tuple[str, ...]:
    if same is None:
        return ()
    names = [same] if isinstance(same, str) else same
    if not isinstance(names, list | tuple) or not all(isinstance(each, str) and each for each in names):
        raise InputConfigError(f"{label}.same must be a name, or a list of names, not {shown(str(same))}")
    if len(names) != shape.count(-1):
        raise InputConfigError(
            f"{label}.same names {len(names)} dimensions, but its shape has {shape.count(-1)} free ones; name each "
            "of these, in order"
        )
    return tuple(names)


def range_text(sizes: Sizes) -> str:
    """``"64"``, ``"any"``, ``"2..64"`` or ``"2.."``: as it may stand in ``shape``."""
    low, high = sizes
    if low == high:
        return str(low)
    if high is None:
        return "any" if low == 1 else f"{low}.."
    return f"{low}..{high}"
