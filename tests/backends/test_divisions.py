"""Divisions that backends get wrong by a whole divisor are told from those that they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pyserve.backends import to_aotinductor, to_openvino
from pyserve.backends.sources import UnsuitableError


def program(function: Callable[[torch.Tensor], Any], dtype: torch.dtype = torch.float32) -> Any:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return function(x)

    return torch.export.export(Model(), (torch.ones(2, 4, dtype=dtype),), strict=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x // 0.7,
        lambda x: torch.div(x, -0.3, rounding_mode="floor"),
        lambda x: x // (x.abs() + 1),
    ],
    ids=["floor_divide", "div", "by numbers"],
)
def test_quotients_rounded_down_are_refused_where_rounding_decides(function: Callable[[torch.Tensor], Any]) -> None:
    for backend in (to_openvino, to_aotinductor):
        with pytest.raises(UnsuitableError, match="how often one number goes into another"):
            backend._check(program(function))


@pytest.mark.parametrize(
    "function",
    [lambda x: x % 0.7, lambda x: torch.fmod(x, -0.3), lambda x: (x * 1e4) % 3, lambda x: x[:, 1:] % x[:, :1]],
    ids=["remainder", "fmod", "of large numbers", "by numbers"],
)
def test_remainders_are_refused_of_openvino_only(function: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(UnsuitableError, match="how often one number goes into another"):
        to_openvino._check(program(function))
    to_aotinductor._check(program(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x % 1 + (x * 3) % 0.25 + torch.fmod(x, -2),
        lambda x: x // 4 + (x * 1e4) // 8 + torch.div(x, 0.5, rounding_mode="floor") + torch.floor(x / 32),
        lambda x: x[:, :2].reshape(-1) % 3,
        lambda x: torch.div(x, 0.7, rounding_mode="trunc") + x / 0.7,
    ],
    ids=["powers of two", "quotients by these", "remainders of an input", "towards zero"],
)
def test_those_that_are_not_rounded_are_not(function: Callable[[torch.Tensor], Any]) -> None:
    for backend in (to_openvino, to_aotinductor):
        backend._check(program(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x // 7,
        lambda x: torch.floor(x / 7),
        lambda x: (x / 7).clamp(0, 9).long(),
        lambda x: torch.div(x, 7, rounding_mode="floor"),
    ],
    ids=["floor_divide", "floor", "cast", "div"],
)
def test_steps_on_quotients_are_refused_of_openvino_only(function: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(UnsuitableError, match="how often one number goes into another"):
        to_openvino._check(program(function))
    to_aotinductor._check(program(function))


def test_whole_numbers_that_may_be_negative_are_not_rounded_down() -> None:
    with pytest.raises(UnsuitableError, match="rounds quotients of whole numbers down"):
        to_openvino._check(program(lambda x: (x - 1000) // 3, torch.int64))
    for function in (
        lambda x: x // 3,  # which probes show
        lambda x: x.argmax(1) // 3 + torch.arange(2) // 2,
        lambda x: torch.div(x - 1000, 3, rounding_mode="trunc") + (x - 1000) % 3,
    ):
        to_openvino._check(program(function, torch.int64))
