"""Large JSON read in pieces: the same values and the same errors as read as a whole, and no large step."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from pyserve.engine import load_core
from pyserve.errors import InputError
from pyserve.json_array import JsonArray
from pyserve.request import json_body, json_slices, quick_json

SEED = int(os.environ.get("PYSERVE_SEED") or random.SystemRandom().randrange(1 << 32))
DOCUMENTS = int(os.environ.get("PYSERVE_JSON_DOCUMENTS", "3000"))

SCALARS = [
    "0", "-0", "1", "-1.5", "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-Infinity", "true", "false", "null", '"a"',
    r'"é"', r'"\ud800"', '"é日😀"', '"a,]}"', r'"\""', '""', "12345678901234567890", "9223372036854775808",
    "-9223372036854775808", "1" * 30, "1" * 4301, "0.1", "1E5",
]  # fmt: skip
NOT_SCALARS = ["01", "1.", "-", ".5", "tru", r'"\x"', '"\t"', "'a'", "\ufeff", "+1", "1_0"]
NAMES = ["a", "b", "c", "é", "data", "k1", "k2", "k3", "k4"]


class Documents:
    """Random JSON, and what looks like it."""

    def __init__(self, source: random.Random):
        self.source = source

    def one(self) -> bytearray:
        text = self._value(self.source.randrange(1, 6))
        if self.source.random() < 0.02:
            depths = [self.source.choice([98, 99, 100, 101]) for _ in range(2)]
            text = "[" * depths[0] + text + "]" * depths[1]
        body = text.encode("utf-8", "surrogatepass")
        if self.source.random() < 0.4:
            body = self._spoiled(body)
        if self.source.random() < 0.05:
            body = body.decode("utf-8", "replace").encode(self.source.choice(["utf-8-sig", "utf-16", "utf-32-le"]))
        return bytearray(b"  "[: self.source.randrange(3)] + body + b" \n"[: self.source.randrange(3)])

    def _value(self, depth: int) -> str:
        source, kind = self.source, self.source.random()
        if depth == 0 or kind < 0.5:
            return source.choice(SCALARS if source.random() < 0.998 else NOT_SCALARS)
        if kind < 0.6:
            width = source.randrange(1, 5)
            rows = [[source.choice([7, -3, 0.25, 1e20]) for _ in range(width)] for _ in range(source.randrange(6))]
            return json.dumps(rows)
        items = [self._value(depth - 1) for _ in range(source.randrange(7))]
        if kind < 0.8:
            return f"[{self._blank()}{','.join(self._blank() + each + self._blank() for each in items)}]"
        members = [f'"{source.choice(NAMES)}"{self._blank()}:{self._blank()}{each}' for each in items]
        return f"{{{self._blank()}{','.join(self._blank() + each for each in members)}{self._blank()}}}"

    def _blank(self) -> str:
        return self.source.choice(["", "", "", " ", "\n", "\t ", " \r\n"])

    def _spoiled(self, body: bytes) -> bytes:
        at, kind = self.source.randrange(len(body) + 1), self.source.random()
        if kind < 0.3:
            return body[:at] + body[at + 1 :]
        if kind < 0.7:
            return body[:at] + bytes([self.source.choice(b'[]{},:"\\ 01-.eE\n\xff')]) + body[at:]
        return body[:at] if kind < 0.85 else body + self.source.choice([b"]", b"}", b",", b":", b'"', b" 1"])


def outcome(read: Callable[[], Any]) -> tuple[str, str]:
    try:
        return "value", repr(plain(read()))
    except InputError as error:
        return type(error).__name__, error.message


def plain(value: Any) -> Any:
    if isinstance(value, JsonArray):
        return value.values()
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(SEED)
    documents = Documents(source)
    print(f"PYSERVE_SEED={SEED}")
    monkeypatch.setattr(json_slices, "SIZE_MIN", 1)
    core, cut = load_core(), 0
    for _ in range(DOCUMENTS):
        body = documents.one()
        monkeypatch.setattr(json_slices, "PIECE_SIZE", source.choice([1, 2, 5, 20, 60]))
        cut += bool(core.json_plan(body.decode("latin-1"), json_slices.PIECE_SIZE, False)[0])
        for lenient in (False, True):
            wanted = outcome(lambda: json_body.parse_json(body, lenient=lenient))  # noqa: B023
            for arrays in (False, True):
                read = outcome(
                    lambda: json_body.parse_json(body, lenient=lenient, in_slices=True, takes_arrays=arrays)  # noqa: B023
                )
                assert read == wanted, (SEED, bytes(body), lenient, arrays, json_slices.PIECE_SIZE)
    assert cut > DOCUMENTS // 10


def test_no_step_reads_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    read, decode = quick_json.read, json_slices._Reader._decoded

    def counting_read(body: bytes, depth_max: int) -> Any:
        sizes.append(len(body))
        return read(body, depth_max)

    def counting_decode(self: Any, decoder: Any, whole: str, start: int) -> Any:
        sizes.append(len(whole))
        return decode(self, decoder, whole, start)

    monkeypatch.setattr(quick_json, "read", counting_read)
    monkeypatch.setattr(json_slices._Reader, "_decoded", counting_decode)
    value = {
        "numbers": list(range(200_000)),
        "rows": [[1, 2, None]] * 60_000,
        "texts": [f"text {number}," for number in range(50_000)],
        "members": {f"name{number}": {"x": number} for number in range(40_000)},
        "deep": [[[list(range(100))] * 30] * 30],
    }
    body = bytearray(json.dumps(value).encode())
    assert json_body.parse_json(body, in_slices=True) == value
    # Whole members, up to the comma after the size of a piece; none of them is larger than some thousand characters.
    assert len(sizes) > len(body) // json_slices.PIECE_SIZE
    assert max(sizes) < json_slices.PIECE_SIZE * 5 // 4


def test_errors_are_found_without_reading_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytearray(b"[" + b",".join(b"%d" % number for number in range(200_000)) + b",oops]")
    with pytest.raises(InputError) as whole:
        json_body.parse_json(body)
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("read as a whole"))
    with pytest.raises(InputError) as pieces:
        json_body.parse_json(body, in_slices=True)
    assert pieces.value.message == whole.value.message


@pytest.mark.parametrize("member", ["", "data"])
def test_arrays_stand_only_where_they_are_asked_for(member: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_slices, "PIECE_SIZE", 1)
    text = '{"data": [1, 2], "other": [3, 4], "rows": [[5, 6], "x"], "inner": {"data": [[7.5, 8]]}}'
    value = json_slices.read(text, twice=None, takes_arrays=True, array_member=member)
    assert isinstance(value["data"], JsonArray)
    assert isinstance(value["other"], list if member else JsonArray)
    assert value["rows"] == [[5, 6], "x"]
    assert value["inner"]["data"].shape == (1, 2)


def test_a_large_body_of_a_member_twice_is_refused() -> None:
    body = bytearray(json.dumps({"a": list(range(50_000)), "b": 1}).encode()[:-1] + b', "a": 2}')
    with pytest.raises(InputError, match="'a' more than once"):
        json_body.parse_json(body, in_slices=True)
    assert json_body.parse_json(body, in_slices=True, lenient=True) == {"a": 2, "b": 1}
