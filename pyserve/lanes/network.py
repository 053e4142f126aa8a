"""A network that was loaded for the native lane, as that lane runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handler import Handler
from pyserve.proof.native_proof import BatchProof


@dataclass
class Network:
    """What `load_network` made.

    Attributes:
        torch_model: the network, its weights loaded once; a ``_core.TorchModel``.
        example: one item, [1, ...] per input.
        device: ``cpu`` or ``cuda:0``.
        outputs: what metadata says of its outputs, once somebody has asked.
        restored: puts the flat outputs of a compiled package back into the structure that its model returned.
        rules: what a compiled package takes, as ``_core.Lane.set_input_rules`` takes it; empty for TorchScript.
        batches: what was shown about batches; None if nothing has to be.
        findings: what was found out about it, for describe: name -> what it is.
    """

    handler: Handler
    context: Context
    torch_model: Any
    example: list[torch.Tensor]
    device: str
    outputs: list[dict[str, Any]] | None = None
    restored: Callable[[Any], Any] | None = None
    rules: list[tuple[str, torch.dtype, list[tuple[int, int, str]]]] = field(default_factory=list)
    batches: BatchProof | None = None
    findings: dict[str, Any] = field(default_factory=dict)

    def output(self, raw: Any) -> Any:
        """What the engine gave, as the model returned it."""
        return raw if self.restored is None else self.restored(raw)

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The output for tensors [n, ...] on the host, on the host. Any thread."""
        return self.run_on(self.torch_model, inputs)

    def run_on(self, torch_model: Any, inputs: Sequence[torch.Tensor]) -> Any:
        """As `run`, by another model."""
        return self.output(_on_host(torch_model.run(self.on_device(inputs))))

    def on_device(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``inputs`` where the network is."""
        return [each if self.device == "cpu" else each.to(self.device) for each in inputs]


def _on_host(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.cpu()
    if isinstance(output, dict):
        return {key: _on_host(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        parts = [_on_host(each) for each in output]
        if isinstance(output, list):
            return parts
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    return output
