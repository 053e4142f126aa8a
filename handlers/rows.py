"""One request's input, and how an unusable one is described."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from pyserve.body_kind import is_plain_text, kind_of_file
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
            fields = ", ".join(shown_field(str(name)) for name in list(row)[:5]) or "none"
            raise InputError(
                "the request has no input: curl -d sends a form, so send a file as it is (curl -T FILE), JSON with -H "
                f"'Content-Type: application/json', or a form with the field 'data'; its fields: {fields}"
            )
    return value


def unwrapped(value: Any, *names: str) -> Any:
    """What people send as ``{"data": ...}``: the one member of a JSON object that is called so, or by one of ``names``.

    Anything else as it is.
    """
    if isinstance(value, Mapping) and len(value) == 1:
        [(name, inner)] = value.items()
        if name == "data" or name in names:
            return inner
    return value


def bytes_of_base64(text: str) -> bytes | None:
    """What base64 text holds, also behind ``data:...;base64,`` and with line breaks; None if it is none."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError:  # binascii.Error is one
        return None


def shown_field(name: str) -> str:
    """A field's name for a message: what a file became that was sent as a form is no name."""
    if not name.isprintable() or "\ufffd" in name:
        size = sum(1 if each == "\ufffd" else len(each.encode("utf-8", "replace")) for each in name)
        return f"({size} bytes of binary)"
    return repr(name if len(name) <= FIELD_SHOWN_MAX else name[: FIELD_SHOWN_MAX - 3] + "...")


FIELD_SHOWN_MAX = 40


def found(value: Any) -> str:
    """A few words on an unusable value, safe to send to the client who sent it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 0:
            return "an empty body"
        kind = kind_of_file(bytes(value[:32]))
        if kind:
            return f"{len(value)} bytes, {kind}"
        start = bytes(value[:16])
        shown = start.decode() if is_plain_text(start) else start[:8].hex(" ")
        return f"{len(value)} bytes starting with {shown!r}"
    if isinstance(value, str):
        return f"text of {len(value)} characters starting with {value[:16]!r}" if value else "empty text"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:24]}" if isinstance(value, float) or abs(value) < 10**20 else "a huge number"
    if isinstance(value, Mapping):
        names = ", ".join(repr(str(name)[:24]) for name in list(value)[:3])
        count = f"{len(value)} member{'s' if len(value) > 1 else ''}"
        return f"a JSON object with {count} ({names})" if value else "an empty JSON object"
    if isinstance(value, (list, tuple, JsonArray)):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"
