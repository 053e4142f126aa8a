"""One request's input, and how an unusable one is described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyserve.handler import InputError
from pyserve.json_array import JsonArray


def row_value(row: Any) -> Any:
    """The value of one request's row: its field ``data``, else its field ``body``; a row that is no dict is the value.

    Raises:
        InputError: the row has other fields only.
    """
    if not isinstance(row, Mapping):
        return row
    # Not `or`: an empty list or the number 0 in `data` is a value.
    value = row.get("data")
    if value is None:
        value = row.get("body")
        if value is None and "body" not in row and "data" not in row:
            fields = ", ".join(repr(str(name)) for name in list(row)[:5]) or "none"
            raise InputError(
                f"the request has no input: send it as body or form field 'data'; its fields: {fields}. (curl -d sends "
                "a form unless -H 'Content-Type: ...' says otherwise; curl -T sends a file as it is.)"
            )
    return value


def found(value: Any) -> str:
    """A few words on an unusable value, safe to send to the client who sent it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 0:
            return "an empty body"
        start = bytes(value[:16]).decode("ascii", "replace")
        shown = start if start.isprintable() and "\ufffd" not in start else bytes(value[:8]).hex(" ")
        return f"{len(value)} bytes starting with {shown!r}"
    if isinstance(value, str):
        return f"text of {len(value)} characters starting with {value[:16]!r}" if value else "empty text"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:24]}" if isinstance(value, float) or abs(value) < 10**20 else "a huge number"
    if isinstance(value, Mapping):
        names = ", ".join(repr(str(name)[:24]) for name in list(value)[:3])
        return f"a JSON object with {len(value)} members ({names})" if value else "an empty JSON object"
    if isinstance(value, (list, tuple, JsonArray)):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"
