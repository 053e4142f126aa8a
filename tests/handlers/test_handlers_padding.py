"""``pad_to``: items of similar size become items of one size, so that they share a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyserve.handler import InputError, ModelLoadError
from pyserve.handlers.tensor_spec import TensorSpec
from tests.support.lane_bench import LaneBench
from tests.support.networks import save_script


class Total(nn.Module):
    """The sum of what is no padding, and the size it came in: [n, size] -> [n, 2]."""

    def forward(self, ids: Tensor) -> Tensor:
        size = torch.full_like(ids[:, 0], ids.shape[1])
        return torch.stack((ids.sum(1), size), 1)


def spec(shape: list[int], **padding: Any) -> TensorSpec:
    return TensorSpec.from_config({"input": {"dtype": "int64", "shape": shape, **padding}})


@pytest.mark.parametrize(("size", "padded"), [(1, 4), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_an_item_is_filled_up_to_the_next_size(size: int, padded: int) -> None:
    numbers = list(range(1, size + 1))
    expected = torch.tensor([numbers + [-7] * (padded - size)])
    item = spec([-1], pad_to=[4, 8], pad_value=-7)
    assert torch.equal(item.from_nested(numbers), expected)
    assert torch.equal(item.from_bytes(bytearray(torch.tensor(numbers).numpy().tobytes())), expected)


def test_the_free_dimension_may_stand_anywhere() -> None:
    item = spec([2, -1, 2], pad_to=[3])
    got = item.from_nested([[[1, 2]], [[3, 4]]])
    assert got.tolist() == [[[[1, 2], [0, 0], [0, 0]], [[3, 4], [0, 0], [0, 0]]]]
    assert item.example().shape == (1, 2, 3, 2)


def test_an_item_above_the_largest_size_is_the_clients_error() -> None:
    with pytest.raises(InputError, match=r"got a list of 9 instead of 1\.\.8 at the top level.*pad_to"):
        spec([-1], pad_to=[4, 8]).from_nested([1] * 9)


@pytest.mark.parametrize(
    ("shape", "padding", "says"),
    [
        ([-1], {"pad_to": 4}, "rising sizes"), ([-1], {"pad_to": [8, 4]}, "rising sizes"),
        ([-1], {"pad_to": [0, 4]}, "rising sizes"), ([-1], {"pad_to": ["a"]}, "rising sizes"),
        ([-1], {"pad_to": [4, 4]}, "rising sizes"), ([4], {"pad_to": [4]}, "exactly one -1"),
        ([-1, -1], {"pad_to": [4]}, "exactly one -1"), ([-1], {"pad_to": [4], "pad_value": "x"}, "not a number"),
    ],
)  # fmt: skip
def test_padding_that_cannot_be_is_refused_when_the_model_is_loaded(shape: Any, padding: Any, says: str) -> None:
    with pytest.raises(ModelLoadError, match=says):
        spec(shape, **padding)


def test_items_of_similar_size_share_a_batch_and_get_their_own_answers(tmp_path: Any) -> None:
    item = spec([-1], pad_to=[4, 8])
    sizes = [1, 5, 2, 8, 4, 7, 3, 6]
    lane = LaneBench(save_script(Total(), tmp_path / "m.pt"), [item.example()], batch=len(sizes))
    lane.hold(len(sizes))
    for i, size in enumerate(sizes):
        lane.submit(i, item.from_nested([i + 1] * size))
    lane.wait_for(len(sizes))
    for i, size in enumerate(sizes):
        assert lane.answers[i].tolist() == [(i + 1) * size, 4 if size <= 4 else 8]
    assert sorted(len(completion.owners) for completion in lane.completions) == [4, 4]
    lane.close()
