"""Traces of what a batch does, for chrome://tracing and TensorBoard, when ENABLE_TORCH_PROFILER is set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

# TorchServe's.
ENABLE_VARIABLE = "ENABLE_TORCH_PROFILER"
TRACE_FOLDER = "/tmp/pytorch_profiler"


def is_enabled() -> bool:
    """Whether batches are to be traced."""
    return os.environ.get(ENABLE_VARIABLE, "").lower() not in ("", "0", "false")


def profiler(arguments: Mapping[str, Any], model_name: str) -> torch.profiler.profile:
    """A profiler with ``arguments`` of torch.profiler.profile.

    Where they do not say so, it records the CPU, the GPU if there is one and shapes, and writes a trace for each batch
    to `TRACE_FOLDER`/``model_name``.
    """
    chosen = dict(arguments)
    if "activities" not in chosen:
        chosen["activities"] = sorted(torch.profiler.supported_activities(), key=lambda each: each.value)
    chosen.setdefault("record_shapes", True)
    if "on_trace_ready" not in chosen:
        folder = os.path.join(TRACE_FOLDER, os.path.basename(model_name) or "model")
        chosen["on_trace_ready"] = torch.profiler.tensorboard_trace_handler(folder)
    return torch.profiler.profile(**chosen)
