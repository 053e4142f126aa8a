"""Forms: from the bytes of a body to its fields as they came. No field is left out, joined or renamed.

With ``lenient`` forms are read as TorchServe 0.12 was measured to read them, what it drops included; what it answers
with 500 is refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from python_multipart.multipart import parse_options_header

from pyserve.errors import BadRequestError, TooLargeError

PARTS_MAX = 1000
PART_HEAD_SIZE_MAX = 8 << 10
# Of a file's Content-Transfer-Encoding: those that leave its bytes alone.
_PLAIN_ENCODINGS = ("", "7bit", "8bit", "binary")

_ENCODED_FILE_NAME = re.compile(r";\s*filename\*=", re.IGNORECASE)  # the parser gives plain ones only
_LINE_ENDS = b"\r\n"
_BLANKS = b" \t\r\n"
_AFTER_DELIMITER = re.compile(rb"[ \t]*(?:\r?\n|\Z)|--|-\Z")
# TorchServe divides a disposition at these, also within quotes, and joins a name's pieces with blanks.
_DIVIDERS = str.maketrans(dict.fromkeys(":;,=\t", " ") | {'"': ""})
_QUOTED_NAME = re.compile(r';\s*name\s*=\s*"((?:[^"\\]|\\.)*)"', re.IGNORECASE)
_BAD_PERCENT = re.compile(rb"%(?![0-9a-fA-F]{2})")
_HEX_VALUES = np.array([int(chr(byte), 16) if chr(byte) in string.hexdigits else -1 for byte in range(256)], np.int16)


class Field(NamedTuple):
    """One field.

    Attributes:
        content_type: as sent; None if it has none.
        is_file: whether its part has a file name.
    """

    name: str
    value: bytearray
    content_type: str | None = None
    is_file: bool = False


def read_urlencoded(body: bytes | bytearray, *, lenient: bool = False) -> list[Field]:
    """The fields of an url-encoded form, in order.

    Raises:
        BadRequestError: a field has no name. With ``lenient`` also one that is empty between two ``&``, and one with a
            ``%`` without two hexadecimal digits.
        TooLargeError: too many fields.
    """
    return _read_lenient(_pairs(body)) if lenient else _read_pairs(_pairs(body))


def read_query(query: bytes, *, lenient: bool = False) -> list[Field]:
    """The parameters of a query, in order; ``=x`` is one called ``x``.

    Raises:
        BadRequestError: with ``lenient`` one has a ``%`` without two hexadecimal digits.
        TooLargeError: too many parameters.
    """
    pairs = [pair.lstrip(b"=") for pair in _pairs(query)]
    if not lenient:
        return _read_pairs(pairs)
    fields = []
    for pair in pairs:
        name, _, value = pair.partition(b"=")
        if name:
            text = _unquote_checked(value).decode("utf-8", "replace")
            fields.append(Field(_name(_unquote_checked(name)), bytearray(text.encode())))
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
            fields.append(Field(_name(_unquote(name)), bytearray(_unquote(value))))
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
        name = _name(_unquote_checked(raw)).strip()
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


def _name(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


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


def boundary_of(content_type: str) -> bytes | None:
    """The boundary that the content type of a multipart body names; None if it names none."""
    if "boundary=" not in content_type.lower():
        return None
    _, options = parse_options_header(content_type)
    return options.get(b"boundary", b"")


def read_multipart(body: bytes | bytearray, content_type: str, *, lenient: bool = False) -> list[Field]:
    """The parts of a multipart body, in order. Lines may end with LF alone; of a header given twice the last counts.

    Args:
        content_type: of the body, with the boundary.
        lenient: only parts that a delimiter follows, and those before the first line that should be one and is not.

    Raises:
        BadRequestError: the body has none of its delimiters, ends early, or has more parts after its end; a part has
            no name, very large headers, or is a file in an encoding of its own.
        TooLargeError: too many parts.
    """
    boundary = boundary_of(content_type)
    if not boundary:
        raise BadRequestError("the multipart body's content type names no boundary")
    fields: list[Field] = []
    _read_parts(body, b"--" + boundary, "", fields, lenient=lenient)
    return fields


def _read_parts(
    body: bytes | bytearray, delimiter: bytes, outer_name: str, fields: list[Field], *, lenient: bool
) -> None:
    """Adds the parts of a body to ``fields``; all of ``outer_name`` if that body is itself a part."""
    for count, (headers, content) in enumerate(_split(body, delimiter, lenient=lenient)):
        if max(count, len(fields)) >= PARTS_MAX:
            raise TooLargeError(f"the multipart body has more than {PARTS_MAX} parts; send fewer")
        kind = headers.get("content-type")
        if lenient and kind is not None and kind.endswith(";"):
            kind = ""
        disposition = headers.get("content-disposition", "")
        _, options = parse_options_header(disposition)
        name = outer_name or _part_name(options.get(b"name"), disposition if lenient else "")
        is_form = not outer_name and (kind or "").lower().startswith("multipart/mixed")
        inner = boundary_of(kind or "") if is_form else None
        if inner:  # several files under one name
            _read_parts(content, b"--" + inner, name, fields, lenient=lenient)
            continue
        is_file = b"filename" in options or _ENCODED_FILE_NAME.search(disposition) is not None
        encoding = headers.get("content-transfer-encoding", "").strip().lower()
        if is_file and encoding not in _PLAIN_ENCODINGS:
            raise BadRequestError(
                f"the form field {name[:100]!r} has Content-Transfer-Encoding {encoding[:40]!r}; send it as it is"
            )
        fields.append(Field(name, content, kind, is_file))


def _part_name(raw: bytes | None, lenient_disposition: str) -> str:
    quoted = _QUOTED_NAME.findall(lenient_disposition) if raw else ()
    if quoted:
        raw = quoted[-1].translate(_DIVIDERS).strip().encode("latin-1")
    if not raw:
        raise BadRequestError("a part of the multipart body has no name in its Content-Disposition header")
    return _name(raw)


def _split(body: bytes | bytearray, delimiter: bytes, *, lenient: bool) -> Iterator[tuple[dict[str, str], bytearray]]:
    """Headers, by name in lower case, and content of each part."""
    start = _first_delimiter(body, delimiter, lenient=lenient)
    while start >= 0:
        after = _AFTER_DELIMITER.match(body, start + len(delimiter))
        assert after is not None
        if after[0] == b"--":
            if not lenient and _next_delimiter(body, delimiter, after.end())[0] >= 0:
                raise BadRequestError(
                    "the multipart body has parts after its closing boundary; put it behind the last one"
                )
            return
        if lenient and after[0][:1] in (b" ", b"\t"):
            return
        headers, begin = _read_part_head(body, after.end())
        start, end = _next_delimiter(body, delimiter, begin)
        if start >= 0:
            yield headers, bytearray(memoryview(body)[begin:end])
    if not lenient and body.strip(_LINE_ENDS):
        raise BadRequestError("the multipart body ends before its closing boundary")


def _first_delimiter(body: bytes | bytearray, delimiter: bytes, *, lenient: bool) -> int:
    """Where the first part begins; -1 if none does. What stands before it means nothing (RFC 2046, 5.1.1)."""
    size = len(body) - len(body.lstrip(_BLANKS if lenient else _LINE_ENDS))
    if body.startswith(delimiter, size) and _AFTER_DELIMITER.match(body, size + len(delimiter)):
        return size
    found = -1 if lenient else _next_delimiter(body, delimiter, 0)[0]
    if found < 0 and not lenient and body.strip(_LINE_ENDS):
        shown = delimiter[:100].decode("utf-8", "backslashreplace")
        raise BadRequestError(f"the multipart body has no line {shown!r}, which is what its content type says")
    return found


def _next_delimiter(body: bytes | bytearray, delimiter: bytes, begin: int) -> tuple[int, int]:
    """Where the next delimiter begins, and where the content before it, from ``begin``, ends; (-1, -1) for none."""
    line = b"\n" + delimiter
    at = body.find(line, max(0, begin - 1))
    while at >= 0:
        if _AFTER_DELIMITER.match(body, at + len(line)):
            end = at - 1 if at > begin and body[at - 1] == ord("\r") else at
            return at + 1, max(begin, end)
        at = body.find(line, at + 1)
    return -1, -1


def _read_part_head(body: bytes | bytearray, start: int) -> tuple[dict[str, str], int]:
    """The headers that begin at ``start``, by name in lower case, and where the content begins."""
    headers: dict[str, str] = {}
    name = ""
    at = start
    while True:
        end = body.find(b"\n", at, start + PART_HEAD_SIZE_MAX)
        if end < 0:
            if len(body) - start >= PART_HEAD_SIZE_MAX:
                raise BadRequestError(
                    f"a part of the multipart body has headers of more than {PART_HEAD_SIZE_MAX} bytes"
                )
            return headers, len(body)
        line = bytes(body[at:end]).rstrip(b"\r")
        at = end + 1
        if not line:
            return headers, at
        text = line.decode("latin-1")
        if text[0] in " \t" and name:  # a header may be folded
            headers[name] += f" {text.strip()}"
            continue
        name, _, value = text.partition(":")
        name = name.strip().lower()
        headers[name] = value.strip()
