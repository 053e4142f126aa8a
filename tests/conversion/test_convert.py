"""Eager models become TorchScript that is true to them for every input, or stay eager with a reason."""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import copy
import random
import types
from collections import namedtuple
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyserve.conversion.convert import PROBES_MIN, Module, convert
from pyserve.conversion.eager_answers import runs
from pyserve.conversion.record import Conversion, NeedsPythonError
from pyserve.proof.comparison import difference
from pyserve.proof.probe_inputs import InputDomain, Probe

FOUR = InputDomain(torch.float32, ((4, 4),))
STEPS = InputDomain(torch.float32, ((1, None), (4, 4)))
IDS = InputDomain(torch.int64, ((8, 8),))
FREE_IDS = InputDomain(torch.int64, ((1, 64),))
Pair = namedtuple("Pair", "logits x")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def as_in_its_process() -> Iterator[None]:
    was = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(was)


def example_of(domain: InputDomain) -> torch.Tensor:
    shape = [1, *(low if low == high else 16 for low, high in domain.sizes)]
    if domain.dtype.is_floating_point:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return torch.zeros(shape, dtype=domain.dtype)


def converted(model: nn.Module, *domains: InputDomain, how: str | None = None) -> tuple[Module, Conversion]:
    return convert(model.eval(), [example_of(each) for each in domains], domains, how=how)


class Linear(nn.Module):
    """Something to compute with; its parameters are the same each time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(4, 4)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.e = nn.Embedding(50, 4)


class Loop(Linear):
    def forward(self, x):
        h = torch.zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = torch.tanh(self.fc(x[:, t]) + h)
        return h


class Unbound(Linear):
    def forward(self, x):
        return torch.stack([self.fc(step) for step in x.unbind(1)], 1).sum(1)


class EqualBranch(Linear):
    def forward(self, x):
        return self.fc(x) if torch.equal(x, x.abs()) else -self.fc(x)


class Lengths(Table):
    def forward(self, ids, lengths):
        h = self.e(ids)
        return torch.stack([h[i, : int(length)].sum(0) for i, length in enumerate(lengths[:, 0])])


class Counter(Linear):
    n: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(1))

    def forward(self, x):
        self.n += 1
        return self.fc(x), self.n.expand(x.shape[0], 1)


class PythonCounter(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x, **kwargs):
        self.n += 1
        return self.fc(x) * self.n


class Clean(Linear):
    def forward(self, x, **kwargs):
        return {"logits": self.fc(x), "sum": x.flatten(1).sum(1), "x": x.size(0) * x}


class Autoscale(Linear):
    def forward(self, x, **kwargs):
        if x.max() > 2:
            x = x / 255
        return self.fc(x)


class MaskBranch(Table):
    def forward(self, ids, mask, **kwargs):
        h = self.e(ids)
        if bool((mask == 0).all()):
            return h.mean(1)
        m = mask.unsqueeze(-1).to(h.dtype)
        return (h * m).sum(1) / m.sum(1)


class LongBranch(Table):
    def forward(self, ids, **kwargs):
        h = self.e(ids)
        if ids.shape[1] > 32:
            h = h * 2
        return h.mean(1)


class BatchBranch(Linear):
    def forward(self, x, **kwargs):
        return self.fc(x) if x.shape[0] < 64 else self.fc(x) * 2


class Arrays(Linear):
    def forward(self, x, **kwargs):
        return self.fc(x).sum(1) / float(x.detach().numpy().shape[1])


class PythonRandom(Linear):
    def forward(self, x):
        return self.fc(x) * random.random()


class NumpyRandom(Linear):
    def forward(self, x):
        return self.fc(x) + float(np.random.rand())


class Namespace(Linear):
    def forward(self, x):
        return types.SimpleNamespace(logits=self.fc(x))


class OwnParameters(Linear):
    def forward(self, x):
        self.fc.weight.mul_(0.9)
        return self.fc(x)


class Refuses(Linear):
    """An assert that a trace would lose."""

    def forward(self, x, **kwargs):
        assert float(x.min()) > -100, "too cold"
        return self.fc(x)


class Noise(Linear):
    def forward(self, x):
        return self.fc(x) + torch.randn_like(x)


class Seeded(Linear):
    def forward(self, x, **kwargs):
        torch.manual_seed(0)
        return self.fc(x) + torch.randn(x.shape)


class Dropout(Linear):
    def forward(self, x):
        return F.dropout(self.fc(x), 0.5)


class Positions(Table):
    """Asserts and arithmetic about sizes, as networks for texts have them; one path."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Embedding(64, 4)

    def forward(self, ids, mask, **kwargs):
        assert ids.shape[1] <= 64, "too long"
        h = self.e(ids) + self.p(torch.arange(ids.shape[1]))
        return {"mean": (h * mask.unsqueeze(-1)).sum(1) / ids.shape[1], "count": (mask.sum(1), None)[0]}


