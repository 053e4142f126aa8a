"""What a handler returned, as JSON: in TorchServe's form, and for more types than the standard library knows.

Arrays and tensors become lists; dataclasses objects; dates text; NaN and infinities, for which JSON has no word, null.
Does not need torch or numpy.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from json.encoder import encode_basestring_ascii
from pathlib import PurePath
from typing import Any, NamedTuple
from uuid import UUID

from pyserve.request import quick_json

_DEPTH_MAX = 100


def dump(value: Any, on_nan: Callable[[], None] | None = None) -> bytes:
    """JSON with an indent of 2, ASCII only, as TorchServe writes it.

    Args:
        on_nan: told when NaN or an infinity was written as null. None: they are written as NaN, as TorchServe does.

    Raises:
        TypeError, ValueError, RecursionError: it has no form in JSON; see `find_not_json`.
    """
    text = quick_json.write(value)
    if text is not None:
        return _in_ascii(text)
    if on_nan is None:
        return json.dumps(value, indent=2, default=plain).encode()
    try:
        return json.dumps(value, indent=2, default=plain, allow_nan=False).encode()
    except ValueError:
        without = json.dumps(_without_nan(value, 0), indent=2, default=plain, allow_nan=False)
    on_nan()
    return without.encode()


def _in_ascii(text: bytes) -> bytes:
    """JSON in UTF-8 as the standard library escapes it: DEL, and all that is not ASCII. Both stand in strings only."""
    if text.isascii() and b"\x7f" not in text:
        return text
    return _REST_TO_ESCAPE.sub(_escaped, text.decode()).encode()


# From a character to be escaped on, as far as no other one of JSON's own escapes or the end of the string comes.
_REST_TO_ESCAPE = re.compile(r'[^\n -~][^"\\\n]*')


def _escaped(match: re.Match[str]) -> str:
    return encode_basestring_ascii(match[0])[1:-1]


def plain(value: Any) -> Any:
    """``value`` in terms of lists, dicts, text and numbers, one step of the way.

    Raises:
        TypeError: it has none.
    """
    if hasattr(value, "tolist"):  # of numpy or torch; scalars have it too
        return value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (UUID, PurePath)):
        return str(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _without_nan(value: Any, depth: int) -> Any:
    if depth > _DEPTH_MAX:
        raise ValueError("nested too deeply, or holds itself")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(each, depth + 1) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each, depth + 1) for each in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return _without_nan(plain(value), depth + 1)


class NotJson(NamedTuple):
    """Something in a result that cannot become JSON; ``place`` is like ``["boxes"][0]``, with `` at `` before it."""

    type: str
    place: str
    fix: str


def find_not_json(value: Any) -> NotJson | None:
    """The first thing in ``value`` that has no form in JSON; None if it is all fine."""
    return _find(value, "", 0)


def _find(value: Any, place: str, depth: int) -> NotJson | None:
    if depth > _DEPTH_MAX:
        return NotJson("a value that holds itself", f" at {place[:80]}", "flatten it")
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                return NotJson(f"a key of {type(key)}", f" at {place}" if place else "", "use str(key)")
            found = _find(each, f"{place}[{json.dumps(key)}]", depth + 1)
            if found is not None:
                return found
        return None
    if isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            found = _find(each, f"{place}[{index}]", depth + 1)
            if found is not None:
                return found
        return None
    if value is None or isinstance(value, (str, int, float)):
        return None
    try:
        made = plain(value)
    except Exception:  # whatever somebody's class does when it is asked
        return NotJson(f"a {type(value)}", f" at {place}" if place else "", _how_to_convert(value))
    return _find(made, place, depth + 1)


def _how_to_convert(value: Any) -> str:
    if isinstance(value, (bytes, bytearray)):
        return "convert it with base64.b64encode(value).decode()"
    if isinstance(value, (set, frozenset)):
        return "convert it with sorted(value)"
    return "convert it with str(value), or to a dict of what it holds"
