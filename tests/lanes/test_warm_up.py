"""What native workers run before requests: samples, sizes of ``pad_to``, sizes of batches; and larger ones later."""

# mypy: disable-error-code="no-untyped-def, operator, assignment"

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.lanes.warm_up import SIZES_LIMIT_S, WarmUpItem, warm_up_findings, warm_up_items
from pyserve.proof.probe_inputs import InputDomain, padded_examples
from tests.support.lane_bench import LaneBench
from tests.support.lane_stand import run, standing
from tests.support.networks import save_script

_library = torch.library.Library("pyserve_warm_up_tests", "DEF")
_library.define("note(Tensor x) -> Tensor")


class Notes:
    """The shapes that networks of `Noting` were called with, in order."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self.shapes.append(tuple(x.shape))
        if x.shape[1] == 13:
            raise ValueError("13 is too many")
        return x.clone()


_notes = Notes()
_library.impl("note", lambda x: _notes(x), "CompositeExplicitAutograd")  # noqa: PLW0108 - the global of that moment


class Noting(nn.Module):
    """Sums each row."""

    def forward(self, x):
        return torch.ops.pyserve_warm_up_tests.note(x).sum(1, keepdim=True)


@pytest.fixture
def notes() -> Notes:
    global _notes
    _notes = Notes()
    return _notes


@pytest.fixture
def noting(tmp_path: Path, notes: Notes) -> Path:
    return save_script(Noting(), tmp_path / "noting.pt")


class Bench(LaneBench):
    """One whose workers are told what else to run."""

    def __init__(self, path: Path, items: list[list[torch.Tensor]], **options: Any):
        workers, limits = options.pop("workers", 1), options.pop("limits_s", (60.0, 60.0))
        super().__init__(path, [torch.zeros(1, 4)], workers=0, **options)
        self.lane.set_warm_up(items=items, items_limit_s=limits[0], sizes_limit_s=limits[1])
        self.lane.set_workers(workers)
        self.wait(lambda: self.states() == ["ready"] * workers)

    @property
    def runs(self) -> dict[int, list[int]]:
        """Sizes that were run, by item."""
        found: dict[int, list[int]] = {}
        for item, rows, cause in self.lane.warm_up_runs():
            if not cause:
                found.setdefault(item, []).append(rows)
        return found


@pytest.fixture
def benches() -> Iterator[list[Bench]]:
    made: list[Bench] = []
    yield made
    for each in made:
        each.close()


def test_every_item_is_run_at_every_size_before_a_worker_is_ready(
    noting: Path, notes: Notes, benches: list[Bench]
) -> None:
    benches.append(bench := Bench(noting, [[torch.ones(1, 7)], [torch.ones(1, 9)]], batch=8))
    assert {(rows, size) for rows in (1, 2, 4, 8) for size in (4, 7, 9)} <= set(notes.shapes)
    assert bench.runs == {0: [1, 2, 4, 8], 1: [1, 2, 4, 8], 2: [1, 2, 4, 8]}
    first = notes.shapes[-12:]
    assert first[:6] == [(1, 4), (8, 4), (1, 7), (8, 7), (1, 9), (8, 9)], "what is likeliest comes first"


def test_each_worker_runs_them(noting: Path, notes: Notes, benches: list[Bench]) -> None:
    before = len(notes.shapes)
    benches.append(Bench(noting, [[torch.ones(1, 7)]], batch=2, workers=3))
    assert notes.shapes[before:].count((2, 7)) == 3


def test_what_there_is_no_time_for_is_left_out_but_for_the_example(
    noting: Path, notes: Notes, benches: list[Bench]
) -> None:
    benches.append(bench := Bench(noting, [[torch.ones(1, 7)]], batch=4, limits_s=(0.0, 0.0)))
    assert bench.runs == {0: [1, 4]}
    left_out = {(item, rows): cause for item, rows, cause in bench.lane.warm_up_runs() if cause}
    assert set(left_out) == {(0, 2), (1, 1), (1, 2), (1, 4)} and "too long" in left_out[0, 2]


def test_an_item_that_the_model_cannot_run_is_left_out_with_the_reason_and_keeps_nobody_waiting(
    noting: Path, notes: Notes, benches: list[Bench]
) -> None:
    benches.append(bench := Bench(noting, [[torch.ones(1, 13)], [torch.ones(1, 7)]], batch=2))
    assert bench.runs == {0: [1, 2], 2: [1, 2]}
    items = [WarmUpItem("warmup/a.json", []), WarmUpItem("warmup/b.json", [])]
    found = warm_up_findings(bench.lane, items)
    assert found["rows"] == {"example": [1, 2], "warmup/b.json": [1, 2]}
    assert len(found["leftOut"]) == 1 and found["leftOut"][0].startswith("warmup/a.json, 1 row: ")
    assert "13 is too many" in found["leftOut"][0]
    bench.submit("x", torch.ones(1, 4))
    bench.wait_for(1)
    assert bench.answers["x"].item() == 4


def test_a_size_that_is_allowed_later_is_run_before_a_batch_of_it(
    noting: Path, notes: Notes, benches: list[Bench]
) -> None:
    benches.append(bench := Bench(noting, [[torch.ones(1, 7)]], batch=2))
    before = len(notes.shapes)
    bench.limits(batch=8)
    bench.wait(lambda: bench.runs == {0: [1, 2, 4, 8], 1: [1, 2, 4, 8]})
    assert notes.shapes[before:] == [(8, 4), (8, 7), (4, 4), (4, 7)], "the new ones only, the largest first"
    bench.limits(batch=4)
    bench.limits(batch=8)
    bench.submit("x", torch.ones(1, 4))
    bench.wait_for(1)
    assert len(notes.shapes) == before + 5, "a size is run once"


def test_requests_that_come_while_larger_sizes_are_run_are_answered(
    noting: Path, notes: Notes, benches: list[Bench], seed: int
) -> None:
    benches.append(bench := Bench(noting, [[torch.ones(1, 7)]], batch=1, workers=2))
    torch.manual_seed(seed)
    inputs = [torch.rand(1, 4 if number % 3 else 7) for number in range(200)]
    for number, each in enumerate(inputs):
        bench.submit(number, each)
        if number % 50 == 25:
            bench.limits(batch=1 + number // 10)
    bench.wait_for(len(inputs))
    for number, each in enumerate(inputs):
        torch.testing.assert_close(bench.answers[number], each.sum(1))


class Counting(nn.Module):
    """Adds how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.sum(1, keepdim=True) + self.calls