class Named(Linear):
    def forward(self, x):
        return Pair(self.fc(x), x)


class WithNone(Linear):
    def forward(self, x):
        return self.fc(x), None


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(2).add_(1)


KEPT = {
    "a loop over the length": (Loop, [STEPS], "scripted"),
    "a list along the length": (Unbound, [STEPS], "scripted"),
    "torch.equal": (EqualBranch, [FOUR], "scripted"),
    "lengths": (Lengths, [IDS, InputDomain(torch.int64, ((1, 1),))], "scripted"),
    "one path": (Clean, [FOUR], "traced"),
    "one path for all sizes": (Clean, [STEPS], "traced"),
    "a counter": (Counter, [FOUR], "traced"),
    "noise": (Noise, [FOUR], "traced"),
    "dropout": (Dropout, [FOUR], "traced"),
    "asserts about sizes": (Positions, [FREE_IDS, FREE_IDS], "exported"),
    "a named tuple": (Named, [FOUR], "traced"),
    "None": (WithNone, [FOUR], "scripted"),
    "its input is changed": (InPlace, [FOUR], "traced"),
}


# What is done with an item may depend on the others in its batch.
READS = {"torch.equal": "equal", "lengths": "__int__"}


@pytest.mark.parametrize("name", KEPT)
def test_a_conversion_is_true_to_its_model(name: str) -> None:
    cls, domains, how = KEPT[name]
    program, conversion = converted(cls(), *domains)
    assert (conversion.how, conversion.override) == (how, False)
    assert conversion.reads == READS.get(name, "")
    for batch, length in ((1, 3), (2, 16), (5, 41)):
        inputs = []
        for domain in domains:
            shape = [batch, *(low if low == high else length for low, high in domain.sizes)]
            generator = torch.Generator().manual_seed(batch)
            inputs.append(torch.randn(shape, generator=generator) * 3 if domain.dtype.is_floating_point
                          else torch.randint(0, 2, shape, generator=generator))  # fmt: skip
        model = cls().eval()  # a new one each time, since some count their runs
        torch.manual_seed(5)
        expected = model(*(each.clone() for each in inputs))
        torch.manual_seed(5)
        assert difference(expected, copy.deepcopy(program)(*inputs)) < 1e-5


