"""Forms: from the bytes of a body to its fields as they came. No field is left out, joined or renamed.

With ``lenient``, as in TorchServe: a field of an url-encoded form without a name is dropped, and of a name that is not
UTF-8 the bad bytes are replaced.
"""

from __future__ import annotations

import logging
import string
from typing import Any, NamedTuple

import numpy as np
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from pyserve.errors import BadRequestError, TooLargeError

# It logs what it also raises; the answer to the client says it already.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

PARTS_MAX = 1000
PART_HEAD_SIZE_MAX = 8 << 10
BOUNDARY_SIZE_MAX = 70  # RFC 2046, section 5.1.1
# Of a part's Content-Transfer-Encoding: those that leave its bytes alone.
_PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")

_HEX_VALUES = np.array([int(chr(byte), 16) if chr(byte) in string.hexdigits else -1 for byte in range(256)], np.int16)


class Field(NamedTuple):
    """One field.

    Attributes:
        content_type: as sent; ``""`` if it has none.
    """

    name: str
    value: bytearray
    content_type: str = ""


def read_urlencoded(body: bytes | bytearray, *, lenient: bool = False) -> list[Field]:
    """The fields of an url-encoded form, or the parameters of a query, in order.

    Raises:
        BadRequestError: a field has no name, or one that is not UTF-8.
        TooLargeError: too many fields.
    """
    pairs = bytes(body).split(b"&", PARTS_MAX)
    if len(pairs) > PARTS_MAX:
        raise TooLargeError(f"the form has more than {PARTS_MAX} fields; send fewer, or a JSON body")
    fields = []
    for pair in pairs:
        name, _, value = pair.partition(b"=")
        if name:
            fields.append(Field(_name(_unquote(name), lenient=lenient), bytearray(_unquote(value))))
        elif pair and not lenient:
            raise BadRequestError("a field of the form has no name before its '='")
    return fields


def _name(raw: bytes, *, lenient: bool) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        if lenient:
            return raw.decode("utf-8", "replace")
        shown = raw[:40].decode("utf-8", "backslashreplace")
        raise BadRequestError(f"the name of a field of the form is not UTF-8: {shown!r}") from None


def _unquote(text: bytes) -> bytes:
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


def read_multipart(body: bytes | bytearray, content_type: str, *, lenient: bool = False) -> list[Field]:
    """The parts of a multipart body, in order.

    Args:
        content_type: of the body, with the boundary.

    Raises:
        BadRequestError: the body is broken, ends early, has no parts or more after its end, or a part has no name, a
            header twice, or an encoding of its own.
        TooLargeError: too many parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 0 < len(boundary) <= BOUNDARY_SIZE_MAX:
        raise BadRequestError(
            f"the multipart body's boundary has {len(boundary)} characters; it needs 1 to {BOUNDARY_SIZE_MAX}"
        )
    form = _Form(lenient=lenient)
    parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
    whole = bytes(body)
    try:
        parser.write(whole)
        parser.finalize()
    except FormParserError as error:
        raise BadRequestError(f"the multipart body is broken: {error}") from error
    if not form.is_complete:
        raise BadRequestError("the multipart body ends before its closing boundary")
    if not form.fields:
        raise BadRequestError("the multipart body has no parts")
    delimiter = b"\r\n--" + boundary
    if not lenient and delimiter in whole[whole.find(delimiter + b"--") + len(delimiter) :]:
        raise BadRequestError("the multipart body has parts after its closing boundary; put it behind the last one")
    return form.fields


class _Form:
    """Collects the parts of one multipart body."""

    def __init__(self, *, lenient: bool):
        self.fields: list[Field] = []
        self.is_complete = False
        self._lenient = lenient
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
        name = self._field.decode("latin-1").lower()
        if name in self._headers and not self._lenient and name.startswith("content-"):
            raise BadRequestError(f"a part of the multipart body has the header {name!r} twice")
        self._headers[name] = self._value.decode("latin-1")
        self._field.clear()
        self._value.clear()

    def _on_part_data(self, chunk: bytes, start: int, end: int) -> None:
        self._body += chunk[start:end]

    def _on_part_end(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        raw = options.get(b"name")
        if not raw:
            raise BadRequestError("a part of the multipart body has no name in its Content-Disposition header")
        name = _name(raw, lenient=self._lenient)
        encoding = self._headers.get("content-transfer-encoding", "").strip().lower()
        if encoding not in _PLAIN_ENCODINGS:
            raise BadRequestError(
                f"the form field {name[:100]!r} has Content-Transfer-Encoding {encoding[:40]!r}; send it as it is"
            )
        self.fields.append(Field(name, self._body, self._headers.get("content-type", "").strip()))

    def _on_end(self) -> None:
        self.is_complete = True
