"""What is printed cannot control the terminal: most of it is, in part, what others have written."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from pyserve.visible import visible


class _Escaping:
    """A stream that writes control characters as `visible` has them."""

    def __init__(self, stream: TextIO):
        self.unescaped = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)

    def write(self, text: str) -> int:
        self.unescaped.write(visible(text.replace("\r\n", "\n")))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Meanwhile control characters in what is printed are made visible."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_escaping, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def unescaped_output() -> Iterator[None]:
    """Meanwhile what is printed goes out as it is: a handler's own progress bars, in its author's terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(unescaped, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _escaping(stream: Any) -> Any:
    return None if stream is None else _Escaping(stream)  # a process may have been started without


def unescaped(stream: TextIO) -> TextIO:
    """The stream itself, for what we have escaped and coloured."""
    return stream.unescaped if isinstance(stream, _Escaping) else stream
