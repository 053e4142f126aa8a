"""Models at a lower precision, made of a small one in fp32: what they take, what they give, and how far that agrees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import zoo
from pyserve.backends import quantized
from pyserve.backends.precision import measure_agreement
from pyserve.backends.quantized import inductor_program, int8_module, lowered_module, openvino_model
from pyserve.conversion.export_script import exported
from pyserve.proof.probe_inputs import InputDomain

EXAMPLE = (torch.zeros(1, 1, 8, 8),)
DOMAINS = [InputDomain(torch.float32, ((1, 1), (8, 8), (8, 8)))]


class Twice(nn.Module):
    """Calls one layer several times, adds what it began with, and takes whole numbers too."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.bend = nn.ReLU(inplace=True)
        self.words = nn.Embedding(10, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, picture: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        bent = self.bend(self.convolution(picture) + picture)
        bent = self.bend(self.convolution(bent) + bent)
        scores = self.last(bent.mean(dim=(1, 2)) + self.words(ids).sum(1))
        return {"scores": scores, "count": ids.sum(1), "parts": (bent,)}


class MakesNumbers(nn.Module):
    """Multiplies numbers that it makes in fp32 by a weight: not to be had at another precision throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, picture: torch.Tensor) -> Any:
        return self.layer(picture.flatten(1).float() * torch.ones(64))


def export(module: nn.Module) -> Any:
    return exported(module, EXAMPLE, DOMAINS)


@pytest.fixture
def digits(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = zoo.DigitsNet().eval()
    zoo.seed_weights(model, seed)
    return model


def pictures(count: int) -> list[tuple[torch.Tensor, ...]]:
    return [(torch.rand(1, 1, 8, 8) * 16,) for _ in range(count)]


def run_of(model: nn.Module) -> Callable[[Sequence[Any]], Any]:
    return lambda inputs: model(*inputs)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_a_program_at_a_lower_precision_takes_and_gives_fp32(
    digits: nn.Module, dtype: torch.dtype, largest: float
) -> None:
    program = export(digits)
    module, is_partly = lowered_module(program, dtype, EXAMPLE)
    again = export(module)
    assert not is_partly and {each.dtype for each in again.state_dict.values()} == {dtype}
    assert {each.dtype for each in program.state_dict.values()} == {torch.float32}, "the program's own have changed"
    (items,) = ([torch.cat([each[0] for each in pictures(5)])],)
    assert again.module()(*items).dtype == torch.float32 and again.module()(*items).shape == (5, 10)
    found = measure_agreement(run_of(digits), run_of(again.module()), pictures(8))
    assert 0 < found.largest < largest


def test_numbers_of_two_kinds_that_meet_leave_only_the_heavy_operators_lowered(seed: int) -> None:
    torch.manual_seed(seed)
    model = MakesNumbers().eval()
    program, note = inductor_program(export(model), "bf16", [], example=EXAMPLE, export=export)
    assert note == "only convolutions, linear layers and products of matrices run at bf16"
    assert {each.dtype for each in program.state_dict.values()} == {torch.float32}
    assert "torch.bfloat16" in program.module().code
    assert 0 < measure_agreement(run_of(model), run_of(program.module()), pictures(4)).largest < 3e-2


def test_whole_numbers_and_names_stay_what_they_are(seed: int) -> None:
    torch.manual_seed(seed)
    model = Twice().eval()
    example = (torch.rand(1, 1, 8, 8), torch.randint(0, 10, (1, 3)))
    domains = [*DOMAINS, InputDomain(torch.int64, ((1, 6),), (0, 9))]
    program = exported(model, example, domains)
    module, _ = lowered_module(program, torch.bfloat16, example)
    got, wanted = module(*example), model(*example)
    assert got.keys() == wanted.keys() and torch.equal(got["count"], wanted["count"])
    assert got["scores"].dtype == got["parts"][0].dtype == torch.float32


def test_int8_of_torchao_is_one_step_of_rounding_away(digits: nn.Module) -> None:
    pytest.importorskip("torchao")
    items = pictures(24)
    again = export(int8_module(export(digits), items))
    assert torch.ops.quantized_decomposed.quantize_per_tensor.default in {
        node.target for node in again.graph.nodes
    } or "quantize" in str(again.graph)
    found = measure_agreement(run_of(digits), run_of(again.module()), items)
    assert 0 < found.largest < 0.5 and found.similarity > 0.98
    assert again.module()(torch.rand(7, 1, 8, 8)).shape == (7, 10)


def test_int8_of_a_layer_that_is_called_twice(seed: int) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(seed)
    model = Twice().eval()
    example = (torch.rand(1, 1, 8, 8), torch.randint(0, 10, (1, 3)))
    domains = [*DOMAINS, InputDomain(torch.int64, ((1, 6),), (0, 9))]
    items = [(torch.rand(1, 1, 8, 8), torch.randint(0, 10, (1, size))) for size in (1, 3, 6, 2)]
    module = int8_module(exported(model, example, domains), items)
    assert measure_agreement(run_of(model), run_of(module), items).similarity > 0.99


def test_int8_of_nncf(digits: nn.Module) -> None:
    quantized.without_telemetry()
    pytest.importorskip("nncf")
    openvino = pytest.importorskip("openvino")
    items, told = pictures(24), []
    plain = openvino.convert_model(export(digits))
    made, _ = openvino_model(plain, "int8", items, run_of(digits), wanted=0.5, progress=told.append)
    kinds = [each.get_type_name() for each in made.get_ops()]
    assert "FakeQuantize" in kinds and "FakeQuantize" not in [each.get_type_name() for each in plain.get_ops()]
    found = measure_agreement(run_of(digits), quantized._runner(made), items)
    assert 0 < found.largest < 0.5 and found.similarity > 0.98
    assert told[0].startswith("calibrating (1 of 24)") and told[-1] == "comparing int8 with fp32"


@pytest.mark.slow
def test_their_makers_are_told_nothing() -> None:
    pytest.importorskip("nncf")
    code = "import sys; from pyserve.backends import quantized; quantized.without_telemetry(); import openvino, nncf; "
    code += "assert sys.modules['openvino_telemetry'] is None"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_more_care_is_taken_only_where_the_first_way_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {False: 0.9, True: 0.95}
    asked = []

    def int8(model: Any, items: Any, progress: Any, *, careful: bool) -> float:
        asked.append(careful)
        return costs[careful]

    class Found:
        def __init__(self, share: float):
            self.share = share

    monkeypatch.setattr(quantized, "int8_openvino", int8)
    monkeypatch.setattr(quantized, "_runner", lambda model: model)
    monkeypatch.setattr(quantized, "measure_agreement", lambda truth, run, items: Found(run))
    made, note = openvino_model(None, "int8", [], lambda inputs: None, wanted=0.9)
    assert made == 0.9 and asked == [False] and "cut" not in note
    made, note = openvino_model(None, "int8", [], lambda inputs: None, wanted=0.99)
    assert made == 0.95 and asked == [False, False, True] and "cut a few large numbers off" in note
    costs[True] = 0.5
    assert openvino_model(None, "int8", [], lambda inputs: None, wanted=0.99)[0] == 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_openvino_computes_in_other_kinds_by_itself(precision: str) -> None:
    model = object()
    assert openvino_model(model, precision, [], lambda inputs: None, wanted=0.99)[0] is model
