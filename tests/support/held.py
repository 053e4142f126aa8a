"""Networks that do not come to an end, or not before a test says so."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import threading

import torch
from torch import nn

ENDLESS = 666.0

_library = torch.library.Library("pyserve_tests", "DEF")
_library.define("hold(Tensor x) -> Tensor")


class Hold:
    """Holds up networks of `Held` within one operator, where no interruption is noticed."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self._open = threading.Event()

    def release(self) -> None:
        self._open.set()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.begun.release()
        self._open.wait()
        return x.clone()


_hold = Hold()
_library.impl("hold", lambda x: _hold(x), "CompositeExplicitAutograd")  # noqa: PLW0108 - the global of that moment


def new_hold() -> Hold:
    """What networks of `Held` ask from now on."""
    global _hold
    _hold = Hold()
    return _hold


class Held(nn.Module):
    """Stands still within an operator for one number."""

    def forward(self, x):
        if bool((x == 666.0).any()):
            x = torch.ops.pyserve_tests.hold(x)
        return x * 2


class EndlessOrHeld(nn.Module):
    """As `Held`; loops for ever, with operators in the loop, for another number."""

    def forward(self, x):
        while bool((x == 667.0).any()):
            x = x.abs()
        if bool((x == 666.0).any()):
            x = torch.ops.pyserve_tests.hold(x)
        return x * 2


class Endless(nn.Module):
    """Loops for ever for one number, with operators in the loop."""

    def forward(self, x):
        while bool((x == 666.0).any()):
            x = x.abs()
        return x * 2


class EndlessHalfWay(nn.Module):
    """Loops for ever for one number, when it has changed what it keeps and not yet changed it back."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(1))

    def forward(self, x):
        self.factor.mul_(2)
        while bool((x == 666.0).any()):
            x = x.abs()
        y = x * self.factor
        self.factor.div_(2)
        return y


class EndlessNumbers(nn.Module):
    """Loops for ever for one number, without an operator in the loop: nothing ends that."""

    def forward(self, x):
        n = 0
        if bool((x == 666.0).any()):
            while n >= 0:
                n = (n + 1) % 1000
        return x * 2


class EndlessAtOnce(nn.Module):
    """Loops for ever for whatever it gets."""

    def forward(self, x):
        while bool((x < 1e30).all()):
            x = x.abs()
        return x


class HeldAtOnce(nn.Module):
    """Stands still within an operator for whatever it gets."""

    def forward(self, x):
        return torch.ops.pyserve_tests.hold(x)
