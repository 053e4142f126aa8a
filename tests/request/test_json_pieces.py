"""Large JSON written in pieces: the same bytes as written at once."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import pytest

from pyserve.request import json_encoding, json_pieces

SEED = int(os.environ.get("PYSERVE_SEED") or random.SystemRandom().randrange(1 << 32))


def random_value(source: random.Random, depth: int) -> Any:
    kind = source.random()
    if depth == 0 or kind < 0.4:
        return source.choice([0, -1, 2.5, 1e-7, 1e22, True, None, "a", "é\n", "", "日", float("nan"), 2**70])
    count = source.randrange(9)
    if kind < 0.7:
        return [random_value(source, depth - 1) for _ in range(count)]
    if kind < 0.75:
        return tuple(random_value(source, depth - 1) for _ in range(count))
    return {f"name {number}": random_value(source, depth - 1) for number in range(count)}


def test_pieces_are_what_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(SEED)
    print(f"PYSERVE_SEED={SEED}")
    for _ in range(1500):
        monkeypatch.setattr(json_pieces, "VALUES_MAX", source.choice([1, 2, 5, 20]))
        value = random_value(source, 5)
        for write, indent in (
            (json_encoding.dump, 2),
            (lambda each: json_encoding.dump(each, lambda: None), 2),
            (lambda each: json.dumps(each).encode(), 0),
            (lambda each: json.dumps(each, separators=(",", ":")).encode(), 0),
        ):
            written = json_pieces.dump_in_slices(value, write, indent=indent)
            assert written == write(value), (SEED, value, indent)


def test_no_step_writes_more_than_a_piece() -> None:
    value = {"a": list(range(100_000)), "b": [[1.5] * 7] * 20_000, "c": {str(each): each for each in range(50_000)}}
    counts: list[int] = []

    def write(part: Any) -> bytes:
        counts.append(json_pieces._count(part, 1 << 40))
        return json.dumps(part).encode()

    assert json_pieces.dump_in_slices(value, write) == json.dumps(value).encode()
    assert max(counts) <= 2 * json_pieces.VALUES_MAX
