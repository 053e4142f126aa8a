"""The network: pictures as `image_classifier` prepares them in, one score per digit out."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitNet(nn.Module):
    """float32 [n, 3, 224, 224], normalised as ImageNet's pictures are -> scores float32 [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 32, kernel_size=3, padding=1)
        self.classifier = nn.Linear(32 * 7 * 7, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.scores(self.shrunk(pictures))

    def shrunk(self, pictures: Tensor) -> Tensor:
        """[n, 3, 224, 224] -> grey [n, 1, 14, 14]: the digits need no more, and so little is trained in seconds."""
        return nn.functional.avg_pool2d(pictures.mean(1, keepdim=True), 16)

    def scores(self, grey: Tensor) -> Tensor:
        """Grey pictures [n, 1, 14, 14] -> scores [n, 10]."""
        features = nn.functional.max_pool2d(torch.relu(self.conv1(grey)), 2)
        features = torch.relu(self.conv2(features))
        return self.classifier(torch.flatten(features, 1))
