"""What OpenVINO would compute otherwise than torch, found in the program before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyserve.backends.openvino import cause_of
from pyserve.backends.sources import UnsuitableError
from pyserve.backends.to_openvino import _check


class Model(nn.Module):
    weights: torch.Tensor

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.register_buffer("weights", torch.full((4,), 2.0))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x / self.weights)


def check(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    _check(torch.export.export(Model(function), (torch.rand(2, 4),), strict=False))


@pytest.mark.parametrize(
    ("function", "origin"),
    [
        (lambda x: torch.maximum(torch.log(x), torch.zeros(4)), "log"),
        (lambda x: (x / x.sum(1, keepdim=True) + 1).amax(1), "div"),
        (lambda x: x.masked_fill(x > 0, float("-inf")).softmax(1).argmax(1), "masked_fill"),
        (lambda x: torch.topk(torch.sqrt(x), 2)[0], "sqrt"),
        (lambda x: torch.log(x).bool(), "log"),
        (lambda x: torch.log(x).logical_not(), "log"),
        (lambda x: torch.log(x).clip(-9, 9).long(), "log"),
        (lambda x: torch.bucketize(torch.log(x), torch.arange(3.0)), "log"),
    ],
    ids=["log", "division", "softmax", "topk", "bool", "logical", "cast", "bucketize"],
)
def test_nan_that_a_choice_would_hide_is_refused(function: Callable[[torch.Tensor], torch.Tensor], origin: str) -> None:
    with pytest.raises(UnsuitableError, match=rf"NaN may come up within the model \({origin}\)"):
        check(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x**2 / 3.0).amax(1),
        lambda x: x.softmax(1).argmax(1),
        lambda x: torch.log(torch.maximum(x, torch.ones(4))),
        lambda x: torch.exp(x) / torch.exp(x).sum(1, keepdim=True),
    ],
    ids=["division by numbers", "softmax", "chosen before", "nothing chosen"],
)
def test_what_shows_nan_or_has_none_is_not(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(function)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_products_of_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    class Multiplies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x

    with pytest.raises(UnsuitableError, match="multiplies whole numbers"):
        _check(torch.export.export(Multiplies(), (torch.ones(2, 4, dtype=dtype),), strict=False))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: (x * 1e4).long(), "int64 of float32"),
        (lambda x: (x > 0).to(torch.uint8) + 255, "counts in uint8"),
        (lambda x: x.argmax(1).to(torch.int8), "int8 of int64"),
        (lambda x: (x * 1e6).clamp(-3e9, 3e9).long(), "int64 of float32"),
        (lambda x: (x * 2).clamp(-1000, 1000).to(torch.uint8), "uint8 of float32"),
    ],
    ids=["large", "wrapping", "narrow", "beyond int32", "beyond uint8"],
)
def test_what_ends_elsewhere_is_refused(function: Callable[[torch.Tensor], torch.Tensor], said: str) -> None:
    with pytest.raises(UnsuitableError, match=said):
        check(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 255).round().clamp(0, 255).to(torch.uint8),
        lambda x: (x > 0).long(),
        lambda x: x + torch.arange(x.shape[1]).float().long(),
    ],
    ids=["bounded", "mask", "of sizes"],
)
def test_casts_that_hold_what_they_are_given_are_not(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    check(function)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "OpenVINO cannot use the model: Exception from src/inference/src/cpp/core.cpp:132:\n"
            "Check 'res.status == pugi::status_ok' failed at src/frontends/ir/src/input_model.cpp:219:\n"
            "Start-end tags mismatch at offset 499\n\n",
            "OpenVINO cannot use the model: Start-end tags mismatch at offset 499",
        ),
        (
            "Check 'is_conversion_successful' failed at src/frontends/pytorch/src/frontend.cpp:171:\n"
            "FrontEnd API failed with OpConversionFailure:\nNo conversion rule found for aten::foo",
            "No conversion rule found for aten::foo",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", "mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=["an exception", "a check", "neither"],
)
def test_places_in_openvinos_source_are_left_out(text: str, cause: str) -> None:
    assert cause_of(text) == cause


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.topk(x, 2), "where numbers stand"),
        (lambda x: torch.sort(x, 1)[1], "where numbers stand"),
        (lambda x: x.argsort(1), "where numbers stand"),
        (lambda x: torch.atan2(x, x + 1), "atan2"),
        (lambda x: x.clamp(min=1e-42), "too small"),
        (lambda x: x.half().float(), "computes in float16"),
        (lambda x: (x.bfloat16() * 2).float(), "computes in bfloat16"),
        (lambda x: x.repeat(1, 1 << 15).sum(1), "sums 131072 numbers"),
        (lambda x: x[:, :, None].expand(-1, -1, 1 << 15).mean((1, 2)), "sums 131072 numbers"),
        (lambda x: x.repeat(1, 1 << 15).cumsum(1)[:, -1], "sums 131072 numbers"),
    ],
    ids=["topk", "sort", "argsort", "angle", "denormal", "half", "bfloat16", "sum", "mean", "cumsum"],
)
def test_operators_that_it_does_otherwise_are_refused(function: Callable[[torch.Tensor], Any], said: str) -> None:
    with pytest.raises(UnsuitableError, match=said):
        check(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.topk(x, 2)[0] + torch.sort(x, 1)[0][:, :2],
        lambda x: torch.sort(x, dim=1, stable=True)[1] + x.argsort(dim=1, stable=True),
        lambda x: x.max(1)[1] + x.argmin(1),
        lambda x: x.half(),
        lambda x: x @ torch.ones(4, 3, dtype=torch.float16).float(),
        lambda x: x.repeat(1, 1 << 14).sum(1) + x.repeat(1, 1 << 15).reshape(-1, 256, 512).mean(1).sum(1),
    ],
    ids=["values", "stable", "argmax", "half at the end", "half weights", "sums"],
)
def test_those_that_it_does_alike_are_not(function: Callable[[torch.Tensor], Any]) -> None:
    check(function)


def attended(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    rows = x[:, None, :, None].expand(-1, -1, -1, 4)
    return F.scaled_dot_product_attention(rows, rows, rows, mask)


def test_attention_to_nothing_is_refused_where_it_would_be_hidden() -> None:
    for function in (
        lambda x: attended(x, x[:, None, None, :] > 0).relu(),
        lambda x: attended(x, x[:, None, :, None] > 0).sum((1, 3)).argmax(1),
    ):
        with pytest.raises(UnsuitableError, match="may be masked wholly"):
            check(function)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: attended(x, None).relu(),
        lambda x: attended(x, torch.ones(4, 4, dtype=torch.bool).tril()).relu(),
        lambda x: (y := x[:, None, :, None] + attended(x, x[:, None, None, :] > 0)) + y.relu(),
        lambda x: (y := attended(x, x[:, None, None, :] > 0), y.argmax(2)),
    ],
    ids=["no mask", "a mask of its own", "a sum goes around", "another output"],
)
def test_attention_whose_nan_shows_is_not(function: Callable[[torch.Tensor], Any]) -> None:
    check(function)
