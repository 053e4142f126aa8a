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


# First bytes -> what a file is that is sent where something else is expected.
_FILES = (
    (b"\x93NUMPY", "a NumPy file (.npy); send its numbers alone, array.tobytes(), or as JSON"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip file, such as torch.save and numpy.savez write"),
    (b"\x1f\x8b", "gzipped data; send Content-Encoding: gzip with it"),
)


def kind_of_file(start: bytes) -> str:
    """What begins with these bytes, 12 or more of them, in a few words; ``""`` for what is not known."""
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "a HEIC picture, as phones take them; convert it to JPEG"
    return next((kind for magic, kind in _FILES if start.startswith(magic)), "")


def found(value: Any) -> str:
    """A few words on an unusable value, safe to send to the client who sent it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        if len(value) == 0:
            return "an empty body"
        kind = kind_of_file(bytes(value[:32]))
        if kind:
            return f"{len(value)} bytes, {kind}"
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
        count = f"{len(value)} member{'s' if len(value) > 1 else ''}"
        return f"a JSON object with {count} ({names})" if value else "an empty JSON object"
    if isinstance(value, (list, tuple, JsonArray)):
        return f"a list of {len(value)}"
    return f"a value of type {type(value).__name__}"
