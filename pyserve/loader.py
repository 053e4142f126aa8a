"""From an archive to a network in the native engine: finds the handler, traces eager models, loads the weights.

Runs in a thread of its own; nothing here touches the event loop.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyserve import __version__
from pyserve.archive import Archive
from pyserve.context import Context
from pyserve.engine import load_core
from pyserve.errors import ModelLoadError
from pyserve.handler import Handler, load_handler
from pyserve.trace import (
    NeedsPythonError,
    Progress,
    Tracing,
    native_example,
    needs_tracing,
    traced_file,
    untraceable_note,
)

log = logging.getLogger(__name__)

PYTHON_SUFFIXES = (".onnx", ".so")
TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


@dataclass
class Network:
    """What `load_network` made.

    Attributes:
        torch_model: the network, its weights loaded once; a ``_core.TorchModel``.
        example: one item, [1, ...] per input.
        device: ``cpu`` or ``cuda:0``.
        outputs: what metadata says of its outputs, once somebody has asked.
    """

    handler: Handler
    context: Context
    torch_model: Any
    example: list[torch.Tensor]
    device: str
    outputs: list[dict[str, Any]] | None = None


def load_network(
    archive: Archive,
    *,
    name: str,
    handler_name: str | None,
    device: str,
    batch_size: int,
    cpu_budget: int,
    limit_max_image_pixels: bool,
    startup_timeout_s: float,
    progress: Progress,
    tracing: Tracing | None = None,
) -> Network:
    """Loads the network of ``archive`` onto ``device``.

    Args:
        tracing: a conversion of this archive that was started already.

    Raises:
        ServeError: of any kind; the text names what is wrong with the archive and how to mend it.
    """
    handler = load_handler(archive, handler_name)
    context = Context(
        name,
        str(archive.model_dir),
        archive.manifest.raw,
        batch_size,
        torch.device(device).index,
        __version__,
        limit_max_image_pixels,
        model_yaml_config=archive.config.raw,
    )
    handler.prepare(context)
    handler.device = torch.device("cpu")  # the engine brings inputs to the model's device and outputs back
    example = list(native_example(handler, context))
    torch_model = _load_weights(
        archive,
        example,
        device,
        package_runners_max=cpu_budget,
        timeout_s=startup_timeout_s,
        progress=progress,
        tracing=tracing,
    )
    if archive.config.precision not in (None, "fp32"):
        log.info("%s: largest difference of %s to fp32 on the example input: %.2e",
                 name, archive.config.precision, torch_model.precision_error)  # fmt: skip
    return Network(handler, context, torch_model, example, device)


def _load_weights(
    archive: Archive,
    example: list[torch.Tensor],
    device: str,
    *,
    package_runners_max: int,
    timeout_s: float,
    progress: Progress,
    tracing: Tracing | None,
) -> Any:
    weights = archive.weights
    options = {
        "device": device,
        "precision": archive.config.precision or "fp32",
        "channels_last": archive.config.memory_format == "channels_last",
    }
    if archive.manifest.model_file is not None:
        if untraceable_note(archive).exists():
            raise NeedsPythonError(untraceable_note(archive).read_text())
        if needs_tracing(archive):
            (tracing or Tracing(archive)).wait(progress, timeout_s)
        progress("loading the TorchScript")
        return _load(archive.name, traced_file(archive), example, options)
    if weights is None:
        raise ModelLoadError(
            f"{archive.name} has neither --serialized-file nor --model-file, so there is no model in it; repack it"
        )
    progress(f"reading {weights.name} ({weights.size / 1e6:.0f} MB)")
    if weights.suffix == ".pt2":
        return _load(archive.name, weights.as_file(), example,
                     {**options, "is_package": True, "package_runners_max": package_runners_max})  # fmt: skip
    if weights.suffix in PYTHON_SUFFIXES:
        raise NeedsPythonError(f"{weights.name} is loaded by libraries that are called from Python")
    if weights.suffix not in TORCHSCRIPT_SUFFIXES:
        raise ModelLoadError(
            f"{archive.name}: {weights.name} is neither TorchScript ({', '.join(TORCHSCRIPT_SUFFIXES)}) nor a .pt2 "
            "package; export the model to one of these, or pack its --model-file too"
        )
    with weights.pinned() as descriptor:
        # Opened again through the descriptor: the archive may have been replaced under its name meanwhile.
        return _load(archive.name, Path(f"/proc/self/fd/{descriptor}"), example,
                     {**options, "offset": weights.offset, "size": weights.size})  # fmt: skip


def _load(label: str, path: Path, example: list[torch.Tensor], options: dict[str, Any]) -> Any:
    try:
        return load_core().TorchModel.load(str(path), example, **options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = ""
        if "constants.pkl" in reason[0] or "PytorchStreamReader" in reason[0]:
            hint = (
                ". It looks like a state dict or a damaged file: pack a TorchScript file (torch.jit.save), or pack "
                "the model's class too with --model-file"
            )
        raise ModelLoadError(f"{label}: its weights cannot be loaded: {reason[0]}{hint}") from error
