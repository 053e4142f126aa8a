"""Requests of random models in every form that can say them, and judging what came back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from tests.support.random_comparison import differs, leaves_of
from tests.support.random_models import Item, RandomModel
from tests.support.serving import JSON, RAW, Answer, Client

# What a client must not see.
UNREADABLE = re.compile(r"Traceback|frame #\d|\b0x[0-9a-f]{6,}|\.(cpp|h):\d|weights_only|/tmp/|most recent call")
DATATYPES = {
    torch.float32: "FP32", torch.float64: "FP64", torch.float16: "FP16", torch.int64: "INT64", torch.int32: "INT32",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DATATYPES.items()}


def forms_of(model: RandomModel, item: Item) -> list[str]:
    """In which of ``json``, ``raw``, ``v2`` and ``binary`` (version 2 with binary tensors) the item can be said."""
    forms = []
    is_finite = all(bool(each.isfinite().all()) for each in item.inputs)
    if is_finite:
        forms.append("json")
    free = sum(len(one.free) for one in model.inputs)
    if free == 0 or (free == 1 and len(model.inputs) == 1):
        forms.append("raw")
    # What the protocol calls an output that is no tensor is not ours to guess.
    leaves = leaves_of(item.expected)
    if item.expected is None or all(isinstance(each, torch.Tensor) for each in leaves):
        forms += ["v2", "binary"] if is_finite else ["binary"]
    return forms


def ask(client: Client, name: str, model: RandomModel, item: Item, form: str) -> Answer:
    if form in ("v2", "binary"):
        return ask_rows(client, name, model, [item], is_binary=form == "binary")
    timed = {"x-server-timing": "1"}
    if form == "raw":
        body = b"".join(_bytes(each) for each in item.inputs)
        return client.ask("POST", f"/predictions/{name}", body, {**RAW, **timed})
    rows = [each[0].tolist() for each in item.inputs]
    named = {one.name: row for one, row in zip(model.inputs, rows, strict=True)}
    value = named if len(rows) > 1 else rows[0]
    return client.ask("POST", f"/predictions/{name}", json.dumps(value).encode(), {**JSON, **timed})


def ask_rows(
    client: Client, name: str, model: RandomModel, items: Sequence[Item], *, is_binary: bool = False
) -> Answer:
    """Items of one shape as the rows of one request."""
    inputs, binary = [], b""
    for index, one in enumerate(model.inputs):
        tensor = torch.cat([item.inputs[index] for item in items])
        described: dict[str, Any] = {
            "name": one.name, "shape": list(tensor.shape), "datatype": DATATYPES[tensor.dtype],
        }  # fmt: skip
        if is_binary:
            binary += _bytes(tensor)
            described["parameters"] = {"binary_data_size": len(_bytes(tensor))}
        else:
            described["data"] = tensor.flatten().tolist()
        inputs.append(described)
    path, message = f"/v2/models/{name}/infer", {"inputs": inputs, "parameters": {"binary_data_output": is_binary}}
    text = json.dumps(message).encode()
    headers = {**RAW, "Inference-Header-Content-Length": str(len(text))} if is_binary else JSON
    return client.ask("POST", path, text + binary, headers)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().numpy().tobytes())


def batch_size_of(answer: Answer) -> int:
    """How many shared the batch; 0 if the answer does not tell."""
    found = re.search(r"batch;.*?size=(\d+)", answer.headers.get("server-timing", ""))
    return int(found[1]) if found else 0


def problem_of(model: RandomModel, item: Item, form: str, answer: Answer) -> str:
    """What is wrong with an answer of `ask`; ``""`` for a right one, and for a refusal that can be read."""
    if answer.status != 200:
        text = answer.body.decode("utf-8", "replace")
        if found := UNREADABLE.search(text):
            return f"{answer.status} shows {found[0]!r}: {text[:600]}"
        if item.offence and answer.status >= 500:
            return f"{answer.status} for the caller's mistake ({item.offence}): {text[:300]}"
        return "" if answer.status >= 400 else f"status {answer.status}"
    if item.offence:
        return f"200 for an input that its description does not allow ({item.offence})"
    if item.expected is None:
        return "200 for an input that eager raises for"
    if not item.is_answerable:
        return "200 for an output without a row per item"
    if form == "json":
        return differs(item.row, answer.json, model.tolerance, is_json=True)
    if form != "raw":
        return rows_problem_of(model, [item], answer)
    got = _raw_tensors(answer)
    return got if isinstance(got, str) else _leaves_differ(model, item, got)


def rows_problem_of(model: RandomModel, items: Sequence[Item], answer: Answer) -> str:
    """What is wrong with the answer 200 to `ask_rows` for items that can be answered."""
    got = _v2_tensors(answer)
    if isinstance(got, str):
        return got
    if any(not each.dim() or each.shape[0] != len(items) for each in got):
        return f"shapes {[list(each.shape) for each in got]} for {len(items)} rows"
    for index, item in enumerate(items):
        problem = _leaves_differ(model, item, [each[index] for each in got])
        if problem:
            return f"row {index}: {problem}"
    return ""


def _leaves_differ(model: RandomModel, item: Item, got: list[torch.Tensor]) -> str:
    return differs(leaves_of(item.row), got, model.tolerance, any_float=model.precision != "fp32")


def _raw_tensors(answer: Answer) -> list[torch.Tensor] | str:
    dtypes = [getattr(torch, each) for each in answer.headers.get("x-tensor-dtype", "").split(",") if each]
    shapes = [[int(size) for size in each.split(",") if size]
              for each in answer.headers.get("x-tensor-shape", "").split(";")]  # fmt: skip
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in zip(dtypes, shapes, strict=False)]
    if len(dtypes) != len(shapes) or sum(sizes) != len(answer.body):
        return f"{len(answer.body)} bytes for {answer.headers}"
    tensors, at = [], 0
    for dtype, shape, size in zip(dtypes, shapes, sizes, strict=True):
        part = bytearray(answer.body[at : at + size])
        tensors.append(torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape, dtype=dtype))
        at += size
    return tensors


def _v2_tensors(answer: Answer) -> list[torch.Tensor] | str:
    size = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    message, binary = json.loads(answer.body[:size]), answer.body[size:]
    tensors = []
    for each in message["outputs"]:
        dtype, shape = DTYPES[each["datatype"]], each["shape"]
        bytes_of = each.get("parameters", {}).get("binary_data_size")
        if bytes_of is None:
            values = [math.nan if value is None else value for value in leaves_of(each["data"])]
            tensors.append(torch.tensor(values, dtype=dtype).view(shape))
            continue
        part, binary = bytearray(binary[:bytes_of]), binary[bytes_of:]
        tensors.append(torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape, dtype=dtype))
    return f"{len(binary)} bytes that belong to no output" if binary else tensors
