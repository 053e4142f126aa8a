"""What a client sends for a prediction, and what it makes of the answer: arrays of numpy and torch as binary tensors of
the Open Inference Protocol, everything else as JSON or as it is. No I/O; imports neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor
    Answer = Array | dict[str, Array] | Any

JSON_SIZE_HEADER = "Inference-Header-Content-Length"
_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32",
    "float64": "FP64",
}  # fmt: skip
_DTYPES = {datatype: dtype for dtype, datatype in _DATATYPES.items()}


class AnswerError(Exception):
    """The server answered with an error.

    Attributes:
        status: of HTTP.
        message: what the server says, in one line.
        detail: what it adds, such as the place in a handler; empty if nothing.
    """

    def __init__(self, status: int, message: str, detail: Mapping[str, Any] | None = None):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.detail = dict(detail or {})


class Call(NamedTuple):
    """A request for a prediction: where it goes, and what is sent."""

    path: str
    body: bytes
    headers: dict[str, str]


def plain_call(model: str, inputs: Any, version: str | None) -> Call:
    """For a file as a `pathlib.Path`, for bytes, or for what fits JSON. Reads the file."""
    headers = {}
    if isinstance(inputs, Path):
        body = inputs.read_bytes()
        kind = {".json": "application/json", ".txt": "text/plain"}.get(inputs.suffix.lower())
        headers = {"Content-Type": kind} if kind else {}
    elif isinstance(inputs, bytes | bytearray | memoryview):
        body = bytes(inputs)
    else:
        body, headers = json.dumps(inputs, default=_as_json).encode(), {"Content-Type": "application/json"}
    path = f"/predictions/{quoted(model)}" + (f"/{quoted(version)}" if version else "")
    return Call(path, body, headers)


def tensor_path(model: str, version: str | None) -> str:
    """Where a model's inputs are described."""
    return f"/v2/models/{quoted(model)}" + (f"/versions/{quoted(version)}" if version else "")


def tensor_call(path: str, named: Mapping[str, Any], outputs: Sequence[str]) -> Call:
    """For arrays by name.

    Args:
        path: see `tensor_path`.
        outputs: those that are wanted; by default all.

    Raises:
        TypeError: an array has a dtype that the protocol has not.
    """
    head, tail = _encoded(named, outputs)
    headers = {JSON_SIZE_HEADER: str(len(head)), "Content-Type": "application/octet-stream"}
    return Call(f"{path}/infer", head + tail, headers)


def tensor_answer(body: bytes, json_size: str, named: Mapping[str, Any]) -> Answer:
    """The arrays of an answer, of the library of those that were sent; the only one by itself."""
    found = _decoded(body, json_size, any(_is_torch(each) for each in named.values()))
    return next(iter(found.values())) if len(found) == 1 else found


def input_names(description: bytes, count: int) -> list[str]:
    """The names of the inputs that a model's description has, or ``count`` made ones."""
    told = json.loads(description).get("inputs", [])
    return [str(each["name"]) for each in told] or [f"input{number}" for number in range(count)]


def by_name(path: str, names: Sequence[str], arrays: Sequence[Any]) -> dict[str, Any]:
    """ValueError if there are not as many arrays as names."""
    if len(names) != len(arrays):
        raise ValueError(f"{path.rpartition('/')[2]} has the inputs {', '.join(names)}, and {len(arrays)} are given")
    return dict(zip(names, arrays, strict=True))


def quoted(text: str) -> str:
    return quote(text, safe="")


def answer_error(status: int, reason: str, content: bytes) -> AnswerError:
    """The error that an answer with such a status and body is."""
    with contextlib.suppress(ValueError):
        told = json.loads(content)
        if isinstance(told, dict):
            message = told.get("message") or told.get("error") or reason
            detail = told.get("detail")
            return told_error(status, str(message), detail if isinstance(detail, dict) else {})
    return AnswerError(status, reason)


def told_error(status: int, message: str, detail: Mapping[str, Any]) -> AnswerError:
    """With what helps most of ``detail`` in its text."""
    more = "; ".join(str(detail[key]) for key in ("text", "where", "fix") if detail.get(key))
    return AnswerError(status, f"{message} ({more})" if more else message, detail)


