"""A quick backend with the plain TorchScript beside it: which of the two answers what.

The quick one of these tests is another network, whose answers tell it apart; both are TorchScript, as what is tested
does not depend on what computes.
"""

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from pyserve import _core
from tests.support.networks import save_script

ITEM = [torch.zeros(1, 4)]


class Plus(nn.Module):
    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.full((4,), float(number)))

    def forward(self, x):
        return x + self.number


class Looks(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(sign * torch.arange(10.0)[:, None])

    def forward(self, ids: torch.Tensor):
        return self.table(ids)[:, :, 0]


class Overflows(nn.Module):
    def forward(self, x):
        return x / (x - 3)


class Raises(nn.Module):
    def forward(self, x):
        if bool((x == 3).any()):
            raise RuntimeError("quick one's words")
        return x + 100


class RaisesToo(nn.Module):
    def forward(self, x):
        if bool((x == 3).any()):
            raise RuntimeError("plain one's words")
        return x


class Pair(NamedTuple):
    plus: torch.Tensor
    total: torch.Tensor


class Nested(nn.Module):
    def forward(self, x):
        return {"pair": Pair(x + 1, x.sum(1)), "single": Pair(x, x[:, 0])}


class Flat(nn.Module):
    """The same tensors in a row, as compiled programs give them."""

    def forward(self, x):
        return x + 1, x.sum(1), x, x[:, 0]


class Sized(nn.Module):
    def forward(self, x):
        return x, x.size(0)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Hides(nn.Module):
    def forward(self, x):
        return torch.relu(torch.log(x))


class Constant(nn.Module):
    """Gives its own memory away."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(1, 4))

    def forward(self, x):
        return self.kept


def load(
    plain: nn.Module, quick: nn.Module, folder: Path, example: list[torch.Tensor] = ITEM, **options: Any
) -> _core.TorchModel:
    script = save_script(plain, folder / "plain.pt")
    return _core.TorchModel.load(
        str(save_script(quick, folder / "quick.pt")), example, plain=(str(script), 0, -1), **options
    )


def quick_answers(model: _core.TorchModel, inputs: list[torch.Tensor]) -> bool:
    """Whether the quick one of `Plus` answered: its number is 100, the plain one's 1."""
    before = model.plain_runs
    answer = model.run(inputs)
    is_quick = model.plain_runs == before
    expected = inputs[0] + (100 if is_quick else 1)
    torch.testing.assert_close(answer, expected.float(), equal_nan=True)
    return is_quick


def test_usual_inputs_are_answered_by_the_quick_one_alone(tmp_path: Path) -> None:
    model = load(Plus(1), Plus(100), tmp_path)
    for rows in (1, 2, 64):
        assert quick_answers(model, [torch.randn(rows, 4)])
    assert quick_answers(model, [torch.full((1, 4), 999999.0)])
    assert model.plain_runs == 0
    torch.testing.assert_close(model.run_plain([torch.zeros(1, 4)]), torch.ones(1, 4))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1.1e6, -3e38])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_numbers_that_are_not_ordinary_are_answered_by_the_plain_one(tmp_path: Path, number: float, place: int) -> None:
    model = load(Plus(1), Plus(100), tmp_path)
    batch = torch.zeros(3, 4)
    batch.view(-1)[place] = number
    assert not quick_answers(model, [batch])
    assert quick_answers(model, [torch.zeros(3, 4)])


def test_types_sizes_and_batches_that_were_not_tried_are_answered_by_the_plain_one(tmp_path: Path) -> None:
    model = load(Plus(1), Plus(100), tmp_path, rows_max=8)
    assert quick_answers(model, [torch.zeros(8, 4)])
    assert not quick_answers(model, [torch.zeros(9, 4)])
    assert not quick_answers(model, [torch.zeros(2, 3, 4)])
    torch.testing.assert_close(model.run([torch.zeros(2, 1)]), torch.ones(2, 4))
    assert not quick_answers(model, [torch.zeros(2, 4, dtype=torch.int64)])
    with pytest.raises(RuntimeError, match="must match the size of tensor"):  # as without the quick one
        model.run([torch.zeros(2, 5)])


