"""Random descriptions and random items: each way in accepts the same items, and makes the same tensor of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyserve.api.kserve_requests import tensors_for
from pyserve.api.open_inference import InferInput, check_input
from pyserve.handler import InputError
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.request.datatypes import datatype_of

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "31"))
DTYPES = ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint16", "uint64"]


def random_description(random: np.random.Generator) -> dict[str, Any]:
    entry: dict[str, Any] = {"dtype": str(random.choice(DTYPES)), "shape": []}
    for _ in range(random.integers(1, 4)):
        low = int(random.integers(1, 4))
        entry["shape"].append(random.choice([f"{low}..{low + 2}", f"{low}..", f"..{low}", str(low)]).item())
    entry["shape"] = [int(size) if size.isdigit() else size for size in entry["shape"]]
    if random.random() < 0.7:
        entry["values"] = [int(random.integers(0, 3)), int(random.integers(3, 9))]
    return entry


def random_item(random: np.random.Generator, spec: TensorSpec) -> np.ndarray[Any, Any]:
    sizes = [int(random.integers(max(1, low - 1), (high or low + 2) + 2)) for low, high in spec.sizes]
    if random.random() < 0.6:  # else one of them is most likely too small or too large
        sizes = [min(max(size, low), high or size) for size, (low, high) in zip(sizes, spec.sizes, strict=True)]
    low, high = spec.values or (0, 8)
    wide = int(random.random() < 0.3)
    numbers = random.integers(max(0, int(low) - wide), int(high) + 1 + wide, sizes)
    return numbers.astype(spec.dtype)


def outcome(read: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    try:
        return read()
    except InputError:
        return None


def protocol(spec: TensorSpec, item: np.ndarray[Any, Any], *, binary: bool) -> torch.Tensor:
    data = memoryview(bytearray(item.tobytes())) if binary else item.reshape(-1).tolist()
    tensor = InferInput("x", datatype_of(spec.torch_dtype), (1, *item.shape), data)
    check_input(tensor)
    return tensors_for([tensor], [spec])[0]


def is_allowed(spec: TensorSpec, item: np.ndarray[Any, Any]) -> bool:
    sizes = all(low <= size <= (high or size) for size, (low, high) in zip(item.shape, spec.sizes, strict=True))
    low, high = spec.values or (0, np.inf)
    return sizes and bool(((item >= low) & (item <= high)).all())


def outcomes(spec: TensorSpec, item: np.ndarray[Any, Any], *, has_bytes: bool) -> list[torch.Tensor | None]:
    """Of each way in; of raw bytes only where they tell the shape."""
    ways = [
        lambda: spec.from_nested(item.tolist()),
        lambda: protocol(spec, item, binary=True),
        lambda: protocol(spec, item, binary=False),
    ]
    if has_bytes:
        ways.append(lambda: spec.from_bytes(item.tobytes()))
    return [outcome(way) for way in ways]


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
def test_every_way_in_takes_the_same_items_for_the_same_tensors(seed: int) -> None:
    print(f"PYSERVE_TEST_SEED={seed}")
    random = np.random.default_rng(seed)
    counts = {True: 0, False: 0}
    for _ in range(60):
        spec = TensorSpec.from_config({"input": random_description(random)})
        item = random_item(random, spec)
        expected = is_allowed(spec, item)
        counts[expected] += 1
        for got in outcomes(spec, item, has_bytes=expected and spec.shape.count(-1) <= 1):
            assert (got is not None) == expected, (str(spec), item.tolist())
            if got is not None:
                assert got.dtype is spec.torch_dtype and got[0].tolist() == item.tolist()
    assert min(counts.values()) > 5
