"""What a built-in handler would not read of a request, or would read as something else than was sent, is refused.

Handlers of an archive's own may read any field, and what a value is they know themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pyserve.handler import InputError

# Read by the server (which model, the beginning of a sequence), or by explanations.
READ_ELSEWHERE = frozenset({"target", "model_name", "ts_request_sequence_start"})
NAME_SHOWN_MAX = 100
_JSON = "application/json"
_UTF8 = ("", "utf-8", "utf8", "us-ascii", "ascii")


def is_built_in(handler: object) -> bool:
    """Whether ``handler`` is pyserve's own, and no class that is derived from one."""
    return type(handler).__module__.startswith("pyserve.handlers.")


def check_row(
    handler: Any, row: Mapping[str, Any], types: Mapping[str, str], *, decodes: bool = True, start_key: str = ""
) -> None:
    """Checks the decoded fields of one request to a built-in ``handler``.

    Args:
        types: content types as sent, by field; of those that came without one there is none.
        decodes: whether JSON and text were decoded.
        start_key: the field by which a sequence begins, if it has another name than TorchServe's.

    Raises:
        InputError: a field is not read, or a value is not what its content type says.
    """
    inputs = _inputs_in(handler, row)
    for name in row:
        if name not in inputs and name not in READ_ELSEWHERE and name != start_key and inputs:
            known = ", ".join(map(repr, sorted(inputs)))
            raise InputError(
                f"the request has a field {name[:NAME_SHOWN_MAX]!r} that nothing reads; its input is {known}"
            )
    for name in inputs:
        _check_value(handler, name, row[name], types.get(name, ""), decodes=decodes)


def _inputs_in(handler: Any, row: Mapping[str, Any]) -> frozenset[str]:
    """The fields that the handler will read; none if it will say itself what it misses."""
    names = frozenset(spec.name for spec in getattr(handler, "specs", ()) if spec.name)
    if names and names <= set(row):
        return names
    for name in ("data", "body"):
        if row.get(name) is not None:
            return frozenset((name,))
    return frozenset()


def _check_value(handler: Any, name: str, value: Any, content_type: str, *, decodes: bool) -> None:
    media, _, parameters = content_type.lower().partition(";")
    media = media.strip()
    if isinstance(value, str):
        charset = parameters.partition("charset=")[2].partition(";")[0].strip(' "')
        if charset not in _UTF8 and not value.isascii():
            raise InputError(f"{name} is text in {charset[:40]!r} by its content type; only UTF-8 is read, send that")
    elif isinstance(value, (bytes, bytearray, memoryview)) and value:
        takes_numbers = bool(getattr(handler, "specs", ()))
        if takes_numbers:
            _check_raw(handler, name, value, media)
        elif media == _JSON and decodes and handler.sample_kind not in ("picture", "saved tensor"):
            raise InputError(f"{name} was sent as {_JSON}, but it is not JSON")


def _check_raw(handler: Any, name: str, value: Any, media: str) -> None:
    """Bytes that would be taken for numbers in memory, though they are text."""
    if media == _JSON or media.startswith("text"):
        raise InputError(
            f"{name} was sent as {media[:NAME_SHOWN_MAX]} and could not be read as that; send JSON in UTF-8 as "
            f"{_JSON}, with nothing after that in the content type of a form's part, and numbers as they lie in memory "
            "as application/octet-stream"
        )
    spec = next((spec for spec in handler.specs if spec.name == name), handler.specs[0])
    if media or spec.torch_dtype.itemsize == 1 or value[0] != ord("[") or value[-1] != ord("]"):
        return
    try:
        json.loads(bytes(value))
    except (ValueError, RecursionError):
        return
    raise InputError(
        f"{name} came without a content type and is JSON, but numbers as they lie in memory are expected then; send it "
        f"as {_JSON}, or as application/octet-stream if the bytes are meant"
    )
