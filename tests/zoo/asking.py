"""One item to a request, one answer to what the class would have answered."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from .case import Case, Item
from .judging import tensors
from .reference import Refused

RAW, JSON = "application/octet-stream", "application/json"

LARGE = 1000  # numbers; as text they take longer than the model


class Strange(Exception):
    """An answer 200 that is not of the form the model's output has."""


def forms(case: Case, item: Item, right: Any) -> list[str]:
    """The content types in which this item can be asked."""
    free = sum(not isinstance(size, int) or size == -1 for entry in case.inputs for size in entry["shape"])
    raw = [RAW] if free == 0 or (free == 1 and len(case.inputs) == 1) else []
    has_odd = any(each.is_floating_point() and not bool(each.isfinite().all()) for each in item)
    if not isinstance(right, Refused) and not _is_raw(right):
        raw = []
    is_large = sum(each.numel() for each in item) > LARGE
    return raw + ([] if has_odd or (raw and is_large) else [JSON])


def _is_raw(output: Any) -> bool:
    """Whether raw bytes can say all of an output: tensors, or tensors with names."""
    if isinstance(output, torch.Tensor):
        return True
    parts = list(output.values()) if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else []
    return bool(parts) and all(isinstance(each, torch.Tensor) for each in parts)


def body(case: Case, item: Item, form: str) -> bytes:
    if form == RAW:
        return b"".join(each.contiguous().view(torch.uint8).numpy().tobytes() for each in item)
    values = [each[0].tolist() for each in item]
    if len(values) == 1:
        return json.dumps(values[0]).encode()
    return json.dumps({entry["name"]: value for entry, value in zip(case.inputs, values, strict=True)}).encode()


def decoded(answer_body: bytes, headers: dict[str, str], right: Any) -> Any:
    """The answer's output, nested like ``right`` and with its dtypes. Raises Strange."""
    if headers.get("content-type", "").startswith(JSON):
        return _from_json(json.loads(answer_body), right)
    flat = _from_raw(answer_body, headers)
    names = headers.get("x-tensor-name")
    if isinstance(right, dict):
        if names is None:
            raise Strange("an answer without the outputs' names")
        return dict(zip(names.split(","), flat, strict=True))
    return flat if isinstance(right, (list, tuple)) else flat[0] if len(flat) == 1 else flat


def _from_raw(answer_body: bytes, headers: dict[str, str]) -> list[torch.Tensor]:
    if "x-tensor-dtype" not in headers:
        raise Strange(f"raw bytes without their dtype: {headers}")
    dtypes, shapes = headers["x-tensor-dtype"].split(","), headers["x-tensor-shape"].split(";")
    found, at = [], 0
    for name, text in zip(dtypes, shapes, strict=True):
        dtype, shape = getattr(torch, name), [1, *(int(size) for size in text.split(",") if size)]
        size = math.prod(shape) * dtype.itemsize
        part = bytearray(answer_body[at : at + size])
        at += size
        found.append(torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape, dtype=dtype))
    if at != len(answer_body):
        raise Strange(f"{len(answer_body)} bytes, {at} of them announced")
    return found


def _from_json(value: Any, right: Any) -> Any:
    if isinstance(right, torch.Tensor):
        return _tensor_from_json(value, right)
    if isinstance(right, dict):
        if not isinstance(value, dict) or sorted(value) != sorted(map(str, right)):
            raise Strange(f"no object with {list(right)}: {str(value)[:80]}")
        return {str(key): _from_json(value[str(key)], each) for key, each in right.items()}
    if isinstance(right, (list, tuple)):
        if isinstance(value, dict):  # names of a named tuple
            value = list(value.values())
        if not isinstance(value, list) or len(value) != len(right):
            raise Strange(f"no list of {len(right)}: {str(value)[:80]}")
        return [_from_json(each, part) for each, part in zip(value, right, strict=True)]
    return value


def _tensor_from_json(value: Any, right: torch.Tensor) -> torch.Tensor:
    """JSON has no NaN and no infinity; null stands for each."""
    flat, depth = [value], 0
    while flat and isinstance(flat[0], list):
        flat, depth = [each for part in flat for each in part], depth + 1
    wanted = right[0].flatten().tolist()
    if depth != right.dim() - 1 or len(flat) != len(wanted):
        raise Strange(f"no list like {list(right.shape[1:])}: {str(value)[:80]}")
    numbers = [
        w if g is None and isinstance(w, float) and not math.isfinite(w) else g
        for g, w in zip(flat, wanted, strict=True)
    ]
    if not right.is_floating_point() and any(
        type(number) is not type(w) for number, w in zip(numbers, wanted, strict=True)
    ):
        raise Strange(f"not {right.dtype}: {str(value)[:80]}")
    try:
        return torch.tensor(numbers, dtype=right.dtype).view(right.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Strange(f"no numbers: {str(value)[:80]}") from error


def shown(output: Any) -> str:
    """A few numbers of an output, for a failure's text."""
    parts = [f"{list(each.shape)} {[round(x, 6) for x in each.flatten()[:4].tolist()]}" for each in tensors(output)]
    return "; ".join(parts[:3]) or repr(output)[:100]
