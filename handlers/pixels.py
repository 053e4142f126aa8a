"""Pictures as bytes on their way to an accelerator, which makes the numbers of them itself.

The bytes of a picture are a quarter of its numbers: they cost less to make, to gather and to copy. The device computes
what `ImageNetTransform` computes, operation by operation and in the same precision, so that a model sees the same
numbers. Only a handler whose way from a picture to numbers is pyserve's own does so: `VisionHandler.send_pixels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# A byte of a picture is a 255th part of full brightness.
DIVISOR = 255.0


class Normalization(NamedTuple):
    """What becomes of the bytes of a picture: (byte / 255 - mean) / std, per channel, in float32."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> Normalization:
        """From any three numbers each."""
        return cls(*((float(each[0]), float(each[1]), float(each[2])) for each in (mean, std)))

    def numbers(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes [n, height, width, 3] -> float32 [n, 3, height, width], on the device where they are."""
        count, height, width, channels = pixels.shape
        out = torch.empty((count, channels, height, width), dtype=torch.float32, device=pixels.device)
        # By tensors: divided by a number, some devices multiply by its reciprocal, which is another result.
        torch.div(pixels.permute(0, 3, 1, 2), _constant(DIVISOR, pixels), out=out)
        if any(self.mean):
            out -= _constant(self.mean, pixels).view(3, 1, 1)
        if any(each != 1 for each in self.std):
            out /= _constant(self.std, pixels).view(3, 1, 1)
        return out


IDENTITY = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _constant(value: float | Sequence[float], beside: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=beside.device)


def every_byte() -> torch.Tensor:
    """A picture [1, 256, 1, 3] with all there is to normalise: each value of each channel."""
    return torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, 3).contiguous()
