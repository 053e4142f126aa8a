"""Heads: what csrc/http/head.h takes is what `pyserve.http1.head` alone makes of it, in every respect.

An input is a byte that chooses the limit of header lines and whether clients' ids are taken, and then a head.
"""

from __future__ import annotations

from pyserve._http import read_plain
from pyserve.http1.head import Head, HeadReader
from pyserve.http1.limits import Http1Limits

ATTRIBUTES = (
    "method", "path", "query", "headers", "text", "is_http11", "keep_alive", "length", "chunked", "expect", "id",
    "has_timing", "is_simple",
)  # fmt: skip
COUNTS = (1, 4, 2000)


def check(data: bytes) -> None:
    choice = data[0] if data else 0
    compare(data[1:].partition(b"\r\n\r\n")[0] + b"\r\n\r\n", COUNTS[choice % 3], takes_ids=choice < 128)


def compare(head: bytes, header_count_max: int = 2000, *, takes_ids: bool = True) -> bool:
    """Returns whether the head, which ends with its first blank line, is plain."""
    plain = read_plain(head, header_count_max, takes_ids)
    if plain is None:
        return False
    limits = Http1Limits(header_count_max=header_count_max)
    alone = HeadReader(limits, takes_ids=takes_ids, read_plain=None).read(head)  # an error here is one of ours
    for name in ATTRIBUTES:
        found, expected = getattr(plain, name), getattr(alone, name)
        assert found == expected and type(found) is type(expected), f"{name}: {found!r}, not {expected!r}"
    names = {name.lower() for name, _ in alone.headers} | {"", "accept", "content-type", "Host", "é"}
    for name in names:
        assert plain.find(name) == alone.find(name), name
    assert texts_of(plain) == texts_of(alone)
    return True


def texts_of(head: Head) -> tuple[str, ...]:
    """As a client of the object finds them the second time."""
    return head.path, head.query, head.id, head.text, *(text for pair in head.headers for text in pair)
