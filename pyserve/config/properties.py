"""Java properties files, read by the rules of ``java.util.Properties.load`` and written by those of ``store``.

A *natural* line is what ends in a line break; a *logical* line is one or more natural lines joined by a
backslash at the end. Keys end at the first unescaped ``=``, ``:`` or blank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BLANKS = " \t\f"
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_ESCAPED = {char: f"\\{letter}" for letter, char in _ESCAPES.items()} | {char: f"\\{char}" for char in "\\=:#!"}
_UNICODE = re.compile(r"[0-9A-Fa-f]{4}")


class Property(NamedTuple):
    """One entry; ``line`` is the number of its first natural line, counted from 1."""

    key: str
    value: str
    line: int


class PropertiesError(ValueError):
    """The text breaks the format.

    Attributes:
        line: number of the first natural line of the entry.
    """

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def parse_properties(text: str) -> list[Property]:
    """All entries in order, repeated keys included.

    Raises:
        PropertiesError: a ``\\u`` escape without four hexadecimal digits.
    """
    entries = []
    for line, logical in _logical_lines(text):
        key, value = _split(logical)
        entries.append(Property(_unescape(key, line), _unescape(value, line), line))
    return entries


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    parts: list[str] = []
    first = 0
    for number, natural in enumerate(_LINE_BREAK.split(text), start=1):
        line = natural.lstrip(_BLANKS)
        if not parts:
            if not line or line[0] in "#!":
                continue
            first = number
        backslashes = len(line) - len(line.rstrip("\\"))
        if backslashes % 2:
            parts.append(line[:-1])
            continue
        yield first, "".join([*parts, line])
        parts = []
    if any(parts):
        yield first, "".join(parts)


def _split(logical: str) -> tuple[str, str]:
    end = 0
    while end < len(logical) and logical[end] not in "=:" + _BLANKS:
        end += 2 if logical[end] == "\\" else 1
    value = logical[end:].lstrip(_BLANKS)
    if value[:1] in ("=", ":"):
        value = value[1:].lstrip(_BLANKS)
    return logical[:end], value


def _unescape(text: str, line: int) -> str:
    if "\\" not in text:
        return text
    out = []
    at = 0
    while at < len(text):
        char = text[at]
        at += 1
        if char != "\\" or at == len(text):
            out.append(char if char != "\\" else "")
            continue
        char = text[at]
        at += 1
        if char == "u":
            if not _UNICODE.match(text, at):
                raise PropertiesError(line, f"\\u needs four hexadecimal digits, not {text[at : at + 4]!r}")
            char = chr(int(text[at : at + 4], 16))
            at += 4
        else:
            char = _ESCAPES.get(char, char)
        out.append(char)
    # Java files spell characters outside the basic plane as two \u escapes; join the surrogates.
    return "".join(out).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def format_properties(values: Mapping[str, str], comment: str) -> str:
    """The text of a file that `parse_properties`, and Java, read as ``values``; ``comment`` is its first line."""
    lines = [f"#{line}" for line in comment.splitlines()]
    lines += [f"{_escape(key).replace(' ', _BLANK)}={_escape_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


_BLANK = "\\ "


def _escape_value(value: str) -> str:
    # Blanks are told from the separator's only at the beginning.
    text = value.lstrip(" ")
    return _BLANK * (len(value) - len(text)) + _escape(text)


def _escape(text: str) -> str:
    out = []
    for char in text:
        if char in _ESCAPED:
            out.append(_ESCAPED[char])
        elif " " <= char <= "~":
            out.append(char)
        else:
            units = char.encode("utf-16-be", "surrogatepass").hex()
            out += [f"\\u{units[at : at + 4].upper()}" for at in range(0, len(units), 4)]
    return "".join(out)
