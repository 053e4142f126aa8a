"""A model that was tried out is what it was before: buffers, attributes, containers, and the random numbers to come."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.proof.model_state import KeptRandomness, KeptState

ONE = torch.ones(1, 3)


class Counting(torch.nn.Module):
    """[n, 3] -> [n, 3]; every call changes all that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.count = 0
        self.last = torch.zeros(2)
        self.seen = [7]
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = x[0, :2] + self.count
        self.total += 1
        self.hidden = self.hidden + 2
        self.seen.append(self.count)
        return self.layer(x) + self.total + self.hidden + self.last.sum()


class Recording(Counting):
    """Keeps what came, in attributes that it did not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs = x
        self.layer.bias.data += 1
        return super().forward(x)


def values_of(model: Any) -> list[Any]:
    return [model.count, model.last.tolist(), model.total.tolist(), model.hidden.tolist(), list(model.seen)]


@pytest.mark.parametrize("is_scripted", [False, True])
def test_everything_that_a_call_changes_is_put_back(is_scripted: bool) -> None:
    eager = Counting().eval()
    model: Any = torch.jit.script(eager) if is_scripted else eager
    expected = eager.layer(ONE) + 1 + 2 + 4
    before, buffer = values_of(model), model.total
    kept = KeptState([model])
    with torch.inference_mode():
        model(ONE)
        model(2 * ONE)
        assert values_of(model) != before
        kept.restore()
        assert values_of(model) == before
        assert model.total.data_ptr() == buffer.data_ptr(), "others may look at the same memory"
        answer = model(ONE)
    assert values_of(model) == [1, [2.0, 2.0], [1.0] * 3, [2.0] * 3, [7, 1]]
    assert torch.allclose(answer, expected)


def test_attributes_that_a_call_made_are_gone_and_small_parameters_are_as_they_were() -> None:
    model = Recording().eval()
    bias = model.layer.bias.detach().clone()
    kept = KeptState([model])
    with torch.inference_mode():
        model(ONE)
    kept.restore()
    assert not hasattr(model, "inputs")
    assert torch.equal(model.layer.bias, bias)


def test_memory_that_was_not_changed_is_not_written_to() -> None:
    model = torch.nn.BatchNorm1d(3).eval()
    versions = [each._version for each in model.state_dict().values()]
    kept = KeptState([model])
    model(torch.randn(2, 3))
    kept.restore()
    assert [each._version for each in model.state_dict().values()] == versions


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.freeze(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 3)).eval())),
        lambda: torch.jit.trace(
            torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval(), torch.ones(2, 3)
        ),
        lambda: torch.compile(torch.nn.Linear(3, 3), backend="eager"),
        lambda: torch.export.export(torch.nn.Linear(3, 3), (ONE,)).module(),
        lambda: torch.nn.LazyLinear(3),
    ],
    ids=["frozen", "traced", "compiled", "exported", "lazy"],
)
def test_models_of_all_kinds_run_as_before(make: Callable[[], Any]) -> None:
    model = make()
    kept = KeptState([model, None, "no model"])
    with torch.no_grad():
        expected = model(ONE)
        kept.restore()
        assert torch.equal(model(ONE), expected)


def test_random_numbers_go_on_as_if_none_had_been_drawn() -> None:
    kept = KeptRandomness()

    def draw() -> list[float]:
        return [torch.rand(1).item(), np.random.random(), random.random()]

    first = draw()
    KeptRandomness.seed(3)
    seeded = draw()
    KeptRandomness.seed(3)
    assert draw() == seeded != first
    kept.restore()
    assert draw() == first
