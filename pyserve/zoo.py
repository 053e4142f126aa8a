"""Networks to serve without fetching code from anywhere: DenseNet, ResNet, and a small one for digits.

Written from the papers. The names of parameters are torchvision's, so its published weights load unchanged;
the files it published in 2017, with the older DenseNet names, too.

    DenseNet   G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, "Densely Connected Convolutional Networks", CVPR 2017
    ResNet     K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

# Growth rate, layers per block, channels of the first convolution (Huang et al., table 1; 161 is the
# "k = 48" network of their published models).
DENSENET_CONFIGS: dict[int, tuple[int, tuple[int, int, int, int], int]] = {
    121: (32, (6, 12, 24, 16), 64),
    161: (48, (6, 12, 36, 24), 96),
    169: (32, (6, 12, 32, 32), 64),
    201: (32, (6, 12, 48, 32), 64),
}

# Basic blocks per stage (He et al., table 1).
RESNET_CONFIGS: dict[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}

# Channels of a dense layer's 1x1 bottleneck, in growth rates.
BOTTLENECK_FACTOR = 4

_OLD_DENSENET_NAME = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


class DenseLayer(nn.Module):
    """BN-ReLU-Conv1x1-BN-ReLU-Conv3x3; gives its input with ``growth_rate`` new channels behind it."""

    def __init__(self, channels: int, growth_rate: int):
        super().__init__()
        width = BOTTLENECK_FACTOR * growth_rate
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, kernel_size=3, padding=1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(features)))
        new_features = self.conv2(self.relu2(self.norm2(bottleneck)))
        return torch.cat((features, new_features), 1)


def _dense_block(layer_count: int, channels: int, growth_rate: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            (f"denselayer{i + 1}", DenseLayer(channels + i * growth_rate, growth_rate)) for i in range(layer_count)
        )
    )


def _transition(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=nn.BatchNorm2d(channels_in),
            relu=nn.ReLU(inplace=True),
            conv=nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False),
            pool=nn.AvgPool2d(kernel_size=2, stride=2),
        )
    )


class DenseNet(nn.Module):
    """DenseNet-BC: float [n, 3, height, width], both sides at least 29 -> scores [n, classes].

    Args:
        depth: 121, 161, 169 or 201.
        class_count: number of classes.
    """

    def __init__(self, depth: int = 161, class_count: int = 1000):
        super().__init__()
        if depth not in DENSENET_CONFIGS:
            raise ValueError(f"there is no DenseNet-{depth}; one of {', '.join(map(str, DENSENET_CONFIGS))}")
        growth_rate, layer_counts, channels = DENSENET_CONFIGS[depth]
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv0=nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        for number, layer_count in enumerate(layer_counts, 1):
            parts[f"denseblock{number}"] = _dense_block(layer_count, channels, growth_rate)
            channels += layer_count * growth_rate
            if number < len(layer_counts):
                parts[f"transition{number}"] = _transition(channels, channels // 2)
                channels //= 2
        parts["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, class_count)
        self.register_load_state_dict_pre_hook(_rename_old_densenet_keys)

    def forward(self, pictures: Tensor) -> Tensor:
        features = torch.relu(self.features(pictures))
        return self.classifier(torch.flatten(nn.functional.adaptive_avg_pool2d(features, (1, 1)), 1))


def _rename_old_densenet_keys(module: nn.Module, state_dict: dict[str, Any], *args: Any) -> None:
    """``denselayer1.norm.1.weight`` -> ``denselayer1.norm1.weight``, in place."""
    for key in list(state_dict):
        match = _OLD_DENSENET_NAME.match(key)
        if match:
            state_dict[match[1] + match[2]] = state_dict.pop(key)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added; a 1x1 projection where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features if self.downsample is None else self.downsample(features)
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features)))))
        return self.relu(residual + shortcut)


class ResNet(nn.Module):
    """Residual network of basic blocks: float [n, 3, height, width] -> scores [n, classes].

    Args:
        depth: 18 or 34.
        class_count: number of classes.
    """

    def __init__(self, depth: int = 18, class_count: int = 1000):
        super().__init__()
        if depth not in RESNET_CONFIGS:
            raise ValueError(f"there is no ResNet-{depth} here; one of {', '.join(map(str, RESNET_CONFIGS))}")
        counts = RESNET_CONFIGS[depth]
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(counts[0], 64, 64, stride=1)
        self.layer2 = _stage(counts[1], 64, 128, stride=2)
        self.layer3 = _stage(counts[2], 128, 256, stride=2)
        self.layer4 = _stage(counts[3], 256, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, class_count)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.maxpool(self.relu(self.bn1(self.conv1(pictures))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        return self.fc(torch.flatten(self.avgpool(features), 1))


def _stage(block_count: int, channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out, 1) for _ in range(block_count - 1)))


class DigitsNet(nn.Module):
    """A small network for 8x8 pictures of digits: float [n, 1, 8, 8] in [0, 16] -> scores [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.dense = nn.Linear(32 * 4 * 4, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        features = torch.relu(self.conv1(pictures / 16.0))
        features = nn.functional.max_pool2d(torch.relu(self.conv2(features)), 2)
        return self.classifier(torch.relu(self.dense(torch.flatten(features, 1))))


# Variance of a rectified normal variable of variance 1. He's rule has the second moment 1/2 here, which is
# right for weights that are not centred.
_RECTIFIED_VARIANCE = 0.5 - 0.5 / math.pi


def seed_weights(model: nn.Module, seed: int = 0) -> None:
    """Fill in random weights, the same ones for the same seed; for trying things out, not for right answers.

    Uniform with a variance after He et al., "Delving Deep into Rectifiers", ICCV 2015, so that activations neither
    vanish nor grow over hundreds of layers. Every filter but those on the picture itself is centred: it then does
    not see the mean that all rectified features share, and different pictures get clearly different scores.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = math.sqrt(3.0 / _RECTIFIED_VARIANCE / module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.weight.shape[1] > 3:
                    module.weight -= module.weight.mean(tuple(range(1, module.weight.dim())), keepdim=True)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for module in model.modules():
            if isinstance(module, BasicBlock):
                # Added to the shortcut, a full-strength residual would double the variance in every block.
                module.bn2.weight.fill_(0.5)
