"""What answers have to be: eager torch in float32, and how far eager torch in a lower precision is from that."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu_steps.device import numbers_of
from bench.gpu_steps.networks import DTYPES, Network

CHUNK = 32
EXACT = 1e-4  # what summing in another order may change in float32
SLACK = 2.0  # a lower precision may be this many times as far off as eager torch is in it


class WrongAnswer(Exception):
    """An answer is further from eager torch's than the precision explains."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The inputs of a measurement and their answers.

    Attributes:
        items: on the host, [count, ...].
        wanted: eager torch, float32 without TensorFloat-32, on the host.
        allowed: the largest difference, as a share of the largest number in ``wanted``.
        scale: that number.
    """

    items: Tensor
    wanted: Tensor
    allowed: float
    scale: float

    def error(self, got: Tensor, indices: list[int]) -> float:
        """The largest difference of the rows of ``got`` from those of the items ``indices``, as a share."""
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        return float((got.float() - self.wanted[indices]).abs().max()) / self.scale

    def check(self, got: Tensor, indices: list[int]) -> float:
        """As `error`, but raises `WrongAnswer` if it is more than is allowed."""
        error = self.error(got, indices)
        if error > self.allowed:
            raise WrongAnswer(f"an answer is off by {error:.2g} of the largest number, {self.allowed:.2g} is allowed")
        return error


def truth_of(network: Network, precision: str, count: int, device: torch.device) -> Truth:
    """Works the answers out, and shows that one item's answer cannot be taken for another's."""
    items = network.items(count)
    module = copy.deepcopy(network.module).to(device)
    with torch.inference_mode():
        with numbers_of("exact"):
            wanted = _eager(module, items, device)
        scale = float(wanted.abs().max())
        allowed = EXACT
        if precision != "fp32" or device.type != "cpu":
            with numbers_of(precision):
                lower = _eager(module.to(DTYPES[precision]), items, device)
            allowed = max(EXACT, SLACK * float((lower - wanted).abs().max()) / scale)
    distances = torch.cdist(wanted, wanted, p=float("inf"), compute_mode="donot_use_mm_for_euclid_dist") / scale
    nearest = float((distances + torch.eye(count) * 1e9).min())
    if count > 1 and nearest < allowed:
        raise WrongAnswer(f"{network.name}: two answers differ by {nearest:.2g} only; {allowed:.2g} is allowed")
    return Truth(items, wanted, allowed, scale)


def _eager(module: torch.nn.Module, items: Tensor, device: torch.device) -> Tensor:
    dtype = next(module.parameters()).dtype
    outputs = []
    for chunk in items.split(CHUNK):
        on_device = chunk.to(device)
        outputs.append(module(on_device.to(dtype) if on_device.is_floating_point() else on_device).float().cpu())
    return torch.cat(outputs)