@pytest.mark.parametrize("cls", [Clean, Noise, Counter])
def test_a_frozen_program_is_compared_while_the_model_answers(
    cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a large model, of which few probes are run; a freezing that changes an answer is found."""
    monkeypatch.setattr("pyserve.conversion.convert.PROBING_S", dict.fromkeys(PROBES_MIN, 0.0))
    freeze, threads = torch.jit.freeze, torch.get_num_threads()
    _, conversion = converted(cls(), FOUR)
    assert (conversion.how, conversion.probes) == ("traced", PROBES_MIN["traced"])
    assert torch.get_num_threads() == threads

    def freeze_another(program: Module) -> Module:
        return freeze(torch.jit.trace(Doubled(program), torch.ones(2, 4), check_trace=False, strict=False).eval())

    monkeypatch.setattr(torch.jit, "freeze", freeze_another)
    with pytest.raises(NeedsPythonError, match="tracing: its answer differs from the model's by"):
        converted(cls(), FOUR)


def test_what_a_refused_program_answered_is_not_taken_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is refused by its first probe; what it answered to the others says nothing of the script."""
    monkeypatch.setattr("pyserve.conversion.convert.PROBING_S", {"traced": 0.0, "scripted": 1e9, "exported": 0.0})
    freeze, asked = torch.jit.freeze, list[int]()
    frozen = list[Module]()

    def freeze_first_another(program: Module) -> Module:
        frozen.append(program)
        if len(frozen) > 1:
            return freeze(program)
        return freeze(torch.jit.trace(Doubled(program), torch.ones(2, 4), check_trace=False, strict=False).eval())

    def noted(fresh, inputs, number, *, twice):
        asked.append(number)
        return runs(fresh, inputs, number, twice=twice)

    monkeypatch.setattr(torch.jit, "freeze", freeze_first_another)
    monkeypatch.setattr("pyserve.conversion.convert.runs", noted)
    _, conversion = converted(nn.Linear(4, 4), FOUR)
    assert conversion.how == "scripted"
    of_script = asked[PROBES_MIN["traced"] :]
    assert of_script[: conversion.probes] == list(range(conversion.probes))


class Doubled(nn.Module):
    def __init__(self, program: Module):
        super().__init__()
        self.program = program

    def forward(self, x):
        return self.program(x * 2)


def test_attention_whose_fast_path_rounds_otherwise_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    with torch.no_grad():
        x = torch.randn(1, 5, 4)
        _, conversion = convert(layer, [x], [InputDomain(torch.float32, ((5, 5), (4, 4)))])
        assert conversion.difference < 1e-5


REFUSED = {
    "a branch on the data": (Autoscale, [FOUR], "__bool__"),
    "a branch on a mask": (MaskBranch, [IDS, IDS], "__bool__"),
    "a branch on the length": (LongBranch, [FREE_IDS], "the program needs"),
    "a branch on the batch": (BatchBranch, [FOUR], "torch.export"),
    "arrays of numpy": (Arrays, [STEPS], "numpy"),
    "Python's random numbers": (PythonRandom, [FOUR], "elsewhere than from torch"),
    "random numbers of numpy": (NumpyRandom, [FOUR], "elsewhere than from torch"),
    "an output without a type": (Namespace, [FOUR], "SimpleNamespace"),
    "parameters that change": (OwnParameters, [FOUR], "changes its own parameters"),
    "state in Python": (PythonCounter, [FOUR], "differs from the model's"),
    "an assert about the data": (Refuses, [FOUR], "__float__"),
    "a seed in forward": (Seeded, [FOUR], "differs from the model's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_proven_stays_eager_with_a_reason(name: str) -> None:
    cls, domains, part = REFUSED[name]
    with pytest.raises(NeedsPythonError) as caught:
        converted(cls(), *domains)
    assert part in caught.value.message
    assert "\n" not in caught.value.message and "0x" not in caught.value.message


def test_a_trace_can_be_asked_for_and_says_what_is_against_it() -> None:
    program, conversion = converted(Autoscale(), FOUR, how="trace")
    assert conversion.how == "traced" and conversion.override
    assert "__bool__" in conversion.reason and conversion.difference > 0.1
    x = torch.ones(2, 4)
    assert difference(Autoscale()(x), program(x)) < 1e-6


def test_scripting_can_be_asked_for() -> None:
    _, conversion = converted(Linear2(), FOUR, how="script")
    assert (conversion.how, conversion.override, conversion.reason) == (
        "scripted", True, "nothing was found against it"
    )  # fmt: skip


class Linear2(Linear):
    def forward(self, x):
        return self.fc(x)


def test_the_archives_own_samples_are_probes() -> None:
    class Rare(Linear):
        def forward(self, x):
            return self.fc(x) * (2 if bool((x == 7).all()) else 1)

    sample = Probe("sample_input.json", (torch.full((1, 4), 7.0),))
    _, conversion = convert(Rare().eval(), [torch.rand(1, 4)], [FOUR], [sample], how="trace")
    assert conversion.difference > 0.1 and "sample_input.json" in conversion.reason
    _, conversion = convert(Rare().eval(), [torch.rand(1, 4)], [FOUR], how="trace")
    assert conversion.difference < 1e-5


def test_what_the_model_raises_for_the_example_is_raised() -> None:
    class Broken(Linear):
        def forward(self, x):
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        converted(Broken(), FOUR)


def test_ids_are_drawn_from_the_table_that_they_are_looked_up_in() -> None:
    class Half(Table):
        """The upper half of the table means something else."""

        def forward(self, ids, **kwargs):
            return self.e(ids).sum(1) * (2 if int(ids.max()) >= 40 else 1)

    with pytest.raises(NeedsPythonError):
        converted(Half(), IDS)
    _, conversion = converted(Half(), IDS, how="trace")
    assert conversion.difference > 0.1


def test_sizes_that_the_tracer_takes_for_constants_are_found_by_other_sizes() -> None:
    class Roll(Linear):
        def forward(self, x, **kwargs):
            return self.fc(x.roll(x.shape[1] // 2, 1))

    program, conversion = converted(Roll(), STEPS)
    assert conversion.how == "exported"
    x = torch.arange(88.0).view(2, 11, 4)
    assert difference(Roll()(x), program(x)) < 1e-6


class Encoder(nn.Module):
    """Answers 0 where something is masked, as torch's fast way through it does in eval."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=is_masked).mean(1)


def test_the_truth_has_torchs_fast_way_through_attention() -> None:
    """It answers otherwise for what is masked; a conversion does so as well, or there is none."""
    model = Encoder().eval()
    try:
        program, _ = converted(model, InputDomain(torch.float32, ((8, 8), (4, 4))), InputDomain(torch.bool, ((8, 8),)))
    except NeedsPythonError:
        return
    for masked in (0, 1, 3, 7):
        x, is_masked = torch.rand(2, 8, 4), torch.arange(8).repeat(2, 1) >= 8 - masked
        with torch.no_grad():
            assert torch.equal(program(x, is_masked), model(x, is_masked)), masked


class LeavesOut(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 100:
            return self.long(x)
        return self.fc(x).sum(1)

    @torch.jit.unused
    def long(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).mean(1)


def test_a_script_that_leaves_a_method_out_is_not_believed() -> None:
    try:
        program, _ = converted(LeavesOut(), STEPS)
    except NeedsPythonError:
        return
    x = torch.rand(1, 120, 4)
    assert torch.allclose(program(x), LeavesOut().eval()(x))
