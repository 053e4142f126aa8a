"""Large values written as JSON in pieces, so that other threads get a turn between two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# Values that are written in one go: in 2 ms.
VALUES_MAX = 16 << 10

Write = Callable[[Any], bytes]
_SCALARS = frozenset((float, int, str, bool, type(None)))


def dump_in_slices(value: Any, write: Write, *, indent: int = 0) -> bytes:
    """What ``write(value)`` gives, in calls for at most `VALUES_MAX` values each, as far as ``value`` is of lists and
    dicts.

    Args:
        write: lists and objects as the standard library writes them, in ASCII or UTF-8.
        indent: the one that it writes with.

    Raises:
        Exception: whatever ``write`` raises.
    """  # fmt: skip
    return b"".join(_Writer(write, indent).pieces(value, 0))


class _Writer:
    def __init__(self, write: Write, indent: int):
        self._write = write
        self._indent = indent
        example = write([0, 0])  # [0, 0] with what stands between two
        self._comma = b"," if indent else example[2:-2]

    def pieces(self, value: Any, level: int) -> Iterator[bytes]:
        if _count(value, VALUES_MAX) <= VALUES_MAX:
            yield self._shifted(self._write(value), level)
            return
        is_object = isinstance(value, dict)
        yield b"{" if is_object else b"["
        is_first = True
        for members, child in _runs(value):
            if not is_first:
                yield self._comma
            is_first = False
            if child is None:
                yield self._inside(members, level)
            else:
                yield self._inside(members, level)[: -len(b"null")]
                yield from self.pieces(child, level + 1)
        yield self._line(level) + (b"}" if is_object else b"]")

    def _line(self, level: int) -> bytes:
        return b"\n" + b" " * (self._indent * level) if self._indent else b""

    def _inside(self, members: Any, level: int) -> bytes:
        """The members of a list or an object of ``level``, without its brackets."""
        text = self._write(members)[1:-1]
        return self._shifted(text[:-1] if self._indent else text, level)

    def _shifted(self, text: bytes, level: int) -> bytes:
        # Strings have no line feeds of their own in JSON.
        return text.replace(b"\n", self._line(level)) if self._indent and level else text


def _runs(value: Any) -> Iterator[tuple[Any, Any]]:
    """Parts of a list or a dict, in order: of few values; or of one member that has many, with None in its place and
    itself beside it.
    """
    if not isinstance(value, dict):
        pieces = [value[at : at + VALUES_MAX] for at in range(0, len(value), VALUES_MAX)]
        if all(_SCALARS.issuperset(map(type, piece)) for piece in pieces):
            for piece in pieces:
                yield piece, None
            return
    make: Any = dict if isinstance(value, dict) else list
    members: list[Any] = []
    count = 0
    for member in value.items() if make is dict else value:
        child = member[1] if make is dict else member
        size = _count(child, VALUES_MAX)
        if members and count + size > VALUES_MAX:
            yield make(members), None
            members, count = [], 0
        if size > VALUES_MAX:
            yield make([(member[0], None)] if make is dict else [None]), child
        else:
            members.append(member)
            count += size
    if members:
        yield make(members), None


def _count(value: Any, enough: int) -> int:
    """How many values ``value`` holds; some number above ``enough`` if it is more."""
    if not isinstance(value, (list, tuple, dict)):
        return 1
    if len(value) > enough:
        return len(value)
    parts = value.values() if isinstance(value, dict) else value
    count = len(value) + 1
    if _SCALARS.issuperset(map(type, parts)):
        return count
    for part in parts:
        if isinstance(part, (list, tuple, dict)):
            count += _count(part, enough)
            if count > enough:
                break
    return count
