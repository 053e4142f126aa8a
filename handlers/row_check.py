"""What a built-in handler would not read of a request, or would read as something else than was sent, is refused.

Handlers of an archive's own may read any field, and what a value is they know themselves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from pyserve.handler import InputError
from pyserve.handlers.rows import found

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
    inputs: Collection[str] = row
    if len(row) > 1:  # of a lone field that it does not read the handler says so itself
        inputs = _inputs_in(handler, row)
        _check_names(inputs, [name for name in row if name not in READ_ELSEWHERE and name != start_key])
    for name in inputs:
        value = row[name]
        if isinstance(value, (str, bytes, bytearray, memoryview)):
            _check_value(handler, name, value, types.get(name, ""), decodes=decodes)


def _check_names(inputs: Collection[str], names: list[str]) -> None:
    unread = [name for name in names if name not in inputs]
    if unread and inputs:
        known = ", ".join(map(repr, sorted(inputs)))
        shown = repr(unread[0][:NAME_SHOWN_MAX])
        raise InputError(f"the request has a field {shown} that nothing reads; its input is {known}")


def _inputs_in(handler: Any, row: Mapping[str, Any]) -> Collection[str]:
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
        if not parameters:
            return
        charset = parameters.partition("charset=")[2].partition(";")[0].strip(' "')
        if charset not in _UTF8 and not value.isascii():
            raise InputError(f"{name} is text in {charset[:40]!r} by its content type; only UTF-8 is read, send that")
    elif value:
        if getattr(handler, "specs", ()):
            _check_raw(handler, name, value, media)
        elif media == _JSON and decodes and handler.sample_kind not in ("picture", "saved tensor"):
            raise InputError(f"{name} was sent as {_JSON}, but it is not JSON")


def _check_raw(handler: Any, name: str, value: Any, media: str) -> None:
    """Bytes that would be taken for numbers in memory, though they are text."""
    if "json" in media or media.startswith("text"):  # application/jsonlines and the like are text too
        raise InputError(
            f"expected {handler.specs[0]}: {name} was sent as {media[:NAME_SHOWN_MAX]} and could not be read as that, "
            f"{found(value)}; if this is JSON, check it and send it as {_JSON}; numbers as they lie in memory go as "
            "application/octet-stream"
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
