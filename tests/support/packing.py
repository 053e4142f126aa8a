"""Real archives of tiny networks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pyserve.archive.packing import ArchiverConfig, write_archive
from tests.support.networks import save_script

EAGER = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x)
"""
TENSOR_CONFIG = "input: {dtype: float32, shape: [4]}\n"


def pack(
    folder: Path, *, name: str = "m", version: str = "1.0", network: nn.Module | None = None, model_code: str = "",
    state: dict[str, torch.Tensor] | None = None, config: str = TENSOR_CONFIG, handler: str = "tensor",
    calibration: Path | None = None,
) -> Path:  # fmt: skip
    """An archive ``name-version.mar``: ``network`` as TorchScript, or ``model_code`` with ``state`` as its weights."""
    work = folder / f".{name}-{version}"
    work.mkdir(parents=True)
    (work / "model-config.yaml").write_text(config)
    if network is not None:
        weights = save_script(network, work / "model.pt")
    else:
        (work / "model.py").write_text(model_code)
        weights = work / "weights.pth"
        torch.save(state or {}, weights)
    written = write_archive(ArchiverConfig(
        name, handler, version=version, serialized_file=str(weights), config_file=str(work / "model-config.yaml"),
        model_file=str(work / "model.py") if network is None else None, export_path=str(work),
        calibration=None if calibration is None else str(calibration),
    ))  # fmt: skip
    return written.rename(folder / f"{name}-{version}.mar")
