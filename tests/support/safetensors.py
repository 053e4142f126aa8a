"""Writes ``.safetensors`` files, right ones and wrong ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL",
    torch.uint8: "U8", torch.float64: "F64",
}  # fmt: skip


def header_of(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The header of a file with ``state``'s tensors one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in state.items():
        size = tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, position + size],
        }  # fmt: skip
        position += size
    return header


def safetensors_bytes(state: Mapping[str, torch.Tensor], header: Any = None) -> bytes:
    """A file of ``state``; ``header`` is written in place of the right one."""
    text = json.dumps(header_of(state) if header is None else header).encode()
    text += b" " * (-len(text) % 8)
    numbers = b"".join(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in state.values())
    return len(text).to_bytes(8, "little") + text + numbers


def save_safetensors(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    path.write_bytes(safetensors_bytes(state))
    return path
