"""``allowed_urls``: which URLs archives may be fetched from.

A comma-joined list of regular expressions as TorchServe has them, ``https://models\\.example\\.com/.*``; upper and
lower case are the same. A URL is not compared as one text, in which ``.*`` could stand for a host and its path
alike: pattern and URL are cut into scheme, host and path, and each part must match by itself.

- In the host a plain ``.`` means a dot. A port other than the scheme's own must be in the pattern.
- A pattern without a path that ends in ``.*`` allows every path of that host: ``https://h.*`` is ``https://h/.*``.
- The query of a URL is free, unless the pattern has one (``\\?``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pyserve.config.archive_url import SCHEMES, WEB_SCHEMES, ArchiveUrl

_ANYTHING = (".*", ".+")


class _Pattern:
    """One regular expression, cut into the parts of a URL."""

    def __init__(self, text: str):
        self.text = text
        scheme, host, path = _parts(text)
        try:
            self._scheme = re.compile(scheme, re.IGNORECASE)
            self._host = re.compile(host, re.IGNORECASE)
            self._path = re.compile(path, re.IGNORECASE | re.DOTALL)
        except re.error as error:
            raise ValueError(f"{text!r} cannot be read as scheme://host/path: {error}") from None
        self._has_query = r"\?" in path
        if not any(self._scheme.fullmatch(scheme) for scheme in SCHEMES):
            raise ValueError(f"{text!r} allows no scheme there is: {', '.join(SCHEMES)}")

    def matches(self, url: ArchiveUrl) -> bool:
        hosts = {url.authority}
        if url.port and url.port == WEB_SCHEMES.get(url.scheme):
            hosts.add(f"{url.authority}:{url.port}")
        return (
            self._scheme.fullmatch(url.scheme) is not None
            and any(self._host.fullmatch(host) for host in hosts)
            and self._path.fullmatch(url.target if self._has_query else url.path) is not None
        )


class AllowedUrls:
    """The patterns of a configuration; false when there are none.

    Raises:
        ValueError: a pattern that cannot be read; the message names it.
    """

    def __init__(self, text: str):
        self._patterns = [_Pattern(each) for part in text.split(",") for each in _alternatives(part.strip()) if each]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def match(self, url: ArchiveUrl) -> bool:
        """Whether a pattern matches ``url``."""
        return any(pattern.matches(url) for pattern in self._patterns)


def _parts(text: str) -> tuple[str, str, str]:
    """(scheme, host, path) of a pattern."""
    plain = text.removeprefix("^")
    if plain.endswith("$") and not plain.endswith("\\$"):
        plain = plain[:-1]
    if plain in _ANYTHING:
        return ".*", ".*", ".*"
    scheme, separator, rest = plain.replace(r":\/\/", "://").partition("://")
    if not separator or not rest:
        raise ValueError(rf"{text!r} is not written scheme://host/path, such as https://models\.example\.com/.*")
    if rest in _ANYTHING:
        return scheme, ".*", "/.*"
    cut = next((place for place, character in _top_level(rest) if character == "/"), None)
    if cut is not None:
        host, path = rest[:cut].removesuffix("\\"), rest[cut:]
    elif rest.endswith(_ANYTHING) and not rest.endswith(("\\.*", "\\.+")):
        host, path = rest[:-2], "/.*"
    else:
        host, path = rest, "/?"
    if any(character == "/" for _, character in _top_level(host, into_groups=True)):
        raise ValueError(f"{text!r} has a slash in its host; write the path outside of brackets")
    return scheme, _with_literal_dots(host), path


def _with_literal_dots(host: str) -> str:
    """``host`` with a plain dot escaped, unless a quantifier makes it a wildcard."""
    dots = {
        place for place, character in _top_level(host, into_groups=True)
        if character == "." and host[place + 1 : place + 2] not in tuple("*+?{")
    }  # fmt: skip
    return "".join(f"\\{character}" if place in dots else character for place, character in enumerate(host))


def _alternatives(text: str) -> Iterator[str]:
    """What stands between the ``|`` outside of all brackets."""
    start = 0
    for place, character in _top_level(text):
        if character == "|":
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _top_level(text: str, *, into_groups: bool = False) -> Iterator[tuple[int, str]]:
    """Places and characters of a pattern outside of escapes, classes and, by default, groups.

    An escaped slash counts as a slash, as some write it.
    """
    place, depth, in_class = 0, 0, False
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1
            if text[place : place + 1] == "/" and not in_class and depth == 0:
                yield place, "/"
        elif in_class:
            opens = text[place - 1] == "[" or text[place - 2 : place] == "[^"  # a bracket that stands for itself
            in_class = character != "]" or opens
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif depth == 0 or into_groups:
            yield place, character
        place += 1
