"""A trace that is frozen anyway is made of one module, and is the same program as one of many."""

# The tracer reads no annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.conversion.convert import convert
from pyserve.conversion.eager_answers import EagerAnswers, Refusal
from pyserve.conversion.record import Conversion, NeedsPythonError
from pyserve.proof.comparison import difference
from pyserve.proof.probe_inputs import InputDomain

FOUR = InputDomain(torch.float32, ((4, 4),))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that the tracer has made."""
    made: list[str] = []
    create = torch.jit._recursive.create_script_module

    def noted(module: Any, *rest: Any, **named: Any) -> Any:
        made.append(type(module).__name__)
        return create(module, *rest, **named)

    monkeypatch.setattr(torch.jit._recursive, "create_script_module", noted)
    return made


def converted(model: nn.Module, *, freezes: bool = True) -> tuple[torch.jit.ScriptModule, Conversion]:
    torch.manual_seed(3)
    return convert(model.eval(), [torch.rand(1, 4)], [FOUR], freezes=freezes)


def seeded(make: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(torch.tanh(self.layers(x)))


class Tied(nn.Module):
    """One parameter in two parts, which a trace of many modules has twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Weight(nn.Parameter):
    """One of a kind of its own, whose copies may be anything."""


class OwnWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = Weight(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


class WithScript(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.jit.script(nn.Linear(4, 4))

    def forward(self, x):
        return self.fc(x) + 1


@pytest.mark.parametrize("make", [Layers, Tied])
def test_a_model_that_is_frozen_is_traced_without_its_parts(make: type[nn.Module], parts: list[str]) -> None:
    model = seeded(make)
    program, conversion = converted(model)
    assert conversion.how == "traced" and len(parts) == 1
    x = torch.randn(5, 4)
    assert difference(model(x), program(x)) < 1e-6
    assert all(each.requires_grad for each in model.parameters())  # they are as they were
    assert not list(program.parameters())


def test_one_that_is_not_frozen_keeps_its_weights_as_they_are_named(parts: list[str]) -> None:
    """They are changed later: in precision, layout or device."""
    model = seeded(Layers)
    program, conversion = converted(model, freezes=False)
    assert conversion.how == "traced" and len(parts) > 1
    assert {name for name, _ in program.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("make", [OwnWeight, WithScript])
def test_what_no_constant_may_be_is_traced_with_its_parts(make: type[nn.Module], parts: list[str]) -> None:
    model = seeded(make)
    program, conversion = converted(model)
    assert conversion.how == "traced" and len(parts) > 1
    x = torch.randn(5, 4)
    assert difference(model(x), program(x)) < 1e-6


class Hidden(nn.Module):
    """Large numbers are remembered where no attribute shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kept = {"scale": [1.0]}

    def forward(self, x):
        large = (x.detach().abs().amax() > 3).to(x.dtype)
        self.kept["scale"][0] = self.kept["scale"][0] + 2 * large
        return self.fc(x) * self.kept["scale"][0]


def test_one_copy_answers_as_long_as_it_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    fresh = EagerAnswers.fresh

    def counted(self: EagerAnswers) -> nn.Module:
        copies.append(1)
        return fresh(self)

    monkeypatch.setattr(EagerAnswers, "fresh", counted)
    truth = EagerAnswers(seeded(Layers).eval())
    truth.examine([torch.rand(1, 4)])
    for number in range(4):
        truth.answers(number, [torch.rand(2, 4)])
    assert len(copies) == 1
    copies.clear()
    counting = EagerAnswers(seeded(Counts).eval())
    counting.examine([torch.rand(1, 4)])
    for number in range(4):
        answered = counting.answers(number, [torch.zeros(1, 4)])
        assert not isinstance(answered, Refusal)
        assert [each.tolist() for each in answered] == [[[1.0]], [[2.0]]]
    assert len(copies) > 4


class Counts(nn.Module):
    n: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n += 1
        return self.n.expand(x.shape[0], 1)


def test_a_model_that_hides_what_it_remembers_is_not_converted() -> None:
    with pytest.raises(NeedsPythonError):
        converted(seeded(Hidden))