def json_or_bytes(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


# --- arrays ---------------------------------------------------------------------------------------------------------


def _is_torch(value: Any) -> bool:
    """Of subclasses too, such as those of torchvision."""
    return any(each.__name__ == "Tensor" and each.__module__.startswith("torch") for each in type(value).__mro__)


def _is_array(value: Any) -> bool:
    return _is_torch(value) or (hasattr(value, "__array_interface__") and hasattr(value, "dtype"))


def _as_json(value: Any) -> Any:
    """Arrays and numbers of numpy and torch amid what else fits JSON."""
    if _is_array(value):
        return value.tolist()
    raise TypeError(
        f"{type(value).__name__} is neither an array nor does it fit JSON; send arrays, bytes, a pathlib.Path, or "
        "lists, dicts, numbers and texts"
    )


def arrays_in(inputs: Any) -> list[Any] | dict[str, Any] | None:
    """The arrays in ``inputs``; None if there are none. Numbers of numpy, which `list(array)` is of, are numbers."""
    if _is_array(inputs):
        return [inputs]
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if (
        not isinstance(values, list | tuple)
        or not all(map(_is_array, values))
        or not any(each.shape for each in values)
    ):
        return None
    return dict(inputs) if isinstance(inputs, Mapping) else list(values)


def _encoded(named: Mapping[str, Any], outputs: Sequence[str]) -> tuple[bytes, bytes]:
    """The JSON of a request, and the bytes of its tensors."""
    entries, parts = [], []
    for name, array in named.items():
        dtype, shape, raw = _raw(array)
        if dtype not in _DATATYPES:
            raise TypeError(f"input {name!r} has dtype {dtype}; give one of {', '.join(_DATATYPES)}")
        entries.append({"name": name, "shape": shape, "datatype": _DATATYPES[dtype],
                        "parameters": {"binary_data_size": len(raw)}})  # fmt: skip
        parts.append(raw)
    head: dict[str, Any] = {"inputs": entries, "parameters": {"binary_data_output": True}}
    if outputs:
        head["outputs"] = [{"name": name} for name in outputs]
    return json.dumps(head).encode(), b"".join(parts)


def _raw(array: Any) -> tuple[str, list[int], bytes]:
    if _is_torch(array):
        dtype, shape = str(array.dtype).removeprefix("torch."), list(array.shape)
        if str(array.layout) != "torch.strided" or array.is_meta or array.is_quantized:
            kind = "quantized" if array.is_quantized else array.device if array.is_meta else array.layout
            raise TypeError(f"a tensor that is {kind} has no plain numbers to send; make an ordinary one of it first")
        array = array.detach().cpu().contiguous()
        if dtype == "bfloat16":  # which numpy has not
            import torch

            array = array.view(torch.int16)
        return dtype, shape, array.numpy().tobytes()
    if hasattr(array, "filled"):
        raise TypeError("a masked array has no numbers where it is masked; send array.filled(...)")
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return str(array.dtype.name), list(array.shape), little.tobytes()


def _decoded(body: bytes, json_size: str, is_torch: bool) -> dict[str, Any]:
    size = int(json_size) if json_size else len(body)
    at = size
    found = {}
    for output in json.loads(body[:size])["outputs"]:
        count = output.get("parameters", {}).get("binary_data_size")
        if count is None:  # text: the protocol has no dtype of numpy for it
            found[output["name"]] = output["data"]
            continue
        raw, at = body[at : at + count], at + count
        found[output["name"]] = _array(output["datatype"], output["shape"], raw, is_torch)
    return found


def _array(datatype: str, shape: list[int], raw: bytes, is_torch: bool) -> Any:
    dtype = _DTYPES.get(datatype)
    if dtype is None:  # BYTES
        return raw
    if is_torch or dtype == "bfloat16":
        import torch

        kind = getattr(torch, dtype)
        return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape) if raw else torch.empty(shape, dtype=kind)
    import numpy as np

    little = np.frombuffer(bytearray(raw), dtype=np.dtype(dtype).newbyteorder("<"))
    return little.astype(dtype, copy=False).reshape(shape)
