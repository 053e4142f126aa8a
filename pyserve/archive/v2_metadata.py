"""What one item of a model's inputs is, from what a server of the Open Inference Protocol says of the model.

    curl http://HOST/v2/models/NAME > metadata.json      # of Triton, KServe, pyserve
    {"name": "net", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 224, 224]}], ...}

A file `METADATA_NAME` in the folder or archive, or among the extra files of TorchScript.
"""

from __future__ import annotations

import json
from typing import Any

METADATA_NAME = "metadata.json"
SIZE_MAX = 1 << 20
_DTYPES = {
    "BOOL": "bool", "FP16": "float16", "BF16": "bfloat16", "FP32": "float32", "FP64": "float64",
    **{f"{sign}INT{bits}": f"{sign}int{bits}".lower() for sign in ("", "U") for bits in (8, 16, 32, 64)},
}  # fmt: skip
# A program for one item has the batch, too.
_BATCHES = (-1, 1)


def inputs_of_metadata(text: bytes) -> Any:
    """The value of ``input`` in model-config.yaml; None if the text is no metadata, or of inputs that are no tensors
    with the batch as their first dimension."""  # fmt: skip
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    inputs = said.get("inputs") if isinstance(said, dict) else None
    if not isinstance(inputs, list) or not inputs:
        return None
    described = [_described(each) for each in inputs]
    if None in described:
        return None
    return described[0] if len(described) == 1 else described


def _described(entry: Any) -> dict[str, Any] | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return None
    dtype, shape = _DTYPES.get(str(entry.get("datatype"))), entry.get("shape")
    if dtype is None or not isinstance(shape, list) or not shape or not all(type(size) is int for size in shape):
        return None
    if shape[0] not in _BATCHES:
        return None
    return {"name": entry["name"], "dtype": dtype, "shape": shape[1:]}
