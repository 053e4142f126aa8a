"""JSON by orjson, where that gives what the standard library does: the same bytes, the same values. Else nothing.

Callers ask the standard library next when the answer is None (`write`) or `UNREAD` (`read`): for what orjson spells,
takes or refuses otherwise, and where it is not installed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any, Final

DEPTH_MAX = 100  # of what is written; a value that holds itself has no end

_SCALARS = frozenset((float, int, str, bool, type(None)))
_CONTAINERS = (list, dict, tuple)
_NO_NUMBERS = frozenset((str, bool, type(None)))

# In indented text each number ends its line, and no string does. Below 0.0001 orjson writes 0.00001 and 1e-7, where
# Python writes 1e-05 and 1e-07. The patterns begin with letters, not with a condition, so that they are found quickly.
_ONE_DIGIT = re.compile(rb"e-(?=[0-9],?$)", re.MULTILINE)
_FOUR_ZEROS = re.compile(rb"0\.0000([0-9])([0-9]*)(?=,?$)", re.MULTILINE)

# Of a body: digits as 0, points as themselves, all else as a space. Integers of 19 digits may have more than 64 bits.
_SHAPE = bytes(ord("0") if 48 <= each <= 57 else each if each == ord(".") else ord(" ") for each in range(256))
_LONG_INTEGER = b" " + b"0" * 19

UNREAD: Final = object()


def write(value: Any) -> bytes | None:
    """``json.dumps(value, indent=2, ensure_ascii=False)`` in UTF-8; None if that is to be asked instead.

    That is for NaN and infinities, integers of more than 64 bits, lone surrogates, a scalar alone, and all types but
    lists, tuples, dicts with text as keys, text, numbers, booleans and None.
    """
    if _orjson is None or not _is_simple(value, 0):
        return None
    try:
        text: bytes = _orjson.dumps(value, option=_orjson.OPT_INDENT_2)
    except (TypeError, RecursionError):  # its JSONEncodeError is a TypeError
        return None
    if b"null" in text and not _is_finite(value):
        return None  # it writes NaN as null, too
    return _as_python_spells(text)


def _is_simple(value: Any, depth: int) -> bool:
    """Whether ``value`` is a container of nothing but exactly these types, all the way down."""
    kind = type(value)
    parts: Iterable[Any]
    if kind is dict:
        if not {str}.issuperset(map(type, value)):
            return False
        parts = value.values()
    elif kind in (list, tuple):
        parts = value
    else:
        return False
    if _SCALARS.issuperset(map(type, parts)):
        return True
    if depth >= DEPTH_MAX:
        return False
    return all(type(part) in _SCALARS or _is_simple(part, depth + 1) for part in parts)


def _is_finite(value: Any) -> bool:
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    if kind in _CONTAINERS:
        return all(map(_is_finite, value.values() if kind is dict else value))
    return True


def _as_python_spells(text: bytes) -> bytes:
    """Indented ``text`` with its floats in the words of ``repr``."""
    if b"e-" in text:
        text = _ONE_DIGIT.sub(b"e-0", text)
    return _FOUR_ZEROS.sub(_with_exponent, text) if b"0.0000" in text else text


def _with_exponent(match: re.Match[bytes]) -> bytes:
    """``1.25e-05`` for ``0.0000125``; the end of ``10.0000125`` as it is."""
    if match.string[match.start() - 1] not in b" -":
        return match[0]
    first, rest = match.groups()
    return first + b"." + rest + b"e-05" if rest else first + b"e-05"


def read(body: bytes | bytearray, depth_max: int) -> Any:
    """``json.loads(body)``, if no object in it has a member twice; `UNREAD` if that is to be asked instead.

    That is for what is no JSON for orjson (NaN, lone surrogates, 1e999, other encodings than UTF-8), for what may be an
    integer of more than 64 bits, which it would make a float of, for what may have a member twice, and for what is
    nested more than ``depth_max`` levels deep.
    """
    if _orjson is None:
        return UNREAD
    try:
        value = _orjson.loads(body)
    except ValueError:
        return UNREAD
    objects, members = body.count(b"{"), 0
    if objects == 1 and type(value) is dict and body.count(b"[") < depth_max:
        members = len(value)
    elif objects or body.count(b"[") > depth_max:
        members = _member_count(value, depth_max)
    # Each member has a colon. If there are no more colons than members are left, none was overwritten by another one.
    if members < 0 or (objects and body.count(b":") != members):
        return UNREAD
    if not _NO_NUMBERS.issuperset(map(type, _parts(value))):
        shape = body.translate(_SHAPE)
        if _LONG_INTEGER in shape or shape.startswith(_LONG_INTEGER[1:]):
            return UNREAD
    return value


def _member_count(value: Any, depth_max: int) -> int:
    """How many members all objects in ``value`` have; -1 if it is nested more than ``depth_max`` levels deep."""
    count, level = 0, [value]
    for _ in range(depth_max):
        deeper: list[Any] = []
        for each in level:
            if type(each) is dict:
                count += len(each)
            parts = _parts(each)
            if not _SCALARS.issuperset(map(type, parts)):
                deeper += [part for part in parts if type(part) not in _SCALARS]
        if not deeper:
            return count
        level = deeper
    return -1


def _parts(value: Any) -> Iterable[Any]:
    kind = type(value)
    return value.values() if kind is dict else value if kind is list else (value,)


def _checked() -> ModuleType | None:
    """orjson, if it is installed and its floats can be spelled as Python's are; before 3.12 it wrote 1e16 for 1e+16."""
    try:
        import orjson
    except ImportError:
        return None
    exponents = [*range(-12, 25), -324, -308, -100, 100, 308]
    floats = [float(f"{number}e{exponent}") for exponent in exponents for number in ("1", "-1", "1.25")]
    try:
        text = _as_python_spells(orjson.dumps(floats, option=orjson.OPT_INDENT_2))
    except (AttributeError, TypeError):
        return None
    return orjson if text == json.dumps(floats, indent=2).encode() else None


_orjson = _checked()
