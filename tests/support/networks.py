"""Tiny networks for the tests of the native engine, and a gate that holds one of them up until the test says go."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

POISON = 666.0


class Times(nn.Module):
    """Its answer tells which of several it is."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class Affine(nn.Module):
    """A different answer for each input: no two rows can be mixed up unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.linear = nn.Linear(16, 5)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.linear(x)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


class Identity(nn.Module):
    def forward(self, x):
        return x


class View(nn.Module):
    def forward(self, x):
        return x.reshape(x.size(0), -1)[:, 2:]


class InPlace(nn.Module):
    """Changes its own input, as some preprocessing inside of networks does."""

    def forward(self, x):
        x.mul_(2)
        return x


class Poisoned(nn.Module):
    """Raises for a batch in which one number is POISON."""

    def forward(self, x):
        if bool((x == 666.0).any()):
            raise RuntimeError("poisoned input")
        return x * 2


class Outputs(nn.Module):
    """A tuple of outputs."""

    def forward(self, x):
        return x + 1, x.sum(1)


class NamedOutputs(nn.Module):
    def forward(self, x):
        return {"plus": x + 1, "sum": x.sum(1)}


class ListOutputs(nn.Module):
    def forward(self, x):
        return [x + 1, x.sum(1)]


class Lossy(nn.Module):
    """One row too few: its answers belong to nobody."""

    def forward(self, x):
        return x[1:]


class Greedy(nn.Module):
    """Asks for more memory than there is when told to."""

    def forward(self, x):
        if bool((x == 666.0).any()):
            return torch.empty([x.size(0), 1 << 46])
        return x


class Gated(nn.Module):
    """Runs only while its gate is open, and counts its runs and rows in the gate's file.

    It counts by its first number from 0 to 63: of two runs at the same time with different ones, neither
    is lost.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x):
        # Depends on a value, so that no optimiser maps the file ahead of time.
        place = int(torch.nan_to_num(x.flatten()[0].float()).clamp(0, 63).item())
        gate = torch.from_file(self.path, True, 130 + int(place > 63), dtype=torch.int64)
        gate[2 + place] += 1
        gate[66 + place] += x.size(0)
        while int(gate[0].item()) == 0:
            gate[1] += 1
        return x * 2


def counted(path: str, x: torch.Tensor, first: float) -> torch.Tensor:
    """``x``, once the gate is open: what `Gated` counts, of a batch whose first number is ``first``."""
    place = int(torch.nan_to_num(torch.tensor(first)).clamp(0, 63).item())
    gate = torch.from_file(path, True, 130 + int(place > 63), dtype=torch.int64)
    gate[2 + place] += 1
    gate[66 + place] += x.size(0)
    while int(gate[0].item()) == 0:
        gate[1] += 1
    return x


class Gate:
    """The test's side of `Gated`. Open at first."""

    def __init__(self, path: Path):
        self.path = path
        self._words = np.memmap(path, dtype=np.int64, mode="w+", shape=(130,))
        self.open()

    def open(self) -> None:
        self._words[0] = 1

    def shut(self) -> None:
        self._words[0] = 0

    @property
    def runs(self) -> int:
        """Batches begun."""
        return int(self._words[2:66].sum())

    @property
    def rows(self) -> int:
        return int(self._words[66:].sum())

    def runs_of(self, first: int) -> int:
        """Batches begun whose first number was this one."""
        return int(self._words[2 + first])

    def rows_of(self, first: int) -> int:
        """Rows in them."""
        return int(self._words[66 + first])


def save_script(network: nn.Module, path: Path, *, frozen: bool = False) -> Path:
    script = torch.jit.script(network.eval())
    if frozen:
        script = torch.jit.freeze(script)
    torch.jit.save(script, str(path))
    return path
