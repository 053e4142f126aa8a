"""Bodies: from the wire to what a handler receives, and from what it returns to the wire.

The rules are TorchServe's: a plain body is ``{"body": value}``, a form is one key per field; JSON is parsed,
text becomes ``str``, anything else stays a ``bytearray``; what cannot be decoded stays a ``bytearray`` too.
"""

from __future__ import annotations

import io
import json
import logging
import re
import string
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote_plus, unquote_plus

import numpy as np
import torch
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pyserve import json_encoding
from pyserve.errors import BadRequestError, HandlerError, InputError, TooLargeError
from pyserve.failure import is_memory_error

log = logging.getLogger(__name__)
# It logs what it also raises; the answer to the client says it already.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

NAN_WARNING = (
    "a result holds NaN or an infinity, for which JSON has no word; it is answered as null. Said once; compat=strict "
    "answers NaN as TorchServe does"
)
# Flag of a request whose body is fields' values and whose query their sizes, see `split_fields`.
FIELDS = 2
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
JSON_DEPTH_MAX = 100
PARTS_MAX = 1000
FIELD_NAMES_SIZE_MAX = 64 << 10  # of all together, see `join_fields`
PART_HEAD_SIZE_MAX = 8 << 10
BOUNDARY_SIZE_MAX = 70  # RFC 2046, section 5.1.1

# A string without escapes, ended or not, or a bracket. Never fails after a quote, so matching takes linear time.
_JSON_TOKEN = re.compile(rb'"[^"]*"?|[\[\]{}]')

_HEX_VALUES = np.array([int(chr(byte), 16) if chr(byte) in string.hexdigits else -1 for byte in range(256)], np.int16)


class RequestParts(Protocol):
    """What decoding looks at of a request; `messages.Request` has it."""

    @property
    def body(self) -> bytearray: ...

    @property
    def content_type(self) -> str: ...

    def header(self, name: str, default: str = "") -> str: ...


def decode_request(
    request: RequestParts, *, decode: bool = True, types: dict[str, str] | None = None
) -> dict[str, Any]:
    """The row a handler receives for one request.

    Args:
        decode: whether JSON and text are decoded (``decode_input_request``).
        types: filled with the content types of a form's parts by their names.

    Raises:
        BadRequestError: a broken form, or JSON nested too deeply or with an absurd number.
        TooLargeError: a form with too many parts.
    """
    media_type = request.content_type
    if media_type == "multipart/form-data":
        return _decode_multipart(request, decode=decode, types=types)
    if media_type == "application/x-www-form-urlencoded":
        return _decode_urlencoded(request.body)
    return {"body": decode_value(request.body, media_type) if decode else request.body}


def add_query(row: dict[str, Any], query: str) -> None:
    """Adds the parameters of a raw query string to ``row``, as fields without a content type: ``bytearray``."""
    for key, value in _decode_urlencoded(bytearray(query.replace(";", "&").encode("latin-1", "replace"))).items():
        row[key] = value


def split_fields(body: bytearray, sizes: str) -> dict[str, Any]:
    """The row of a request whose body is its fields' values one after the other, as they came: ``bytearray``.

    Args:
        sizes: names and sizes, ``data=4096&id=16``, as `join_fields` gives them.
    """
    if not sizes:
        return {}
    pairs = [(unquote_plus(name), int(size)) for name, _, size in (part.partition("=") for part in sizes.split("&"))]
    if len(pairs) == 1:
        return {pairs[0][0]: body}
    row: dict[str, Any] = {}
    start = 0
    for name, size in pairs:
        row[name] = body[start : start + size]
        start += size
    return row


def join_fields(fields: Mapping[str, bytes]) -> tuple[bytearray, str]:
    """The inverse of `split_fields`: body and sizes.

    Raises:
        TooLargeError: too many fields, or names that are too long.
    """
    if len(fields) > PARTS_MAX:
        raise TooLargeError(f"the request has {len(fields)} inputs; at most {PARTS_MAX} are allowed")
    sizes = "&".join([f"{quote_plus(name)}={len(value)}" for name, value in fields.items()])
    if len(sizes) > FIELD_NAMES_SIZE_MAX:
        raise TooLargeError(f"the names of the inputs have more than {FIELD_NAMES_SIZE_MAX} bytes; use shorter ones")
    return bytearray().join(fields.values()), sizes


def decode_value(body: bytearray, content_type: str) -> Any:
    """``body`` as its content type says; the bytes themselves when they turn out not to be that."""
    if content_type == "application/json":
        return _decode_json(body)
    if content_type.startswith("text"):
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError:
            return body
    return body


def parse_json(body: bytearray) -> Any:
    """``body`` as JSON.

    Raises:
        InputError: it is not JSON, is nested too deeply, or has an absurd number.
    """
    _check_depth(body)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON that can be used: {error}") from error


def _check_depth(body: bytearray) -> None:
    if body.count(b"[") + body.count(b"{") > JSON_DEPTH_MAX and _json_depth(body) > JSON_DEPTH_MAX:
        raise InputError(f"the JSON body is nested more than {JSON_DEPTH_MAX} levels deep; flatten it")


def _decode_json(body: bytearray) -> Any:
    _check_depth(body)
    try:
        return json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        log.warning("a body sent as application/json is not JSON (%s); the handler receives its bytes", error)
        return body
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON body cannot be used: {error}") from error


def _json_depth(body: bytearray) -> int:
    depth = deepest = 0
    # Backslashes stand in strings only; without the escaped ones and the escaped quotes strings end at each quote.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    for match in _JSON_TOKEN.finditer(unescaped):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (b"]", b"}"):
            depth -= 1
    return deepest


