"""Code that asks whether it is being converted is not believed to compute the same when it is."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch.jit import is_tracing

from pyserve.conversion.convert import convert
from pyserve.conversion.mode_questions import mode_questions
from pyserve.conversion.record import NeedsPythonError
from pyserve.proof.probe_inputs import InputDomain

ITEM = torch.zeros(1, 4)
FAR = torch.full((1, 4), 9e4)  # beyond the inputs that conversions are tried on


class Asking(torch.nn.Module):
    """Computes something else for large numbers if ``asks`` says that it is being converted."""

    def __init__(self, asks: Callable[[], bool]):
        super().__init__()
        self.asks = asks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(max=7e4) if self.asks() else x


class Tracing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_tracing():
            return x.clamp(max=7e4)
        return x


class TracingOrScripting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            return x.clamp(max=7e4)
        return x


@pytest.mark.parametrize(("model", "way"), [(Tracing(), "scripted"), (TracingOrScripting(), "exported")])
def test_a_way_in_which_the_model_computes_something_else_is_not_taken(model: torch.nn.Module, way: str) -> None:
    with torch.no_grad():
        program, conversion = convert(model, [ITEM], [InputDomain(torch.float32, ((4, 4),))])
    assert conversion.how == way
    assert torch.equal(program(FAR), FAR)


def test_a_model_that_asks_about_every_way_is_not_converted() -> None:
    model = Asking(lambda: torch.jit.is_tracing() or torch.jit.is_scripting() or torch.compiler.is_compiling())
    with torch.no_grad(), pytest.raises(NeedsPythonError) as caught:
        convert(model, [ITEM], [InputDomain(torch.float32, ((4, 4),))])
    for name in ("is_tracing", "is_scripting", "is_compiling"):
        assert f"asks how it is being run ({name})" in str(caught.value)


def test_questions_of_torch_itself_do_not_count() -> None:
    before = sys.getprofile()
    with mode_questions() as asked:
        torch.nn.functional.interpolate(torch.ones(1, 1, 4, 4), scale_factor=2.0, recompute_scale_factor=True)
        torch.broadcast_tensors(torch.ones(2, 1), torch.ones(3))
    assert asked == set() and sys.getprofile() is before
    with mode_questions() as asked:
        is_tracing()
    assert asked == {"is_tracing"}
