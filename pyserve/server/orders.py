"""What the supervisor has a server do, through a pipe: a word a line. An upgrade needs them, nothing else does."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the supervisor, which needs the words alone, does without it
    import asyncio


class Order(enum.Enum):
    """
    Attributes:
        HOLD: refuse changes of models until RELEASE, and report when those under way have ended.
        RELEASE: nothing takes this server's place after all.
        OPEN: begin to accept, beside the server whose place is taken.
        GIVE_WAY: another server accepts on the same sockets: accept no more, answer what was taken, end.
    """

    HOLD = "hold"
    RELEASE = "release"
    OPEN = "open"
    GIVE_WAY = "give way"


class Orders:
    """The server's end. Loop thread only.

    Args:
        fd: to read from; -1 for none.
        loop: that runs.

    Attributes:
        opens, gives_way: done when that was ordered.
        on_hold: called with True for HOLD and False for RELEASE.
    """

    def __init__(self, fd: int, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._fd = fd
        self._rest = b""
        self.opens: asyncio.Future[None] = loop.create_future()
        self.gives_way: asyncio.Future[None] = loop.create_future()
        self.on_hold: Callable[[bool], object] = lambda is_held: None
        if fd >= 0:
            os.set_blocking(fd, False)
            loop.add_reader(fd, self._read)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        try:
            chunk = os.read(self._fd, 4096)
        except BlockingIOError:
            return
        if not chunk:
            self.close()  # without the supervisor this process ends soon
            return
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._take(line.decode())

    def _take(self, word: str) -> None:
        if word in (Order.HOLD.value, Order.RELEASE.value):
            self.on_hold(word == Order.HOLD.value)
        for order, future in ((Order.OPEN, self.opens), (Order.GIVE_WAY, self.gives_way)):
            if word == order.value and not future.done():
                future.set_result(None)
