"""Networks as files of OpenVINO's, for the tests of what runs them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn


def library() -> str:
    """OpenVINO's C library. Skips the test where it is not installed."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or spec.origin is None:
        pytest.skip("openvino is not installed: pip install openvino nncf")
    return str(next((Path(spec.origin).parent / "libs").glob("libopenvino_c.so*")))


def save_openvino(network: nn.Module, path: Path, example: Sequence[torch.Tensor]) -> Path:
    """Writes ``network`` as ``path`` (.xml) and its .bin, for batches of any size.

    Args:
        example: one batch of two rows or more per input.
    """
    library()
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # tests call nobody
    import openvino

    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(
        network.eval(), tuple(example), dynamic_shapes=tuple({0: batch} for _ in example), strict=False
    )
    model = openvino.convert_model(exported)
    # The conversion forgets what is fixed.
    model.reshape(dict(zip(model.inputs, [[-1, *each.shape[1:]] for each in example], strict=True)))
    openvino.save_model(model, path, compress_to_fp16=False)
    return path
