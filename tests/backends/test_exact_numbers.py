"""Whole numbers that OpenVINO would round are not asked of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.backends import openvino
from pyserve.backends.exact_numbers import constants_beyond, exact_ranges, rounded_sums
from pyserve.models.loader import load_network
from pyserve.proof.probe_inputs import InputDomain
from tests.support.packing import pack

ANY = (-(1 << 31), (1 << 31) - 1)
CODE = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        return {"twice": x + x, "sum": x.sum(1), "largest": x.amax(1), "is": x == 16777217, "scaled": x / 3}
"""


@pytest.mark.parametrize(
    ("dtype", "sizes", "given", "exact"),
    [
        (torch.int64, ((8, 8),), ANY, (-131072, 131072)),
        (torch.int32, ((8, 8),), None, (-131072, 131072)),
        (torch.int64, ((1, None),), ANY, (-2048, 2048)),
        (torch.int64, ((3, 3), (224, 224), (224, 224)), ANY, (-255, 255)),
        (torch.int64, ((1, 512),), (0, 250001), (0, 250001)),
        (torch.int64, ((8, 8),), (0, 1 << 30), (0, 1 << 24)),
        (torch.uint8, ((8, 8),), None, None),
        (torch.float32, ((8, 8),), None, None),
    ],
    ids=["int64", "int32", "free size", "many numbers", "vocabulary", "very large table", "uint8", "floats"],
)
def test_ranges_end_where_numbers_would_be_rounded(
    dtype: torch.dtype, sizes: tuple[tuple[int, int | None], ...], given: tuple[int, int] | None,
    exact: tuple[int, int] | None,
) -> None:  # fmt: skip
    assert exact_ranges([given], [InputDomain(dtype, sizes)]) == [exact]


def sums(function: Callable[[torch.Tensor], torch.Tensor], values: tuple[int, int] | None, length: int) -> str:
    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    program = torch.export.export(Sums(), (torch.ones(2, length, dtype=torch.int64),), strict=False)
    return rounded_sums(program, [InputDomain(torch.int64, ((length, length),), values=values)])


@pytest.mark.parametrize(
    "function",
    [lambda x: x.sum(1), lambda x: torch.cumsum(x + 1, 1), lambda x: x.view(2, -1, 1).sum((1, 2))],
    ids=["sum", "cumsum", "in a view"],
)
def test_sums_of_large_vocabularies_are_refused(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert "sums whole numbers" in sums(function, (0, 250_001), 512)
    assert not sums(function, (0, 250_001), 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cumsum((x != 1).long(), 1) + 1,
        lambda x: x + 2,
        lambda x: x.float().sum(1),
        lambda x: x.amax(1),
    ],
    ids=["of a mask", "one by one", "floats", "largest"],
)
def test_other_sums_are_not(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert not sums(function, (0, 250_001), 512)


class Table(torch.nn.Module):
    rows: torch.Tensor

    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], largest: int):
        super().__init__()
        self.register_buffer("rows", torch.tensor([1, 2, largest]))
        self.answer = answer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.answer(self.rows, ids)


@pytest.mark.parametrize(
    ("answer", "largest", "is_beyond"),
    [
        (lambda rows, ids: rows[ids], -(1 << 40), True),
        (lambda rows, ids: rows[ids], 1 << 24, False),
        (lambda rows, ids: ids + 1, 1 << 40, False),
        (lambda rows, ids: torch.where(ids == 7, ids + (1 << 31), ids), 1, True),
        (lambda rows, ids: ids == 16777217, 1, False),
        (lambda rows, ids: ids < (1 << 31), 1, True),
        (lambda rows, ids: (ids * 1.5) + 16777217, 1, False),
        (lambda rows, ids: ids[:, 1:] + 16777216, 1, False),
        (lambda rows, ids: (ids > 500) * 3000000000, 1, True),
    ],
    ids=["row", "row within", "unused", "branch", "compared", "compared beyond", "of floats", "places", "times a mask"],
)
def test_whole_numbers_of_the_program_itself_are_found(
    answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], largest: int, is_beyond: bool
) -> None:
    program = torch.export.export(Table(answer, largest), (torch.ones(3, 4, dtype=torch.int64),), strict=False)
    assert constants_beyond(program) is is_beyond


@pytest.mark.slow
@pytest.mark.skipif(bool(openvino.missing()), reason=openvino.missing())
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_large_whole_numbers_are_answered_exactly(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    config = f"input: {{dtype: {dtype}, shape: [4]}}\nbackend: openvino\n"
    with open_archive(pack(tmp_path, model_code=CODE, config=config)) as archive:
        network = load_network(
            archive, name="m", devices=["cpu"], batch_size=2, cpu_budget=1, limit_max_image_pixels=True,
            startup_timeout_s=600, progress=lambda text: None,
        )  # fmt: skip
    assert network.torch_model.backend == "openvino", network.findings["backend"]
    for largest in (16777217, (1 << 31) - 1):
        x = torch.tensor([[1, 2, 3, largest]], dtype=getattr(torch, dtype))
        got = network.run([x])
        assert got["largest"].tolist() == [largest] and got["sum"].tolist() == [largest + 6]
        assert torch.equal(got["twice"], x + x) and torch.equal(got["is"], x == 16777217)
    before = network.torch_model.plain_runs
    assert network.run([torch.arange(4, dtype=getattr(torch, dtype))[None]])["sum"].tolist() == [6]
    assert network.torch_model.plain_runs == before, "small ones are OpenVINO's"
