"""A model in double precision: eager, TorchScript, and TorchScript whose weights are constants of its graph."""

# TorchScript reads `forward` as it is.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyserve.proof.exact_answers import copy_in_double, in_double


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(10, 4)

    def forward(self, x, ids):
        return self.norm(self.first(x)).mean((2, 3)) + self.table(ids)


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x.to(torch.float32))


INPUTS = [torch.randn(2, 2, 6, 6), torch.tensor([1, 2])]


def of_kind(kind: str) -> Any:
    net = Net().eval()
    if kind == "eager":
        return net
    if kind == "exported":
        return torch.export.export(net, tuple(INPUTS)).module()
    script = torch.jit.script(net) if kind == "scripted" else torch.jit.trace(net, tuple(INPUTS))
    return torch.jit.freeze(script.eval()) if kind == "frozen" else script


@pytest.mark.parametrize("kind", ["eager", "scripted", "traced", "frozen", "exported"])
def test_it_answers_in_double_precision(kind: str) -> None:
    found = in_double(lambda: of_kind(kind))(INPUTS)
    with torch.no_grad():
        right = Net().eval().double()(INPUTS[0].double(), INPUTS[1])
    assert found.dtype is torch.float64
    rounding = 1e-6 if kind == "frozen" else 1e-12  # of weights that were put together when it was frozen
    torch.testing.assert_close(found, right, rtol=rounding, atol=rounding)


def test_the_model_itself_stays_as_it_is() -> None:
    net = Net().eval()
    copy_in_double(net)(INPUTS)
    assert {each.dtype for each in net.parameters()} == {torch.float32}


def test_it_is_loaded_once_and_only_when_it_is_asked() -> None:
    loads: list[int] = []

    def load() -> nn.Module:
        loads.append(1)
        return Net().eval()

    run = in_double(load)
    assert not loads
    run(INPUTS)
    run(INPUTS)
    assert loads == [1]


def test_one_whose_code_names_a_precision_raises() -> None:
    with pytest.raises(RuntimeError):
        copy_in_double(Cast().eval())([torch.randn(1, 4)])
