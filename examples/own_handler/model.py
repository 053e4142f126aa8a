"""The network: four measures of an iris in, one score per species out."""

from __future__ import annotations

from torch import Tensor, nn


class IrisNet(nn.Module):
    """float32 [n, 4], centimetres -> scores float32 [n, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, measures: Tensor) -> Tensor:
        return self.layers(measures)