def _decode_urlencoded(body: bytearray) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    pairs = bytes(body).split(b"&", PARTS_MAX)
    if len(pairs) > PARTS_MAX:
        raise TooLargeError(f"the form has more than {PARTS_MAX} fields; send fewer, or a JSON body")
    for pair in pairs:
        name, _, value = pair.partition(b"=")
        if name:
            fields[_unquote_form(name).decode("utf-8", "replace")] = bytearray(_unquote_form(value))
    return fields


def _unquote_form(text: bytes) -> bytes:
    """``+`` is a blank and ``%4a`` a byte; a ``%`` without two hexadecimal digits stays."""
    text = text.replace(b"+", b" ")
    if b"%" not in text:
        return text
    # Not urllib's unquote_to_bytes: it makes one object per %, which takes seconds for megabytes of them.
    values = np.frombuffer(text, np.uint8)
    found = np.flatnonzero(values[:-2] == ord("%"))
    high, low = _HEX_VALUES[values[found + 1]], _HEX_VALUES[values[found + 2]]
    is_hex = (high >= 0) & (low >= 0)
    found = found[is_hex]
    out = values.copy()
    out[found] = (high * 16 + low)[is_hex]
    keep = np.ones(len(out), bool)
    keep[found + 1] = keep[found + 2] = False
    return out[keep].tobytes()


def _decode_multipart(request: RequestParts, *, decode: bool, types: dict[str, str] | None) -> dict[str, Any]:
    _, options = parse_options_header(request.header("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= BOUNDARY_SIZE_MAX:
        raise BadRequestError(
            f"the multipart body's boundary has {len(boundary)} characters; it needs 1 to {BOUNDARY_SIZE_MAX}"
        )
    form = _Form(decode=decode)
    parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
    try:
        parser.write(bytes(request.body))
        parser.finalize()
    except FormParserError as error:
        raise BadRequestError(f"the multipart body is broken: {error}") from error
    if not form.is_complete:
        raise BadRequestError("the multipart body ends before its closing boundary")
    if not form.fields:
        raise BadRequestError("the multipart body has no parts")
    if types is not None:
        types |= form.types
    return form.fields


class _Form:
    """Collects the parts of one multipart body."""

    def __init__(self, *, decode: bool):
        self.fields: dict[str, Any] = {}
        self.types: dict[str, str] = {}
        self.is_complete = False
        self._decode = decode
        self._part_count = 0
        self._start_part()

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_end": self._on_end,
        }

    def _start_part(self) -> None:
        self._body = bytearray()
        self._headers: dict[str, str] = {}
        self._field = bytearray()
        self._value = bytearray()
        self._head_size = 0

    def _on_part_begin(self) -> None:
        self._part_count += 1
        if self._part_count > PARTS_MAX:
            raise TooLargeError(f"the multipart body has more than {PARTS_MAX} parts; send fewer")
        self._start_part()

    def _on_header_field(self, chunk: bytes, start: int, end: int) -> None:
        self._field += chunk[start:end]
        self._count_head(end - start)

    def _on_header_value(self, chunk: bytes, start: int, end: int) -> None:
        self._value += chunk[start:end]
        self._count_head(end - start)

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > PART_HEAD_SIZE_MAX:
            raise BadRequestError(f"a part of the multipart body has headers of more than {PART_HEAD_SIZE_MAX} bytes")

    def _on_header_end(self) -> None:
        self._headers[self._field.decode("latin-1").lower()] = self._value.decode("latin-1")
        self._field.clear()
        self._value.clear()

    def _on_part_data(self, chunk: bytes, start: int, end: int) -> None:
        self._body += chunk[start:end]

    def _on_part_end(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        name = options.get(b"name")
        if not name:
            raise BadRequestError("a part of the multipart body has no name in its Content-Disposition header")
        # Exactly as sent: TorchServe does not strip parameters from a part's content type.
        sent_type = self._headers.get("content-type", "").strip()
        value = decode_value(self._body, sent_type.lower()) if self._decode else self._body
        field = name.decode("utf-8", "replace")
        self.fields[field] = value
        if sent_type:
            self.types[field] = sent_type

    def _on_end(self) -> None:
        self.is_complete = True


def encode_result(value: Any, on_nan: Callable[[], None] | None = None) -> bytes | bytearray | memoryview:
    """What a handler returned for one request, as the bytes of the answer (contract: section 1.6).

    Args:
        on_nan: see `json_encoding.dump`.

    Raises:
        HandlerError: the value is neither bytes, text, a tensor nor JSON; the text says where in it and how to mend it.
    """
    if isinstance(value, memoryview):
        # Its length counts bytes then, whatever it held.
        return value.cast("B") if value.c_contiguous and value.nbytes else value.tobytes()
    if isinstance(value, (bytes, bytearray)):
        return value
    if isinstance(value, torch.Tensor):
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()
    try:
        return value.encode() if isinstance(value, str) else json_encoding.dump(value, on_nan)
    except Exception as error:  # of any kind: a `tolist` or a property of the handler's classes may run
        if is_memory_error(error):
            raise
        raise HandlerError(
            "Unsupported model output data type.",
            detail={"exception": type(error).__name__, "text": _why_not(value, error)},
        ) from error


def _why_not(value: Any, error: Exception) -> str:
    if isinstance(value, str):
        return f"a str cannot become UTF-8: {error}"
    found = json_encoding.find_not_json(value)
    if found is None:
        return f"a {type(value).__name__} cannot become JSON: {error}"
    return f"{found.type}{found.place} cannot become JSON; {found.fix}"
