"""Batches on an accelerator are filled up to sizes that were warmed up, where that is shown to change no answer."""

from __future__ import annotations

# TorchScript reads the annotations of `forward`, and takes what has none for a tensor.
# mypy: disable-error-code="no-untyped-def"
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.device_bench import DeviceBench, numbers, saved
from tests.support.networks import Affine, Identity


class Centred(nn.Module):
    """Each answer depends on the whole batch."""

    def forward(self, x):
        return x - x.mean(0)


class BySize(nn.Module):
    """Rows do not meet, but count."""

    def forward(self, x):
        return x / x.size(0)


class Looks(nn.Module):
    """A table of four rows: another index would be out of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(4, 8)

    def forward(self, ids):
        return self.table(ids).sum(1)


class OneIsSpecial(nn.Module):
    """As networks that leave the batch's dimension out where it is one."""

    def forward(self, x):
        return x * 2 if x.size(0) == 1 else x * 3


class Refuses(nn.Module):
    """Takes every number of rows but one."""

    def __init__(self, refused: int) -> None:
        super().__init__()
        self.refused = refused

    def forward(self, x):
        if x.size(0) == self.refused:
            raise ValueError("so many rows are not taken")
        return x * 2 + 1


NO_GRAPHS = {"no_graphs": "not wanted here"}


@pytest.mark.parametrize("batching", [{}, NO_GRAPHS], ids=["graphs", "calls"])
@pytest.mark.parametrize("count", range(1, 12))
def test_a_batch_of_any_size_has_the_answers_of_its_items(
    simdev: Any, tmp_path: Path, count: int, batching: dict[str, Any]
) -> None:
    network = Affine()
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=11, batching=batching)
    before = lane.lane.stats()["padded_rows"]
    items = numbers(count, 16)
    lane.ask_batch(items)
    assert lane.wrong(network, items) == []
    assert lane.lane.stats()["buckets"] == [1, 2, 4, 8, 11]
    assert lane.lane.stats()["padding_note"] == ""
    assert lane.lane.stats()["padded_rows"] - before == min(size - count for size in (1, 2, 4, 8, 11) if size >= count)
    lane.close()


@pytest.mark.parametrize("batching", [{}, NO_GRAPHS], ids=["graphs", "calls"])
def test_filled_batches_are_right_under_random_delays(
    simdev: Any, tmp_path: Path, seed: int, batching: dict[str, Any]
) -> None:
    network = Identity()  # its answers are its inputs' memory, if nobody copies them
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8, workers=2,
                       batching=batching)  # fmt: skip
    simdev.fault(f"random seed={seed} max_us=2000")
    items = numbers(300, 16)
    lane.ask(items, wave=13)
    assert lane.wrong(network, items) == []
    assert lane.lane.stats()["padded_rows"] > 0
    lane.close()


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Centred(), "with the other rows"), (BySize(), "when it is filled up")],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_whose_rows_are_not_independent_is_never_filled_up(
    simdev: Any, tmp_path: Path, network: nn.Module, reason: str
) -> None:
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8)
    for count in (3, 5, 8):
        items = numbers(count, 16, seed=count)
        lane.ask_batch(items)
        with torch.inference_mode():
            expected = network(torch.cat(items))
        for owner in range(count):
            assert torch.allclose(lane.answers[owner], expected[owner], atol=1e-5)
    stats = lane.lane.stats()
    assert reason in stats["padding_note"]
    assert stats["padded_rows"] == 0
    lane.close()


def test_filling_holds_no_number_that_the_model_was_not_given(simdev: Any, tmp_path: Path) -> None:
    network = Looks()
    example = torch.tensor([[0, 3, 2]])
    lane = DeviceBench(saved(network, tmp_path), [example], device="simdev:0", batch=8)
    items = [torch.tensor([[i % 4, (i + 1) % 4, 3]]) for i in range(5)]
    lane.ask_batch(items)
    assert lane.wrong(network, items) == []
    assert lane.lane.stats()["padded_rows"] > 0
    lane.close()


def test_an_example_that_says_nothing_leaves_batches_as_they_are(simdev: Any, tmp_path: Path) -> None:
    lane = DeviceBench(saved(Looks(), tmp_path), [torch.zeros(1, 3, dtype=torch.int64)], device="simdev:0", batch=4)
    items = [torch.tensor([[1, 2, 3]])] * 3
    lane.ask_batch(items)
    assert lane.wrong(Looks(), items) == []
    assert "do not allow to make rows that differ" in lane.lane.stats()["padding_note"]
    assert lane.lane.stats()["padded_rows"] == 0
    lane.close()


def test_given_rows_are_what_batches_are_compared_with(simdev: Any, tmp_path: Path) -> None:
    rows = [[torch.tensor([[i, 3 - i, i]])] for i in range(4)]
    lane = DeviceBench(saved(Looks(), tmp_path), [torch.zeros(1, 3, dtype=torch.int64)], device="simdev:0", batch=4,
                       batching={"rows": rows})  # fmt: skip
    assert lane.lane.stats()["padding_note"] == ""
    lane.close()


def test_sizes_can_be_chosen_and_filling_switched_off(simdev: Any, tmp_path: Path) -> None:
    path = saved(Affine(), tmp_path)
    lane = DeviceBench(path, [torch.zeros(1, 16)], device="simdev:0", batch=16, batching={"sizes": [4, 100]})
    assert lane.lane.stats()["buckets"] == [4, 16]
    lane.close()
    lane = DeviceBench(path, [torch.zeros(1, 16)], device="simdev:0", batch=16,
                       batching={"no_padding": "switched off", **NO_GRAPHS})  # fmt: skip
    items = numbers(5, 16)
    lane.ask_batch(items)
    assert lane.wrong(Affine(), items) == []
    stats = lane.lane.stats()
    assert (stats["buckets"], stats["padding_note"], stats["padded_rows"]) == ([1, 16], "switched off", 0)
    lane.close()


@pytest.mark.parametrize("refused", [3, 4])  # 4 is a size that is warmed up, 3 one that is only filled up to it
def test_a_model_that_fails_for_some_number_of_rows_is_served_without_filling_up(
    simdev: Any, tmp_path: Path, refused: int
) -> None:
    network = Refuses(refused)
    lane = DeviceBench(saved(network, tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=8)
    assert lane.lane.stats()["padding_note"].startswith("the model fails for batches")
    for count in range(1, 9):
        items = numbers(count, 16)
        lane.ask_batch(items)
        for index, item in enumerate(items):
            assert torch.equal(lane.answers[index], item[0] * 2 + 1)
    lane.close()


def test_one_row_is_tried_too_where_the_smallest_size_is_larger(simdev: Any, tmp_path: Path) -> None:
    lane = DeviceBench(saved(OneIsSpecial(), tmp_path), [torch.zeros(1, 16)], device="simdev:0", batch=4,
                       batching={"sizes": [4]})  # fmt: skip
    (item,) = numbers(1, 16)
    lane.ask_batch([item])
    assert torch.equal(lane.answers[0], item[0] * 2)
    assert "when it is filled up to 4" in lane.lane.stats()["padding_note"]
    lane.close()