def test_rules_say_which_sizes_were_tried(tmp_path: Path) -> None:
    rules = [("x", torch.float32, [(1, 7, "length"), (4, 4, "")])]
    model = load(Plus(1), Plus(100), tmp_path, [torch.zeros(1, 3, 4)], rules=rules)
    assert quick_answers(model, [torch.zeros(2, 7, 4)])
    assert not quick_answers(model, [torch.zeros(2, 8, 4)])
    assert not quick_answers(model, [torch.zeros(2, 4)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_whole_numbers_out_of_their_range_are_answered_by_the_plain_one(tmp_path: Path, dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 9, 0]], dtype=dtype)
    model = load(Looks(1), Looks(-1), tmp_path, [ids], value_ranges=[(0, 9)])
    assert torch.equal(model.run([ids]), -ids.float())
    for wrong in (-1, 10):
        with pytest.raises(RuntimeError, match="index out of range"):
            model.run([torch.tensor([[1, 9, wrong]], dtype=dtype)])
    assert model.plain_runs == 2
    strided = torch.cat([ids, ids + 10], dim=1)[:, :3]
    assert torch.equal(model.run([strided]), -ids.float())


def test_whole_numbers_beyond_32_bits_are_answered_by_the_plain_one(tmp_path: Path) -> None:
    model = load(Plus(1), Plus(100), tmp_path, [torch.zeros(1, 4, dtype=torch.int64)])
    assert quick_answers(model, [torch.full((1, 4), 2**31 - 1)])
    assert not quick_answers(model, [torch.full((1, 4), 2**31)])
    assert not quick_answers(model, [torch.full((1, 4), -(2**31) - 1)])


def test_answers_that_are_not_finite_are_those_of_the_plain_one(tmp_path: Path) -> None:
    model = load(Plus(1), Overflows(), tmp_path)
    torch.testing.assert_close(model.run([torch.full((1, 4), 4.0)]), torch.full((1, 4), 4.0))
    assert model.plain_runs == 0
    torch.testing.assert_close(model.run([torch.full((1, 4), 3.0)]), torch.full((1, 4), 4.0))
    assert model.plain_runs == 1


def test_where_the_quick_one_raises_the_plain_one_has_the_word(tmp_path: Path) -> None:
    threes = torch.full((1, 4), 3.0)
    model = load(Plus(1), Raises(), tmp_path)
    torch.testing.assert_close(model.run([threes]), threes + 1)
    model = load(RaisesToo(), Raises(), tmp_path)
    with pytest.raises(Exception, match="RuntimeError: plain one's words"):  # a torch.jit.Error, which has no base
        model.run([threes])


def test_answers_come_in_the_structure_of_the_plain_one(tmp_path: Path) -> None:
    x = torch.rand(3, 4)
    model = load(Nested(), Flat(), tmp_path)
    quick, plain = model.run([x]), model.run_plain([x])
    assert model.plain_runs == 0
    for key in ("pair", "single"):
        for name in ("plus", "total"):
            torch.testing.assert_close(getattr(quick[key], name), getattr(plain[key], name))


@pytest.mark.parametrize(
    ("plain", "quick", "text"),
    [
        (Counts(), Plus(1), "a call changes the model"),
        (Sized(), Plus(1), "more in it than tensors"),
        (Plus(1), Flat(), "gives 4 outputs, and as TorchScript 1"),
    ],
)
def test_what_cannot_be_believed_is_not_loaded(tmp_path: Path, plain: nn.Module, quick: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(plain, quick, tmp_path)


def test_nan_that_openvino_would_hide_is_a_reason_against_it(tmp_path: Path) -> None:
    script = save_script(Hides(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"NaN may come up within the model \(log\)"):
        _core.TorchModel.load("no.xml", ITEM, backend="openvino", library="no.so", plain=(str(script), 0, -1))


def test_answers_are_nobodys_memory(tmp_path: Path) -> None:
    model = load(Constant(), Constant(), tmp_path)
    first = model.run(ITEM)
    with torch.inference_mode():
        first += 5
    assert torch.equal(model.run(ITEM), torch.ones(1, 4)) and model.plain_runs == 0


def test_the_plain_one_is_read_when_it_is_needed_and_from_the_file_that_it_was(tmp_path: Path) -> None:
    model = load(Plus(1), Plus(100), tmp_path)
    (tmp_path / "plain.pt").unlink()  # it is open
    nan = torch.full((1, 4), torch.nan)
    assert not quick_answers(model, [nan])
    model.settle()
    assert not quick_answers(model, [nan])
    model = load(Plus(1), Plus(100), tmp_path)
    (tmp_path / "plain.pt").write_bytes(b"another file")
    with pytest.raises(RuntimeError, match="overwritten since it was loaded; register the model again"):
        model.run([nan])
    assert quick_answers(model, [torch.zeros(1, 4)])


def test_without_an_example_nothing_is_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without an example"):
        load(Plus(1), Plus(100), tmp_path, [])
