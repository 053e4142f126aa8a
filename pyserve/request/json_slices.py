"""Large JSON texts, read in pieces: between two of them the interpreter is free, so that the event loop turns.

A reader written in C holds the interpreter until it has read all, for tenths of a second with a few megabytes, in
whatever thread it runs. Here the engine proposes where to cut (``csrc/json_plan.h``), without the interpreter, and the
standard library reads piece after piece. What is read, and what is wrong with a text that is not JSON, is the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from pyserve.request import quick_json

if TYPE_CHECKING:
    from pyserve.json_array import JsonArray

# Texts below this are read in one piece: in a few milliseconds.
SIZE_MIN = 64 << 10
# Characters of a piece, but for what its last member has more. Read in 2 ms at worst (objects of few members).
PIECE_SIZE = 32 << 10

_OPEN, _RUN, _CHILD, _NUMBERS, _CLOSE = range(5)  # `JsonStep`
_BLANKS = re.compile(r"[ \t\n\r]*")
# In place of what stands before a piece, and of a member that follows it; no token can be joined to these.
_BEFORE, _AFTER = '""', '""'

Twice = Callable[[str], Exception]


class UncutError(Exception):
    """The pieces do not show what is wrong with the text; it has to be read as a whole."""


def read(text: str, *, twice: Twice | None, takes_arrays: bool = False, array_member: str = "") -> Any:
    """``text``, which may begin and end with blanks, as JSON.

    Args:
        twice: makes the error of a member's name that an object has more than once; None: the last one counts.
        takes_arrays: whether large arrays of numbers may be `JsonArray` in place of lists, where they are all there is,
            or a member of an object.
        array_member: of members only those of this name; ``""`` for any.

    Raises:
        json.JSONDecodeError: as the standard library, for the same place.
        ValueError: a number has too many digits.
        RecursionError: it is nested too deeply.
        UncutError: see there.
        ImportError, AttributeError: the engine is not built, or an older one.
    """
    import torch  # noqa: F401 - the engine needs it, and only large bodies need the engine

    from pyserve import _core

    places, numbers = _core.json_plan(text, PIECE_SIZE, takes_arrays)
    return _Reader(text, twice, numbers, array_member).read(places)


class _Frame:
    """A list or an object that is read piece by piece."""

    __slots__ = ("is_first", "key", "names", "value")

    def __init__(self, is_object: bool):
        self.value: Any = {} if is_object else []
        self.is_first = True  # no step has passed its beginning
        self.key: str = ""  # of the child that comes next
        self.names: list[str] = []  # of all members

    @property
    def bracket(self) -> str:
        return "{" if type(self.value) is dict else "["

    @property
    def before(self) -> str:
        """What a piece stands behind: the bracket, or a member in place of all before."""
        if self.is_first:
            return self.bracket
        return '{"":' + _BEFORE if type(self.value) is dict else "[" + _BEFORE

    def put(self, child: Any) -> None:
        if type(self.value) is dict:
            self.value[self.key] = child
        else:
            self.value.append(child)


class _Reader:
    def __init__(self, text: str, twice: Twice | None, numbers: list[Any], array_member: str):
        self._text = text
        self._twice = twice
        self._array_member = array_member
        self._numbers: Iterator[Any] = iter(numbers)
        self._frames: list[_Frame] = []
        self._last_pairs: list[tuple[str, Any]] = []
        self._repeated: list[list[tuple[str, Any]]] = []
        # With an object's own members, as they come; without, each object that has one twice raises at once.
        self._member_decoder = json.JSONDecoder(object_pairs_hook=self._keep)
        self._decoder = json.JSONDecoder() if twice is None else json.JSONDecoder(object_pairs_hook=self._checked)

    def read(self, places: list[tuple[int, int, int]]) -> Any:
        begin = self._blanks_end(0)
        if not places:
            value, end = self._decoder.raw_decode(self._text, begin)
            return self._ended(value, end)
        for step, start, end in places:
            if step == _OPEN:
                self._frames.append(_Frame(self._text[start] == "{"))
            elif step == _RUN:
                self._take(start, end)
            elif step == _CHILD:
                self._take(start, end, before_child=True)
            elif step == _NUMBERS:
                array = self._array(start, end)
                if not self._frames:
                    return self._ended(array, end)
                self._put(array)
            elif step == _CLOSE:
                self._take(start, end)
                value = self._closed()
                if not self._frames:
                    return self._ended(value, end + 1)
                self._put(value)
            else:
                self._fail(start)
        raise UncutError

    def _put(self, child: Any) -> None:
        frame = self._frames[-1]
        frame.put(child)
        frame.is_first = False

    def _take(self, start: int, end: int, *, before_child: bool = False) -> None:
        """Reads ``[start, end)``, whole members of the last frame and, maybe, all up to one that begins at ``end``."""
        frame = self._frames[-1]
        piece = self._text[start:end]
        is_object = type(frame.value) is dict
        whole = frame.before + piece + (_AFTER if before_child else "") + ("}" if is_object else "]")
        if is_object:
            pairs = self._pairs(whole, start)
            members = pairs if frame.is_first else pairs[1:]
            if self._twice is not None:
                frame.names += [name for name, _ in members]
            if frame.is_first and not members:
                self._fail(start)
            if before_child:
                frame.key = members.pop()[0]
            frame.value.update(members)
        else:
            values = self._values(whole, start)
            if frame.is_first and not values:  # what is cut off behind a comma has something before it
                self._fail(start)
            first, last = 0 if frame.is_first else 1, len(values) - before_child
            frame.value += values[first:last]
        frame.is_first = False

    def _values(self, whole: str, start: int) -> list[Any]:
        value: Any = quick_json.read(whole.encode("utf-8", "surrogatepass"), quick_json.DEPTH_MAX)
        if value is quick_json.UNREAD:
            value = self._decoded(self._decoder, whole, start)
        return value

    def _pairs(self, whole: str, start: int) -> list[tuple[str, Any]]:
        self._repeated.clear()
        try:
            self._decoded(self._member_decoder, whole, start)
        except ValueError:
            if self._repeated:  # it was complete before the text went wrong
                self._raise_twice([name for name, _ in self._repeated[0]])
            raise
        # The outermost object comes last, and this is only a part of it.
        if self._repeated and self._repeated[0] is not self._last_pairs:
            self._raise_twice([name for name, _ in self._repeated[0]])
        return self._last_pairs

    def _decoded(self, decoder: json.JSONDecoder, whole: str, start: int) -> Any:
        try:
            value, end = decoder.raw_decode(whole)
        except json.JSONDecodeError:
            self._fail(start)
        if end != len(whole):
            self._fail(start)
        return value

    def _fail(self, start: int) -> NoReturn:
        """Raises what is wrong with the text from ``start`` on."""
        before = self._frames[-1].before
        try:
            json.JSONDecoder().raw_decode(before + self._text[start:])
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(error.msg, self._text, start + error.pos - len(before)) from None
        raise UncutError

    def _keep(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if self._twice is not None and len(members) < len(pairs):
            self._repeated.append(pairs)
        self._last_pairs = pairs
        return members

    def _checked(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            self._raise_twice([name for name, _ in pairs])
        return members

    def _raise_twice(self, names: list[str]) -> NoReturn:
        assert self._twice is not None
        ((name, _),) = Counter(each for each in names).most_common(1)
        raise self._twice(name)

    def _closed(self) -> Any:
        frame = self._frames.pop()
        if self._twice is not None and type(frame.value) is dict and len(frame.value) < len(frame.names):
            self._raise_twice(frame.names)
        return frame.value

    def _array(self, start: int, end: int) -> JsonArray | list[Any]:
        from pyserve.json_array import JsonArray

        text, numbers = self._text[start:end], next(self._numbers)

        def values() -> list[Any]:
            return read(text, twice=None)

        if self._frames:
            frame = self._frames[-1]
            is_member = type(frame.value) is dict and (not self._array_member or frame.key == self._array_member)
            if not is_member:
                return values()
        return JsonArray(numbers, values)

    def _blanks_end(self, at: int) -> int:
        found = _BLANKS.match(self._text, at)
        assert found is not None
        return found.end()

    def _ended(self, value: Any, end: int) -> Any:
        end = self._blanks_end(end)
        if end != len(self._text):
            raise json.JSONDecodeError("Extra data", self._text, end)
        return value
