"""Forms: from the bytes of a body to its fields as they came. No field is left out, joined or renamed.

With ``lenient`` forms are read as TorchServe 0.12 was measured to read them, what it drops included; what it answers
with 500 is refused. Only of a multipart body that ends early, where it serves the parts it found, nothing is served.
"""

from __future__ import annotations

import logging
import re
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

_ENCODED_FILE_NAME = re.compile(r";\s*filename\*=", re.IGNORECASE)  # the parser gives plain ones only
_BAD_PERCENT = re.compile(rb"%(?![0-9a-fA-F]{2})")
_HEX_VALUES = np.array([int(chr(byte), 16) if chr(byte) in string.hexdigits else -1 for byte in range(256)], np.int16)


class Field(NamedTuple):
    """One field.

    Attributes:
        content_type: as sent; ``""`` if it has none.
        is_file: whether its part has a file name.
    """

    name: str
    value: bytearray
    content_type: str = ""
    is_file: bool = False


def read_urlencoded(body: bytes | bytearray, *, lenient: bool = False) -> list[Field]:
    """The fields of an url-encoded form, in order.

    Raises:
        BadRequestError: a field has no name, or one that is not UTF-8. With ``lenient`` also one that is empty between
            two ``&``, and one with a ``%`` without two hexadecimal digits.
        TooLargeError: too many fields.
    """
    return _read_lenient(_pairs(body)) if lenient else _read_pairs(_pairs(body))


def read_query(query: bytes, *, lenient: bool = False) -> list[Field]:
    """The parameters of a query, in order.

    Raises:
        BadRequestError: one has no name, or one that is not UTF-8. With ``lenient`` one with a ``%`` without two
            hexadecimal digits.
        TooLargeError: too many parameters.
    """
    if not lenient:
        return _read_pairs(_pairs(query))
    fields = []
    for pair in _pairs(query):
        name, _, value = pair.lstrip(b"=").partition(b"=")  # what has no name is one
        if name:
            text = _unquote_checked(value).decode("utf-8", "replace")
            fields.append(Field(_name(_unquote_checked(name), lenient=True), bytearray(text.encode())))
    return fields


def _pairs(text: bytes | bytearray) -> list[bytes]:
    pairs = bytes(text).split(b"&", PARTS_MAX)
    if len(pairs) > PARTS_MAX:
        raise TooLargeError(f"the form has more than {PARTS_MAX} fields; send fewer, or a JSON body")
    return pairs


def _read_pairs(pairs: list[bytes]) -> list[Field]:
    fields = []
    for pair in pairs:
        name, _, value = pair.partition(b"=")
        if name:
            fields.append(Field(_name(_unquote(name), lenient=False), bytearray(_unquote(value))))
        elif pair:
            raise BadRequestError("a field of the form has no name before its '='")
    return fields


def _read_lenient(pairs: list[bytes]) -> list[Field]:
    """Blanks around names do not count; a value ends with its line, and the form too; a last name alone is dropped."""
    fields = []
    for index, pair in enumerate(pairs):
        raw, equals, rest = pair.partition(b"=")
        if not equals and index == len(pairs) - 1:
            break
        name = _name(_unquote_checked(raw), lenient=True).strip()
        if not name:
            raise BadRequestError("a field of the form has no name")
        value, line_end, _ = rest.partition(b"\n")
        value = value.removesuffix(b"\r") if line_end else value
        if b"\r" in value:
            raise BadRequestError("the form has a carriage return without a line feed in a value; send it as %0D")
        fields.append(Field(name, bytearray(_unquote_checked(value))))
        if line_end:
            break
    return fields


def _name(raw: bytes, *, lenient: bool) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        if lenient:
            return raw.decode("utf-8", "replace")
        shown = raw[:40].decode("utf-8", "backslashreplace")
        raise BadRequestError(f"the name of a field of the form is not UTF-8: {shown!r}") from None


def _unquote_checked(text: bytes) -> bytes:
    if _BAD_PERCENT.search(text):
        raise BadRequestError("a field has a '%' without two hexadecimal digits; send a '%' itself as %25")
    return _unquote(text)


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
    if not boundary or (len(boundary) > BOUNDARY_SIZE_MAX and not lenient):
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
        disposition = self._headers.get("content-disposition", "")
        _, options = parse_options_header(disposition)
        raw = options.get(b"name")
        if not raw:
            raise BadRequestError("a part of the multipart body has no name in its Content-Disposition header")
        name = _name(raw, lenient=self._lenient)
        encoding = self._headers.get("content-transfer-encoding", "").strip().lower()
        is_file = b"filename" in options or _ENCODED_FILE_NAME.search(disposition) is not None
        if encoding not in _PLAIN_ENCODINGS and (is_file or not self._lenient):
            raise BadRequestError(
                f"the form field {name[:100]!r} has Content-Transfer-Encoding {encoding[:40]!r}; send it as it is"
            )
        self.fields.append(Field(name, self._body, self._headers.get("content-type", "").strip(), is_file))

    def _on_end(self) -> None:
        self.is_complete = True
