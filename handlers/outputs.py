"""What a model answers for a batch -> an answer per item, whatever the model put it in.

An output is a tensor with one entry per item, or a tuple, list, dict, named tuple or dataclass of outputs. None,
numbers and texts may stand among them; there is one for the whole batch, so each item gets it.

* As JSON the nesting and all names stay: ``(x, None)`` becomes ``[..., null]``, a named tuple an object.
* As tensors, for raw answers and the Open Inference Protocol, it is flat: ``{"a": {"b": x}}`` is called ``a.b``, the
  second entry of a tuple in ``a`` is ``a.1``, those of a tuple on top ``output0``, ``output1``, ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pyserve.handler import HandlerError, InputError

ASK_JSON = "ask for JSON: POST to /predictions/ and the model's name with 'Accept: application/json'"
_DEPTH_MAX = 32

Path = tuple[str | int, ...]
ToJson = Callable[[torch.Tensor], list[Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """A part of an output that has no parts.

    Attributes:
        path: names and positions that lead to it; empty for the whole output.
        value: a tensor on the CPU, or None, a bool, a number or a text.
    """

    path: Path
    value: Any

    def called(self) -> str:
        """For messages."""
        return f"output {_dotted(self.path)!r}" if self.path else "the only output"


def leaves(output: Any) -> list[Leaf]:
    """The parts of an output, in order.

    Raises:
        HandlerError: something in it is of no kind that can be answered, or it is nested in itself.
    """
    if isinstance(output, torch.Tensor):  # most often, so without a detour
        return [Leaf((), _plain(output, ()))]
    return [Leaf(path, value) for path, value in _walk(output, ())]


def _walk(output: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    parts = _parts(output)
    if parts is None:
        yield path, _plain(output, path)
        return
    if len(path) >= _DEPTH_MAX:
        raise HandlerError(f"the model's output is nested more than {_DEPTH_MAX} levels deep; make it flatter")
    for name, part in parts:
        yield from _walk(part, (*path, name))


def _parts(output: Any) -> list[tuple[str | int, Any]] | None:
    """Names or positions with what stands there; None for what has no parts."""
    if isinstance(output, torch.Tensor):
        return None
    if isinstance(output, Mapping):
        return [(str(name), part) for name, part in output.items()]
    if isinstance(output, (tuple, list)):
        fields = getattr(output, "_fields", None)
        return list(zip(fields, output, strict=True)) if fields else list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    if isinstance(output, SimpleNamespace):
        return list(vars(output).items())
    return None


def _plain(value: Any, path: Path) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "cpu" else value.cpu()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value)
        except TypeError as error:
            called = Leaf(path, value).called()
            raise HandlerError(f"{called} is an array of {value.dtype}, which no tensor can hold") from error
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kinds = "a tensor, None, a number, a text, or a tuple, list or dict of these"
    raise HandlerError(f"{Leaf(path, value).called()} of the model is a {type(value).__name__}, not {kinds}")


def row_count(parts: list[Leaf]) -> int:
    """For how many items an output is.

    Raises:
        HandlerError: its tensors do not agree, or there is none to tell.
    """
    counts: dict[int, Leaf] = {}
    if len(parts) == 1 and isinstance(parts[0].value, torch.Tensor) and parts[0].value.dim():
        return len(parts[0].value)
    for leaf in parts:
        if not isinstance(leaf.value, torch.Tensor):
            continue
        if not leaf.value.dim():
            raise HandlerError(
                f"{leaf.called()} is a tensor of no dimensions, one number for the whole batch; every output needs one "
                "entry per item. Repeat it for each item, or answer with the number itself (.item())"
            )
        counts.setdefault(len(leaf.value), leaf)
    if len(counts) > 1:
        told = ", ".join(f"{leaf.called()} has {count}" for count, leaf in counts.items())
        raise HandlerError(f"every output of the model must have one entry per item, but {told}")
    if not counts:
        raise HandlerError("the model answered with no tensor at all, so no item's part can be identified")
    return next(iter(counts))


def json_rows(output: Any, count: int, to_json: ToJson) -> list[Any]:
    """An output for ``count`` items -> ``count`` JSON values with its nesting and its names.

    Args:
        output: one of which `leaves` and `row_count` have said that it can be answered.
        to_json: a tensor [n, ...] -> n nested lists.
    """
    parts = _parts(output)
    if parts is None:
        value = _plain(output, ())
        if isinstance(value, torch.Tensor):
            return to_json(value)
        # JSON has no word for these; tensors with them are answered alike.
        is_finite = not isinstance(value, float) or math.isfinite(value)
        return [value if is_finite else None] * count
    columns = [json_rows(part, count, to_json) for _, part in parts]
    is_list = isinstance(output, (tuple, list)) and not hasattr(output, "_fields")
    if is_list:
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in range(count)]
    names = [name for name, _ in parts]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] or [{} for _ in range(count)]


def as_tensor(leaf: Leaf, count: int) -> torch.Tensor | None:
    """A part as a tensor [count, ...]: numbers are repeated for each item; None for what no tensor can hold."""
    value = leaf.value
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool):
        return torch.full((count,), value)
    if isinstance(value, float):
        return torch.full((count,), value, dtype=torch.float64)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return torch.full((count,), value, dtype=torch.int64)
    return None


def kind_of(value: Any) -> str:
    """What an output that no tensor can hold is, for a message."""
    if value is None:
        return "None"
    return "a text" if isinstance(value, str) else "a number beyond 64 bits"


def names_of(parts: list[Leaf], configured: tuple[str, ...] = ()) -> list[str]:
    """What the parts are called where an output is flat.

    Args:
        configured: names that model-config.yaml gives: of all parts, or of those of a tuple.

    Raises:
        HandlerError: two would have the same name.
    """
    if configured and len(configured) == len(parts) and all(not leaf.path or _is_place(leaf) for leaf in parts):
        return list(configured)
    has_all = len(configured) == len({leaf.path[:1] for leaf in parts})
    names = []
    for leaf in parts:
        place = leaf.path[0] if leaf.path else 0
        first = str(place)
        if isinstance(place, int):
            first = configured[place] if has_all else f"output{place}"
        names.append(_dotted((first, *leaf.path[1:])))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HandlerError(f"two outputs of the model would be called {twice!r}; give them different names")
    return names


def _is_place(leaf: Leaf) -> bool:
    return isinstance(leaf.path[0], int)


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def named_outputs(output: Any, configured: tuple[str, ...] = ()) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    """An output as tensors [n, ...] on the CPU with their names. What is None is not among them.

    Args:
        configured: see `names_of`.

    Raises:
        HandlerError: the output is not made of tensors with one entry per item, or has no tensor.
        InputError: it is, and has a text among them, which can be asked for otherwise.
    """
    parts = leaves(output)
    count = row_count(parts)
    tensors, names = [], []
    for leaf, name in zip(parts, names_of(parts, configured), strict=True):
        if leaf.value is None:
            continue
        tensor = as_tensor(leaf, count)
        if tensor is None:
            kind = kind_of(leaf.value)
            raise InputError(f"output {name!r} is {kind}, and here an answer is made of tensors; {ASK_JSON}")
        tensors.append(tensor)
        names.append(name)
    return tensors, tuple(names)
