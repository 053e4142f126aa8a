"""The archives that the steps with a server serve; written here, nothing is brought along."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bench.gpu_steps.closed_loop import saved_file
from bench.gpu_steps.networks import Network, saved
from pyserve.archive.packing import ArchiverConfig, write_archive


def pack(folder: Path, name: str, config: str, *, handler: str, model: Path | None = None) -> Path:
    """An archive with ``config`` as its model-config.yaml."""
    path = folder / f"{name}.yaml"
    path.write_text(config)
    return write_archive(ArchiverConfig(
        model_name=name, version="1.0", handler=handler, serialized_file=None if model is None else str(model),
        config_file=str(path), export_path=str(folder), force=True,
    ))  # fmt: skip


def settings_of(network: Network, precision: str, batch: int) -> str:
    """Its model-config.yaml but for the input."""
    text = f"deviceType: gpu\nbatchSize: {batch}\nmaxBatchDelay: 0\nminWorkers: 1\nmaxWorkers: 1\n"
    if precision != "fp32":
        text += f"precision: {precision}\n"
    return text + ("memoryFormat: channels_last\n" if network.is_picture else "")


def tensors(folder: Path, network: Network, precision: str, batch: int) -> Path:
    """Raw numbers in and out."""
    model = saved_file(folder, network, saved(network))
    kind = str(network.dtype).removeprefix("torch.")
    text = f"input: {{dtype: {kind}, shape: {list(network.item_shape)}}}\n"
    return pack(folder, network.name, settings_of(network, precision, batch) + text, handler="tensor", model=model)


def pictures(folder: Path, network: Network, precision: str, batch: int, *, on_device: bool = False) -> Path:
    """JPEG in, the five most probable classes out; ``on_device``: decoded there too."""
    model = saved_file(folder, network, saved(network))
    text = settings_of(network, precision, batch) + ("jpegDecoder: torchvision\n" if on_device else "")
    return pack(folder, "decoded" if on_device else "pictures", text, handler="image_classifier", model=model)


class Square(nn.Module):
    """float [n, length] -> float [n, 1]; needs memory for n times the square of the length."""

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers.unsqueeze(1) * numbers.unsqueeze(2)).amax((1, 2)).unsqueeze(1)


class Words(nn.Module):
    """int64 [n, 4] -> float [n, 8]. A number that is no word is an error on a CPU, and breaks a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids).sum(1)


def scripted(folder: Path, name: str, module: nn.Module) -> Path:
    """TorchScript of a module, compiled from its code."""
    path = folder / f"{name}.pt"
    torch.jit.save(torch.jit.script(module.eval()), str(path))
    return path


OWN_HANDLER = '''import torch


class Handler:
    """Adds one on the device that the server gives it; has a context of it therefore."""

    def initialize(self, context):
        self.kind = torch.accelerator.current_accelerator().type
        self.device = torch.device(self.kind, int(context.system_properties.get("gpu_id") or 0))
        self.one = torch.ones(1, device=self.device)

    def handle(self, data, context):
        numbers = torch.tensor([float(bytes(row.get("body") or row.get("data"))) for row in data])
        return [float(each) for each in (numbers.to(self.device) + self.one).cpu()]
'''


def own_handler(folder: Path) -> Path:
    """A handler of the python lane that uses the device itself."""
    code = folder / "own_handler.py"
    code.write_text(OWN_HANDLER)
    config = "deviceType: gpu\nbatchSize: 1\nminWorkers: 1\nmaxWorkers: 1\n"
    return pack(folder, "own", config, handler=str(code))
