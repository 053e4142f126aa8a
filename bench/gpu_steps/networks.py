"""What is measured: ResNet-50 and a BERT-base in plain torch, with seeded weights, and inputs that all differ.

ResNet-50 after K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; BERT-base after
J. Devlin et al., "BERT", NAACL 2019: twelve layers, width 768, twelve heads, 128 tokens. The same layers in small for
``tiny``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyserve.zoo import seed_weights

VOCABULARY = 30522
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around which the input is added."""

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        channels_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, features: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(features))))))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(features))


class BottleneckNet(nn.Module):
    """float [n, 3, side, side] -> scores [n, classes]; (3, 4, 6, 3) of width 64 is ResNet-50."""

    def __init__(self, counts: tuple[int, ...], width: int, class_count: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(counts):
            for number in range(count):
                inner = width << stage
                blocks.append(Bottleneck(channels, inner, 2 if stage and number == 0 else 1))
                channels = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, class_count)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(pictures))), 1))


class Pixels(nn.Module):
    """The same from pictures as a decoder gives them: uint8 [n, side, side, 3], normalised on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        # The channels lie last in memory already; nothing is copied to permute them.
        return self.network((pixels.permute(0, 3, 1, 2).type_as(self.mean) - self.mean) / self.std)


class BertLayer(nn.Module):
    """Self-attention and a feed-forward network with GELU, each with its residual and its norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        parts = self.inputs(features).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        features = self.norm1(features + self.outputs(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(features + self.narrow(nn.functional.gelu(self.wide(features))))


class Bert(nn.Module):
    """Token ids int64 [n, length] -> scores [n, 16]. The positions are a parameter: no constant of a device."""

    def __init__(self, width: int, layers: int, heads: int, length: int):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.zeros(length, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(BertLayer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.norm(self.words(ids) + self.places))[:, 0])


@dataclass(frozen=True, slots=True)
class Network:
    """One network and its inputs.

    Attributes:
        name: ``resnet50``, ``resnet50_uint8`` or ``bert``.
        is_picture: its floating point form is laid out channels last.
    """

    name: str
    module: nn.Module
    is_picture: bool
    item_shape: tuple[int, ...]
    dtype: torch.dtype

    def items(self, count: int, seed: int = 1) -> Tensor:
        """``count`` inputs in one tensor on the host. No two have the same answer, so that one in another's place is
        seen: noise alone would not do for pictures, since the pooling averages it away."""
        generator = torch.Generator().manual_seed(seed)
        if not self.is_picture:
            return torch.randint(0, VOCABULARY, (count, *self.item_shape), generator=generator)
        side = max(self.item_shape)
        coarse = torch.rand(count, 3, 7, 7, generator=generator)
        tint = torch.rand(count, 3, 1, 1, generator=generator)
        grain = torch.rand(count, 1, side, side, generator=generator)
        smooth = nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)
        pictures = 0.5 * smooth + 0.4 * tint + 0.1 * grain
        if self.dtype == torch.uint8:
            return (255 * pictures).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return ((pictures - 0.45) / 0.225).contiguous()


def build(name: str, *, tiny: bool) -> Network:
    """A network in evaluation mode on the host, the same weights each time."""
    if name == "bert":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            length = 8 if tiny else 128
            bert = Bert(32, 1, 2, length) if tiny else Bert(768, 12, 12, length)
            nn.init.normal_(bert.places, std=0.02)
        return Network(name, bert.eval(), False, (length,), torch.int64)
    net = BottleneckNet((1, 1), 8, 10) if tiny else BottleneckNet((3, 4, 6, 3), 64, 1000)
    seed_weights(net)
    for module in net.modules():
        if isinstance(module, Bottleneck):
            # Added at full strength they would make rounding grow from block to block, which trained weights do not.
            nn.init.constant_(module.bn3.weight, 0.25)
    side = 32 if tiny else 224
    if name == "resnet50_uint8":
        return Network(name, Pixels(net).eval(), True, (side, side, 3), torch.uint8)
    if name != "resnet50":
        raise ValueError(f"no such network: {name}")
    return Network(name, net.eval(), True, (3, side, side), torch.float32)


def saved(network: Network) -> bytes:
    """Its TorchScript file, float32, for any batch size."""
    file = io.BytesIO()
    with torch.inference_mode(False), torch.no_grad():
        torch.jit.save(torch.jit.trace(network.module, network.items(2), check_trace=False), file)
    return file.getvalue()
