"""A network that was loaded for the native lane, as that lane runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pyserve.context import Context
from pyserve.devices import CPU
from pyserve.handler import Handler
from pyserve.handlers.pixels import Normalization
from pyserve.handlers.row_check import is_built_in
from pyserve.lanes.warm_up import WarmUpItem
from pyserve.proof.comparison import ROUNDING
from pyserve.proof.native_proof import BatchProof
from pyserve.proof.probe_inputs import InputDomain


class Stoppable(Protocol):
    """What runs in a process of its own."""

    def stop(self) -> None: ...


@dataclass
class Network:
    """What `load_network` made.

    Attributes:
        torch_model: the network, its weights loaded once; a ``_core.TorchModel``.
        example: one item, [1, ...] per input.
        device: where that is: ``cpu`` or ``cuda:0``.
        devices: where its workers are to run, in turn; ``device`` is the first.
        is_bound: whether its copies have to be on the first of ``devices``; else what has no room is passed over.
        copies: the network on others of ``devices``, by their names; ``device`` is not among them.
        domains: what each input may hold.
        precision: that it runs at, such as ``fp32``.
        tolerance: what two ways to compute it may differ by, see `pyserve.proof.comparison.difference`.
        outputs: what metadata says of its outputs, once somebody has asked.
        restored: puts the flat outputs of a compiled package back into the structure that its model returned.
        rules: what a compiled package takes, as ``_core.Lane.set_input_rules`` takes it; empty for TorchScript.
        batches: what was shown about batches; None if nothing has to be.
        pixels: what the device does with the bytes that pictures come as; None where they come as numbers.
        batching: how its batches may run on an accelerator, see `pyserve.lanes.device_batching`.
        findings: what was found out about it, for describe: name -> what it is.
        warm_up: what workers run beside the example before they are ready.
        near_cpus: the CPUs that workers of a device keep to, by its name; those that are not named use all.
        making: what makes it for a backend that is named, begun before it was READY and not at its end; else None.
        in_fp32: loads its weights once more at full precision, where it runs at a lower one on a CPU.
        in_double: loads its TorchScript as torch does, to be made one of double precision; of fp32 on a CPU, else None.
        in_layout: loads its weights once more, in oneDNN's layout, where that was left for behind the first requests.
    """

    handler: Handler
    context: Context
    torch_model: Any
    example: list[torch.Tensor]
    device: str
    devices: list[str] = field(default_factory=list)
    is_bound: bool = False
    copies: dict[str, Any] = field(default_factory=dict)
    domains: list[InputDomain] = field(default_factory=list)
    precision: str = "fp32"
    tolerance: float = ROUNDING["fp32"]
    outputs: list[dict[str, Any]] | None = None
    restored: Callable[[Any], Any] | None = None
    rules: list[tuple[str, torch.dtype, list[tuple[int, int, str]]]] = field(default_factory=list)
    batches: BatchProof | None = None
    pixels: Normalization | None = None
    batching: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    warm_up: list[WarmUpItem] = field(default_factory=list)
    near_cpus: dict[str, list[int]] = field(default_factory=dict)
    making: Stoppable | None = None
    in_fp32: Callable[[], Any] | None = None
    in_double: Callable[[], Any] | None = None
    in_layout: Callable[[], Any] | None = None

    def output(self, raw: Any) -> Any:
        """What the engine gave, as the model returned it."""
        return raw if self.restored is None else self.restored(raw)

    @property
    def usual_item(self) -> list[torch.Tensor]:
        """An item as most requests bring it, [1, ...] per input: the example, as bytes if pictures come so."""
        if self.pixels is None:
            return self.example
        _, channels, height, width = self.example[0].shape
        random = torch.Generator().manual_seed(0)
        return [torch.randint(0, 256, (1, height, width, channels), dtype=torch.uint8, generator=random)]

    @property
    def finish(self) -> tuple[str, int] | None:
        """What the engine's workers do of the handler's `postprocess`; None if it does all of it.

        On a CPU the workers are what is short of time, not the event loop.
        """
        if self.device == "cpu" or self.restored is not None or not is_built_in(self.handler):
            return None
        return getattr(self.handler, "finish", None)

    def answers(self, handler: Any, completion: Any) -> Any:
        """What ``handler`` makes of a batch that came to an end, from where the engine left off."""
        finished = completion.finished
        if finished is None:
            return handler.postprocess(self.output(completion.output))
        return handler.finished(*finished) if isinstance(finished, tuple) else handler.finished(finished)

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The output for tensors [n, ...] on the host, on the host. Any thread."""
        return self.run_on(self.torch_model, inputs)

    def run_on(self, torch_model: Any, inputs: Sequence[torch.Tensor], device: str = "") -> Any:
        """As `run`, by another model, which is on ``device``; ``""``: where the network is."""
        return self.output(_on_host(torch_model.run(self.on_device(inputs, device))))

    def on_device(self, inputs: Sequence[torch.Tensor], device: str = "") -> list[torch.Tensor]:
        """``inputs`` where the network is, or on ``device``."""
        device = device or self.device
        return [each if device == CPU else each.to(device) for each in inputs]

    @property
    def models(self) -> list[Any]:
        """It and its copies, in the order of ``devices``."""
        return [self.torch_model, *(self.copies[each] for each in self.devices if each in self.copies)]

    def release(self) -> None:
        """Lets go of all weights. REQUIRES: no worker and no trial runs any more."""
        self.torch_model = self.batches = None
        self.copies.clear()
        if self.making is not None:
            self.making.stop()


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
