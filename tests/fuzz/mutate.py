"""Inputs made of the corpus at random, by a seed: what fuzzing is without coverage."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1)
_CHANGES_MAX = 6


def mutations(corpus: Sequence[bytes], words: Sequence[bytes], size_max: int, seed: int) -> Iterator[bytes]:
    """Endless inputs of at most ``size_max`` bytes; the same ones for the same arguments."""
    chance = random.Random(seed)
    while True:
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.randint(1, _CHANGES_MAX)):
            _change(data, corpus, words, chance)
        yield bytes(data[:size_max])


def _change(data: bytearray, corpus: Sequence[bytes], words: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(9)
    if kind == 0:
        data[at : at + 1] = bytes([chance.randrange(256)])
    elif kind == 1 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del data[at : at + chance.choice((1, 2, 4, 16, 256))]
    elif kind == 3:
        data[at:at] = data[at : at + chance.choice((1, 2, 8, 64, 512))]
    elif kind == 4:
        size = chance.choice((1, 2, 4, 8))
        number = (chance.choice(_EDGES) + chance.randint(-1, 1)) % 256**size
        data[at : at + size] = number.to_bytes(size, "little")
    elif kind == 5 and words:
        word = chance.choice(words)
        data[at : at + len(word) * chance.randrange(2)] = word  # put in, or put over
    elif kind == 6:
        other = chance.choice(corpus)
        begin = chance.randrange(len(other) + 1)
        data[at:] = other[begin:]
    elif kind == 7:
        other = chance.choice(corpus)
        begin = chance.randrange(len(other) + 1)
        data[at:at] = other[begin : begin + chance.choice((4, 32, 256))]
    elif 48 <= data[at - 1] <= 57 if data else False:  # a digit
        data[at - 1 : at] = str(chance.choice(_EDGES)).encode()
