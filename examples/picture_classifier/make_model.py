"""Trains the network on scikit-learn's handwritten digits: writes digits.pth, and pictures/0.png to pictures/9.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from model import DigitNet
from PIL import Image
from sklearn.datasets import load_digits

from pyserve.handlers.image import ImageNetTransform

TRAINED_ON, HELD_OUT = 1000, 300  # pictures; the second ones are never trained on
EPOCHS = 16
SURE = 0.9  # a probability


def drawn(digit: np.ndarray) -> Image.Image:
    """8 x 8 grey values from 0 (paper) to 16 (ink) -> a picture of 256 x 256 pixels, dark on white."""
    ink = Image.fromarray((255 - digit * 255 / 16).astype(np.uint8)).resize((192, 192), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (256, 256), "white")
    picture.paste(ink, (32, 32))
    return picture


def trained(grey: torch.Tensor, digits: torch.Tensor) -> DigitNet:
    """A network trained on ``grey`` [n, 1, 14, 14] with the right answers ``digits`` [n]; the same one every time."""
    torch.manual_seed(0)
    network = DigitNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(grey)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network.scores(grey[chosen]), digits[chosen]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    torch.set_num_threads(1)  # a network this small is trained fastest by one thread
    samples = load_digits()
    pictures = [drawn(digit) for digit in samples.images[: TRAINED_ON + HELD_OUT]]
    digits = torch.from_numpy(samples.target[: TRAINED_ON + HELD_OUT]).long()
    # The handler's own transform, so that the network is trained on the numbers that it will be served.
    transform, shrunk = ImageNetTransform(), DigitNet().shrunk
    grey = torch.cat([shrunk(transform(picture).unsqueeze(0)) for picture in pictures])

    network = trained(grey[:TRAINED_ON], digits[:TRAINED_ON])
    with torch.inference_mode():
        probabilities = torch.softmax(network.scores(grey), 1)
    right = (probabilities.argmax(1) == digits)[TRAINED_ON:]
    print(f"recognises {right.float().mean():.1%} of the {HELD_OUT} held-out pictures")
    torch.save(network.state_dict(), "digits.pth")

    Path("pictures").mkdir(exist_ok=True)
    for digit in range(10):
        sure = [i for i in range(TRAINED_ON, len(digits)) if digits[i] == digit and probabilities[i, digit] > SURE]
        pictures[sure[0]].save(f"pictures/{digit}.png")
    print("wrote digits.pth and pictures/")


if __name__ == "__main__":
    main()
