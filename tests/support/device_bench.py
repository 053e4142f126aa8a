"""A native lane on an accelerator, its answers compared with the same network on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.lane_bench import LaneBench

TOLERANCE = 1e-4


def saved(network: nn.Module, folder: Path, *, example: torch.Tensor | None = None) -> Path:
    """``network`` as TorchScript: scripted, or traced on the CPU with ``example``."""
    path = folder / f"{type(network).__name__}.pt"
    network = network.eval()
    with torch.no_grad():
        made = torch.jit.script(network) if example is None else torch.jit.trace(network, example, check_trace=False)
    torch.jit.save(made, str(path))
    return path


def numbers(count: int, *shape: int, seed: int = 3) -> list[torch.Tensor]:
    """Items [1, *shape] that differ in every number."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *shape, generator=generator) for _ in range(count)]


class DeviceBench(LaneBench):
    """A lane whose workers run batches as an accelerator does.

    Args:
        batching: what ``Lane.set_batching`` is given.
    """

    def __init__(
        self, path: Path, example: Sequence[torch.Tensor], *, device: str, workers: int = 1,
        batching: dict[str, Any] | None = None, ready: bool = True, **options: Any,
    ):  # fmt: skip
        super().__init__(path, example, device=device, workers=0, ready=False, **options)
        self.lane.set_batching(**(batching or {}))
        self.lane.set_workers(workers)
        if ready:
            self.wait(lambda: all(state in ("ready", "failed") for state in self.states()))
            assert self.states() == ["ready"] * workers, self.lane.workers()

    def ask(self, items: Sequence[torch.Tensor], *, wave: int = 0) -> None:
        """Submits all and waits; at most ``wave`` at a time, or all at once."""
        self.answers.clear()
        for start in range(0, len(items), wave or len(items)):
            part = items[start : start + (wave or len(items))]
            for place, item in enumerate(part):
                self.submit(start + place, item)
            self.wait_for(start + len(part))

    def ask_batch(self, items: Sequence[torch.Tensor]) -> None:
        """Submits them so that they become one batch."""
        self.answers.clear()
        for owner, item in enumerate(items):
            self.lane.submit(owner, item, 0, 1 << 62, False)
        self.lane.announce()
        self.wait_for(len(items))

    def wrong(self, network: nn.Module, items: Sequence[torch.Tensor]) -> list[int]:
        """Which of the answers to ``items`` are not what ``network`` gives for that item alone, on the CPU."""
        with torch.inference_mode():
            expected = [network(item.clone())[0] for item in items]
        return [
            owner
            for owner, answer in enumerate(expected)
            if not isinstance(self.answers[owner], torch.Tensor)
            or not torch.allclose(self.answers[owner].float(), answer.float(), atol=TOLERANCE, rtol=TOLERANCE)
        ]
