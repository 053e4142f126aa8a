"""What a built-in handler would not read of a request, or would read as something else than was sent, is refused.

A form's fields have no type of their own: one that is JSON becomes what it says where a model takes numbers.

Handlers of an archive's own may read any field, and what a value is they know themselves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from pyserve.body_kind import is_file, kind_of
from pyserve.handler import InputError
from pyserve.handlers.rows import found
from pyserve.tensor_types import RAW

# Read by the server (which model, the beginning of a sequence), or by explanations.
READ_ELSEWHERE = frozenset({"target", "model_name", "ts_request_sequence_start"})
NAME_SHOWN_MAX = 100
_JSON = "application/json"
_BEGINS_NUMBERS = b"[-0123456789 \t\r\n"
_START_SIZE = 64
_UTF8 = ("", "utf-8", "utf8", "us-ascii", "ascii")


def is_built_in(handler: object) -> bool:
    """Whether ``handler`` is pyserve's own, and no class that is derived from one."""
    return type(handler).__module__.startswith("pyserve.handlers.")


def check_row(
    handler: Any, row: MutableMapping[str, Any], types: Mapping[str, str], *, decodes: bool = True, start_key: str = ""
) -> None:
    """Checks the decoded fields of one request to a built-in ``handler``.

    Args:
        row: fields of a form that came without a type, and are JSON, are decoded in it for models that take numbers.
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
            media_type = types.get(name, "")
            if value and decodes and not media_type and name != "body" and not isinstance(value, str):
                row[name] = value = _numbers_in(handler, name, value)
            if isinstance(value, (str, bytes, bytearray, memoryview)):
                _check_value(handler, name, value, media_type, decodes=decodes)


def _numbers_in(handler: Any, name: str, value: Any) -> Any:
    """What a form's field without a type says, if it is JSON's numbers and cannot be one input's bytes; else itself."""
    spec = _spec_of(handler, name)
    if spec is None or value[0] not in _BEGINS_NUMBERS:
        return value
    if spec.torch_dtype.itemsize == 1 and (-1 in spec.shape or len(value) == spec.fixed_size):
        return value  # which any text may be
    try:
        decoded = json.loads(bytes(value))
    except (ValueError, RecursionError):
        return value
    return decoded if isinstance(decoded, list) or (not spec.shape and isinstance(decoded, (int, float))) else value


def _spec_of(handler: Any, name: str) -> Any:
    """The input that field ``name`` is for; None for handlers that take no numbers."""
    specs = getattr(handler, "specs", ())
    return next((spec for spec in specs if spec.name == name), specs[0] if specs else None)


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
        if media == _JSON and decodes and not _may_be_a_file(handler, value):
            raise InputError(_not_json(name, value))
        if getattr(handler, "specs", ()):
            _check_raw(handler, name, value, media)


def _may_be_a_file(handler: Any, value: Any) -> bool:
    """TorchServe takes a picture for a picture, whatever it was sent as."""
    is_file = handler.sample_kind in ("picture", "saved tensor")
    return is_file and bytes(value[:_START_SIZE]).lstrip()[:1] not in (b"[", b"{", b'"', b"")


def _not_json(name: str, value: Any) -> str:
    """What is wrong with a value that was sent as JSON."""
    said = f"the {name} says {_JSON} but is not" if name == "body" else f"{name} was sent as {_JSON} but is not"
    try:
        json.loads(bytes(value))
    except json.JSONDecodeError as error:
        said += f": {error.msg}, line {error.lineno} column {error.colno}"
    except UnicodeDecodeError as error:
        said += f": it is not UTF-8, at byte {error.start}"
    except (ValueError, RecursionError):
        pass  # the sentence will do
    return f"{said}; got {found(value)}"


def _check_raw(handler: Any, name: str, value: Any, media: str) -> None:
    """Bytes that would be taken for numbers in memory, though they are text."""
    if "json" in media or media.startswith("text"):  # application/jsonlines and the like are text too
        raise InputError(
            f"expected {handler.specs[0]}: {name} was sent as {media[:NAME_SHOWN_MAX]} and could not be read as that, "
            f"{found(value)}; if this is JSON, check it and send it as {_JSON}; numbers as they lie in memory go as "
            "application/octet-stream"
        )
    if media == RAW or _spec_of(handler, name).torch_dtype.itemsize == 1:
        return
    if media:
        kind, came = "file" if is_file(value) else "", f"was sent as {media[:NAME_SHOWN_MAX]}"
    else:
        kind, came = kind_of(value), "came without a content type"
    if kind:
        what = {"JSON": "JSON", "text": f"text, {found(value)}", "file": found(value)}[kind]
        raise InputError(
            f"{name} {came} and is {what}, but numbers as they lie in memory are expected then; send JSON as {_JSON}, "
            f"or as {RAW} if the bytes are meant"
        )
