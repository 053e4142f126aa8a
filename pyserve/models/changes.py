"""Changes of what is served: counted while under way, and refused while another server copies what is served."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyserve.errors import OverloadedError

P = ParamSpec("P")
T = TypeVar("T")


class Changes:
    """Loop thread only.

    Attributes:
        are_held: whether new ones are refused.
    """

    def __init__(self) -> None:
        self.are_held = False
        self._count = 0
        self._ended = asyncio.Event()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A change is under way. It may be made of others.

        Raises:
            OverloadedError: changes are held.
        """
        if self.are_held and not self._count:  # else it may be a part of one that had begun before
            raise OverloadedError(
                "pyserve is being upgraded, and models and keys stay as they are until that is over; try again then.",
                detail={"reason": "upgrade"},
                headers={"Retry-After": "5"},
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._ended.set()

    @property
    def are_frozen(self) -> bool:
        """Whether they are held and none is under way: another server has what is served, and writes it down."""
        return self.are_held and not self._count

    async def hold(self) -> None:
        """Refuses changes from now on; returns when none is under way, or when they are no longer held."""
        self.are_held = True
        while self.are_held and self._count:
            self._ended.clear()
            await self._ended.wait()

    def release(self) -> None:
        """Takes them again."""
        self.are_held = False
        self._ended.set()


class _Changing(Protocol):
    changes: Changes


Owner = TypeVar("Owner", bound=_Changing)


def a_change(
    method: Callable[Concatenate[Owner, P], Awaitable[T]],
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, T]]:
    """Of an object with ``changes``: has each call of ``method`` count as one."""

    @functools.wraps(method)
    async def counted(self: Owner, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.changes.one():
            return await method(self, *args, **kwargs)

    return counted