def test_state_is_what_it_was_before_all_runs(tmp_path: Path, benches: list[Bench]) -> None:
    benches.append(bench := Bench(save_script(Counting(), tmp_path / "counting.pt"), [[torch.ones(1, 7)]], batch=2))
    for number, batch in enumerate((2, 8, 8)):
        bench.limits(batch=batch)
        bench.submit(number, torch.zeros(1, 4))
        bench.wait_for(number + 1)
    assert [bench.answers[number].item() for number in range(3)] == [1, 2, 3], "nor do sizes that come later count"


# --- what is run ------------------------------------------------------------------------------------------------------


def test_one_item_of_each_shape_that_the_example_has_not(seed: int) -> None:
    torch.manual_seed(seed)
    example = [torch.ones(1, 4, dtype=torch.int64)]
    domains = [InputDomain(torch.int64, ((1, 16),), pad_to=(4, 8, 16))]
    answered: dict[str, list[Any]] = {
        "sample_input.json": [torch.full((1, 4), 3)], "warmup/a.json": [torch.full((1, 8), 5)],
        "warmup/b.json": [torch.full((1, 8), 6)], "warmup/two.json": [torch.full((2, 8), 6)],
        "warmup/other.json": [torch.ones(1, 4)], "warmup/odd.json": ["text"],
    }  # fmt: skip
    items = warm_up_items(example, domains, answered, example)
    assert [item.name for item in items] == ["warmup/a.json", "warmup/other.json", "pad_to 16"]
    assert items[0].inputs[0].tolist() == [[5] * 8], "with the numbers that the sample has"
    assert items[2].inputs[0].shape == (1, 16) and items[2].inputs[0].min() == 1, "an item of padding alone is none"


def test_inputs_that_are_filled_up_together_have_one_size() -> None:
    ids = InputDomain(torch.int64, ((1, 16), (2, 2)), pad_to=(4, 16))
    mask = InputDomain(torch.float32, ((1, 16),), pad_to=(4, 16))
    fixed = InputDomain(torch.float32, ((3, 3),))
    example = [torch.ones(1, 4, 2, dtype=torch.int64), torch.ones(1, 4), torch.zeros(1, 3)]
    ((inputs, name),) = padded_examples(example, [ids, mask, fixed])
    assert [tuple(each.shape) for each in inputs] == [(1, 16, 2), (1, 16), (1, 3)] and name == "pad_to 16"
    assert [each.dtype for each in inputs] == [torch.int64, torch.float32, torch.float32]


def test_a_batch_size_that_is_put_up_is_warmed_and_described(tmp_path: Path, notes: Notes) -> None:
    async def test() -> None:
        async with standing(tmp_path, Noting(), batch_size=2) as stand:
            assert warm_up_findings(stand.lane.core, []) == {"rows": {"example": [1, 2]}}
            stand.lane.settings.batch_size = 8
            stand.lane.apply_limits()
            await stand.until(lambda: warm_up_findings(stand.lane.core, [])["rows"]["example"] == [1, 2, 4, 8])
            response = await stand.answer(1, 2)
            assert json.loads(bytes(response.body)) == [3.0]

    assert SIZES_LIMIT_S > 0
    run(test())
