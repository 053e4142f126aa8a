"""Large arrays of numbers, read by the engine: bit by bit the tensors, and word by word the errors, of lists."""

from __future__ import annotations

import math
import os
import random
import struct
from collections.abc import Callable

import pytest
import torch

from pyserve.api.open_inference import InferInput, tensor_of
from pyserve.errors import ServeError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.json_numbers import KINDS
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.json_array import JsonArray
from pyserve.request import json_slices
from pyserve.request.datatypes import DATATYPES
from pyserve.request.json_body import parse_json

SEED = int(os.environ.get("PYSERVE_SEED") or random.SystemRandom().randrange(1 << 32))
EDGES = [65504, 65519, 65520, 65536, 3.4028235e38, 3.4028236e38, 2**63 - 1, 2**62 + 1, 2**53 + 1, 2**24 + 1]


class Numbers:
    """Random numbers as JSON may have them."""

    def __init__(self, source: random.Random):
        self.source = source

    def any(self) -> str:
        source, kind = self.source, self.source.random()
        if kind < 0.3:
            return self.whole()
        if kind < 0.35:
            return "-0"
        if kind < 0.45:  # any double there is
            (double,) = struct.unpack("<d", struct.pack("<Q", source.getrandbits(64)))
            return repr(double) if math.isfinite(double) else "1E5"
        if kind < 0.5:
            return f"{source.randrange(-99, 99)}e{source.randrange(-50, 50)}"
        if kind < 0.55:
            return f"{source.randrange(2**24 - 5, 2**24 + 70)}.{source.randrange(10 ** source.randrange(1, 30))}"
        if kind < 0.6:
            return str(source.choice(EDGES))
        if kind < 0.63:
            return "0." + "".join(source.choice("0123456789") for _ in range(source.randrange(1, 500)))
        return repr(source.gauss(0, 10))

    def whole(self) -> str:
        bits = 2 ** self.source.randrange(1, 66)
        return str(self.source.randrange(-bits, bits))

    def small(self) -> str:
        return str(self.source.randrange(-3, 300))

    def bit(self) -> str:
        return self.source.choice("01")


def nested(shape: list[int], number: Callable[[], str]) -> str:
    if not shape:
        return number()
    return f"[{','.join(nested(shape[1:], number) for _ in range(shape[0]))}]"


def outcome(make: Callable[[], torch.Tensor]) -> tuple[object, ...]:
    try:
        tensor = make()
    except ServeError as error:
        return type(error), error.message
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_arrays_become_what_lists_become(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(SEED)
    print(f"PYSERVE_SEED={SEED}")
    monkeypatch.setattr(json_slices, "SIZE_MIN", 1)
    monkeypatch.setattr(json_slices, "PIECE_SIZE", 1)
    numbers, handler, arrays_count = Numbers(source), BaseHandler(), 0
    for _ in range(1500):
        shape = [source.randrange(1, 5) for _ in range(source.randrange(1, 4))]
        number = source.choice([numbers.small, numbers.bit, numbers.whole, numbers.any, numbers.any])
        body = bytearray(nested(shape, number).encode())
        lists, array = parse_json(body), parse_json(body, in_slices=True, takes_arrays=True)
        arrays_count += isinstance(array, JsonArray)
        sizes = tuple(-1 if source.random() < 0.3 else size for size in shape)
        if source.random() < 0.1:
            sizes = (*sizes[:-1], 7)
        dtype = source.choice(sorted(KINDS))
        spec = TensorSpec(dtype, sizes, values=(0, 5) if source.random() < 0.3 and dtype != "bool" else None)
        said = (SEED, bytes(body), spec)
        assert outcome(lambda: spec.read_nested(array)) == outcome(lambda: spec.read_nested(lists)), said  # noqa: B023
        plain = [outcome(lambda: handler.preprocess([{"body": each}])) for each in (array, lists)]  # noqa: B023
        assert plain[0] == plain[1], said
        datatype = source.choice(sorted(set(DATATYPES) - {"BYTES"}))
        asked = tuple(shape) if source.random() < 0.7 else (math.prod(shape),)
        inputs = [InferInput("x", datatype, asked, each) for each in (array, lists)]
        assert outcome(lambda: tensor_of(inputs[0])) == outcome(lambda: tensor_of(inputs[1])), (said, datatype)  # noqa: B023
    assert arrays_count > 1000


@pytest.mark.parametrize(
    "text", ["[[1,2],[3]]", "[1,[2]]", "[]", "[[]]", "[1,true]", "[1,NaN]", "[9223372036854775808]"]
)
def test_what_is_no_regular_array_of_numbers_stays_lists(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_slices, "SIZE_MIN", 1)
    monkeypatch.setattr(json_slices, "PIECE_SIZE", 1)
    body = bytearray(text.encode())
    assert repr(parse_json(body, in_slices=True, takes_arrays=True)) == repr(parse_json(body))
