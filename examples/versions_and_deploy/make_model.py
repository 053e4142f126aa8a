"""Writes two versions of a model that turns Celsius into Fahrenheit: rule_of_thumb.pt and exact.pt, TorchScript."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fahrenheit(nn.Module):
    """celsius float32 [n, 1] -> fahrenheit float32 [n, 1]."""

    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        with torch.no_grad():
            self.line.weight.fill_(factor)
            self.line.bias.fill_(offset)

    def forward(self, celsius: Tensor) -> Tensor:
        return self.line(celsius)


def main() -> None:
    for name, factor, offset in (("rule_of_thumb", 2.0, 30.0), ("exact", 1.8, 32.0)):
        torch.jit.script(Fahrenheit(factor, offset).eval()).save(f"{name}.pt")
        print(f"wrote {name}.pt")


if __name__ == "__main__":
    main()
