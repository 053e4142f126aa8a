"""What a pickle says, read without building anything: classes and functions in it stay names.

A pickle is a program, and running one that came from elsewhere is running its author's code. The operations that torch
writes are followed here on a stack of plain values instead; one that torch does not write ends the reading.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# More than the largest seen by far, and a second's work.
OPERATIONS_MAX = 2_000_000

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
     "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"}
)  # fmt: skip
_EMPTY: dict[str, type] = {"EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class InertPickleError(ValueError):
    """It is no pickle, or one that torch does not write."""


@dataclass
class Named:
    """A class or function that a pickle names, and what it would be called with.

    Attributes:
        name: ``"torch._utils._rebuild_tensor_v2"``.
        arguments: None for the name alone.
        state: what would be put into the object.
    """

    name: str
    arguments: Any = None
    state: Any = None


@dataclass
class Stored:
    """What lies outside of the pickle, by the key that torch gave it: a storage."""

    key: Any


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def run(self, name: str, argument: Any) -> None:
        """One operation."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name == "LIST":
            stack.append(self.pop_mark())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(argument)])
        elif name == "BINPERSID":
            stack.append(Stored(stack.pop()))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_mark()
        else:
            self._run_on_others(name, argument)

    def _run_on_others(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Named(str(argument).replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (isinstance(attribute, str) and isinstance(module, str)):
                raise InertPickleError("it has a name that is no text")  # as text a small pickle's value may be huge
            stack.append(Named(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(Named(called.name if isinstance(called, Named) else "", arguments))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Named):
                stack[-1].state = state
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self.pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            if isinstance(stack[-1], dict):
                stack[-1].update({key: value for key, value in zip(pairs[::2], pairs[1::2], strict=True)
                                  if isinstance(key, str | int)})  # fmt: skip
        elif name in ("APPEND", "APPENDS"):
            items = self.pop_mark() if name == "APPENDS" else [stack.pop()]
            if isinstance(stack[-1], list):
                stack[-1] += items
        elif name not in ("PROTO", "FRAME"):
            raise InertPickleError(f"it has the operation {name}")


def read_inert(file: BinaryIO, *, until_named: bool = False) -> Any:
    """What the next pickle of ``file`` would build; the file is behind it then.

    Args:
        until_named: no more than what it begins with: the first class or function that it names, as `Named`, or a dict
            if that comes before.

    Raises:
        InertPickleError: it is none that torch writes.
    """
    machine = _Machine()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if operation.name == "STOP":
                return machine.stack.pop()
            if count > OPERATIONS_MAX:
                break
            machine.run(operation.name, argument)
            if until_named and machine.stack and isinstance(machine.stack[-1], Named | dict):
                return machine.stack[-1]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InertPickleError(f"it is no pickle of torch's: {error}") from None
    raise InertPickleError("it does not end")
