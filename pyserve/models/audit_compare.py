"""How far two answers to one request are apart: what a client was sent, and what the audit got for the same request."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyserve.proof.comparison import difference
from pyserve.request.datatypes import BYTES, dtype_of
from pyserve.request.messages import Response

# The size of the JSON before binary outputs, in answers of the Open Inference Protocol.
_JSON_SIZE_HEADER = "inference-header-content-length"


@dataclass(frozen=True)
class KeptAnswer:
    """A copy of an answer.

    Attributes:
        headers: of the handler, names in lower case.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, response: Response) -> KeptAnswer:
        """Copies what may lie in memory that is used again."""
        headers = {name.lower(): value for name, value in response.headers.items()}
        return cls(response.status, headers, b"".join([bytes(response.body), *map(bytes, response.tail)]))


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        difference: as of `comparison.difference`; 0.0 for equal answers, infinity where numbers cannot be compared.
        text: what differs, in a few words.
    """

    difference: float
    text: str


def compare(live: KeptAnswer, alone: KeptAnswer, read: Callable[[bytes], Any] | None = None) -> Verdict:
    """How far ``live`` is from ``alone``, which is taken to be right.

    Tensors (by their ``x-tensor-*`` headers, or of the Open Inference Protocol) and JSON are compared as numbers;
    anything else byte by byte. Any thread.

    Args:
        read: the outputs in a body, of a protocol that is not known here.
    """
    if live.status != alone.status:
        return Verdict(math.inf, f"the answer was {live.status}, alone it is {alone.status}")
    if live.body == alone.body and _tensor_headers(live) == _tensor_headers(alone):
        return Verdict(0.0, "")
    kind = _kind(alone)
    if _kind(live) != kind:
        return Verdict(math.inf, f"the answer was {_kind(live)}, alone it is {kind}")
    try:
        if read is not None and alone.status < 400:
            kind = "outputs"
            found = _apart(read(alone.body), read(live.body))
        else:
            found = _apart(_READERS[kind](alone), _READERS[kind](live))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError):
        return Verdict(math.inf, "bytes that are no numbers")
    if math.isinf(found):
        return Verdict(found, f"{kind} with other shapes, names, texts, whole numbers or places of NaN")
    return Verdict(found, f"the numbers of {kind}")


def _kind(answer: KeptAnswer) -> str:
    if "x-tensor-dtype" in answer.headers:
        return "tensors"
    return "binary outputs" if _JSON_SIZE_HEADER in answer.headers else "JSON"


def _tensor_headers(answer: KeptAnswer) -> list[tuple[str, str]]:
    return sorted(pair for pair in answer.headers.items() if pair[0].startswith("x-tensor-"))


def _read_tensors(answer: KeptAnswer) -> Any:
    """By name if they have names, else in order."""
    dtypes = [getattr(torch, name) for name in answer.headers["x-tensor-dtype"].split(",")]
    shapes = [[int(size) for size in shape.split(",") if size] for shape in answer.headers["x-tensor-shape"].split(";")]
    tensors, at = [], 0
    for dtype, shape in zip(dtypes, shapes, strict=True):
        size = dtype.itemsize * math.prod(shape)
        tensors.append(_tensor(answer.body[at : at + size], dtype, shape))
        at += size
    if at != len(answer.body):
        raise ValueError("the body is not as long as its tensors")
    names = answer.headers.get("x-tensor-name")
    return tensors if names is None else dict(zip(names.split(","), tensors, strict=True))


def _read_binary(answer: KeptAnswer) -> Any:
    size = int(answer.headers[_JSON_SIZE_HEADER])
    return _outputs(json.loads(answer.body[:size]), answer.body[size:])


def _read_json(answer: KeptAnswer) -> Any:
    value = json.loads(answer.body)
    if isinstance(value, dict) and "model_name" in value and isinstance(value.get("outputs"), list):
        return _outputs(value, b"")
    return value


def _outputs(told: Any, binary: bytes) -> list[Any]:
    """Shape and data of each output of the protocol. Names and widths of numbers may be those of another lane."""
    outputs, at = [], 0
    for entry in told["outputs"]:
        data = entry.get("data")
        size = (entry.get("parameters") or {}).get("binary_data_size")
        if size is not None:
            data = binary[at : at + size]
            at += size
            if entry["datatype"] != BYTES:
                data = _tensor(data, dtype_of(entry["datatype"]), entry["shape"])
        outputs.append([entry["shape"], data])
    return outputs


def _tensor(raw: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _apart(expected: Any, got: Any) -> float:
    """`difference`, but for objects of scores."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if _are_scores(expected) and _are_scores(got):
            return _scores_apart(expected, got)
        if expected.keys() != got.keys():
            return math.inf
        return max((_apart(value, got[key]) for key, value in expected.items()), default=0.0)
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got) and _holds_objects(expected):
        return max((_apart(*pair) for pair in zip(expected, got, strict=True)), default=0.0)
    return difference(expected, got)


def _holds_objects(values: Any) -> bool:
    while isinstance(values, list) and values:
        values = values[0]
    return isinstance(values, dict)


def _are_scores(value: dict[str, Any]) -> bool:
    return len(value) > 1 and all(isinstance(each, float) for each in value.values())


def _scores_apart(expected: dict[str, float], got: dict[str, float]) -> float:
    """Of the best few of many: each is as exact as the largest allows, and the last ones may have changed places.

    A score that is missing is at most the lowest that is there, and may be that.
    """
    if len(expected) != len(got) or not expected.keys() & got.keys():
        return math.inf
    names = sorted(expected.keys() | got.keys())
    lowest = min(expected.values()), min(got.values())
    left = [expected[name] if name in expected else min(lowest[0], got[name]) for name in names]
    right = [got[name] if name in got else min(lowest[1], expected[name]) for name in names]
    return difference(left, right)


_READERS = {"tensors": _read_tensors, "binary outputs": _read_binary, "JSON": _read_json}
