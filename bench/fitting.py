"""A last layer that distinguishes some pictures, for networks whose weights are random.

With a random last layer classes lie so close together that the first of them says nothing about a network's
precision. A trained network has margins; so has one whose last layer is fitted, which costs the same to run.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyserve.handlers.image import ImageNetTransform, open_picture

CLASS_COUNT = 1000
TARGET = 10.0  # logits above the other classes', about what a trained classifier gives
RIDGE = 1e-3  # of the features' variance
OTHERS = -5.0  # logit of the classes that no picture has


def fit_head(network: nn.Module, pictures: list[bytes]) -> None:
    """Replaces the last linear layer's weights by those of a ridge regression: a class for each of ``pictures``.

    Args:
        network: float [n, 3, 224, 224] -> [n, 1000]; in eval mode.
        pictures: JPEG.
    """
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    transform = ImageNetTransform()
    with torch.inference_mode():
        network(torch.stack([transform(open_picture(each)) for each in pictures]))
    handle.remove()
    (features,) = seen
    count = len(pictures)
    mean = features.mean(0)
    centred = features - mean
    gram = centred @ centred.T
    wanted = TARGET * torch.eye(count)
    fitted = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(count), wanted).T @ centred
    classes = torch.arange(count) * (CLASS_COUNT // count)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(OTHERS)
        head.weight[classes] = fitted
        head.bias[classes] = -(fitted @ mean)
