"""Networks and lanes for tests of the way of a batch: each answer depends on its own input and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tests.support.lane_bench import LaneBench


class Wide(nn.Module):
    """Several operators in a row. [n, 64] -> [n, 64]"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)))) + x


class Doubled(nn.Module):
    """Of any shape, by several operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * 2 - 2


def saved(network: nn.Module, folder: Path) -> Path:
    path = folder / f"{type(network).__name__}.pt"
    torch.jit.script(network.eval()).save(str(path))
    return path


def items(count: int, *shape: int, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *(shape or (64,)), generator=generator) for _ in range(count)]


def wrong(lane: LaneBench, network: nn.Module, xs: Sequence[torch.Tensor], first: int = 0) -> list[int]:
    """Which answers are not what the network gives for that item alone."""
    out = []
    with torch.inference_mode():
        for i, x in enumerate(xs, start=first):
            answer = lane.answers[i]
            if isinstance(answer, str) or not torch.allclose(answer, network(x)[0], atol=1e-4):
                out.append(i)
    return out


def ask(lane: LaneBench, network: nn.Module, xs: Sequence[torch.Tensor], *, wave: int = 0) -> list[int]:
    """Submits all, in waves if asked to; returns which answers are wrong."""
    for i, x in enumerate(xs):
        lane.submit(i, x)
        if wave and i % wave == wave - 1:
            lane.wait_for(i + 1)
    lane.wait_for(len(xs))
    return wrong(lane, network, xs)


def keep_busy(lane: LaneBench, xs: Sequence[torch.Tensor], clients: int) -> None:
    """As many clients as that, each of whom asks again when it has its answer."""
    sent = 0

    def send() -> bool:
        nonlocal sent
        while sent < len(xs) and sent - len(lane.answers) < clients:
            lane.submit(sent, xs[sent])
            sent += 1
        return len(lane.answers) == len(xs)

    lane.wait(send)
