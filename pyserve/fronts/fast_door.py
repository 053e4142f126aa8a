"""Plain requests that a front end reads, sends to the engine as tensors and answers natively: what of it is Python's.

What may be sent so, and for how long, the engine says in its table (`tensors.py`). See csrc/bindings_fast_door.h for
the rest.

Loop thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from pyserve import _front
from pyserve.fronts.channel import Channel
from pyserve.fronts.fast_forms import options_of, paths_of
from pyserve.fronts.outputs import RowTimes
from pyserve.fronts.rows import Table
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol
from pyserve.request.exchange import Exchange
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.stage_times import BOUNDS_S

# None in a checkout whose extensions were built before there was this one.
_Door: Any = getattr(_front, "FastDoor", None)
IS_BUILT = _Door is not None


def _is_used(route: _front.FastRoute) -> bool:
    """Whether one of its requests is not over. Not told in a checkout whose extensions were built before it was."""
    return bool(getattr(route, "under_way", 0))


class FastListener:
    """Of one listener.

    Args:
        door: the native one.
        number: of the listener.
        app: answers all other requests.
        log: notes answers.
        answer_size_max: bytes of a body.
    """

    def __init__(  # noqa: PLR0917 - made in one place
        self, door: _front.FastDoor, number: int, connections: Connections, app: Callable[[Exchange], None],
        log: AccessLog | None, answer_size_max: int,
    ):  # fmt: skip
        self._connections = connections
        self._app = app
        self._log = log
        self._routes: list[tuple[RowTimes, _front.FastRoute]] = []
        self._former: list[tuple[RowTimes, _front.FastRoute]] = []  # under which requests went that are not over
        self.native = _front.FastPath(
            door, listener=number, answer_size_max=answer_size_max, budget=connections.budget,
            call_soon=asyncio.get_running_loop().call_soon, log=log, **options_of(connections),
        )  # fmt: skip
        connections.on_parting = self._part

    def protocol(self, kind: type[FastProtocol] = FastProtocol) -> FastProtocol:
        """Of a connection that has come."""
        connections = self._connections
        return kind(self._app, connections.limits, connections, _front.FastConnection(self.native))

    def set(self, table: Table | None) -> None:
        """From now on it takes what is in ``table``; nothing if there is none, or if connections are to end."""
        self.note_times()
        self._former = [each for each in (*self._former, *self._routes) if _is_used(each[1])]
        self._routes.clear()
        routes: dict[str, _front.FastRoute] = {}
        if table is None or self._connections.parting:
            self.native.set(0, {}, None)
            return
        for entry, route in table.routes:
            for path, options, row_of in paths_of(entry, route, self._connections, self._log):
                made = routes[path] = _front.FastRoute(
                    route.place, size=route.size, row_of=row_of, bounds=BOUNDS_S, **options
                )
                self._routes.append((route.times, made))
        self.native.set(table.generation, routes, table.passes_until if table.has_key else None)

    def note_times(self) -> None:
        """Has in the table's times what native code has noted."""
        for times, native in (*self._former, *self._routes):
            times.add(*native.take_stages())

    def used_times(self) -> Iterator[RowTimes]:
        """Those that something will be noted in."""
        return (times for times, native in (*self._former, *self._routes) if _is_used(native))

    def _part(self) -> None:
        """What is under way becomes ordinary requests, whose answers say that their connections end."""
        self.native.set(0, {}, None)
        for connection in self._connections.members:
            if isinstance(connection, FastProtocol):
                connection.take_over()


class FastDoor:
    """Of a `Door`, which takes over what does not come to an answer here.

    Attributes:
        listeners: by their numbers, those whose requests may be answered natively.
    """

    def __init__(self, door: object):
        self.listeners: dict[int, FastListener] = {}
        self._table: Table | None = None
        self._native: _front.FastDoor = _Door(door)

    def listen(
        self, number: int, connections: Connections, app: Callable[[Exchange], None], log: AccessLog | None,
        answer_size_max: int,
    ) -> Callable[[type[FastProtocol]], FastProtocol]:  # fmt: skip
        """What makes the protocols of a listener's connections."""
        made = self.listeners[number] = FastListener(self._native, number, connections, app, log, answer_size_max)
        made.set(self._table)
        return made.protocol

    def attach(self, channel: Channel) -> None:
        """There is a link to the engine; nothing is taken before `set`."""
        self._native.attach(channel.writer, channel.other_wake)
        self._native.read_from(channel.reader)

    def detach(self) -> None:
        """It is over, and the door has what was under way."""
        self._native.detach()

    def set(self, table: Table | None) -> None:
        """What the engine takes as tensors; None while it takes nothing."""
        self._table = table
        for listener in self.listeners.values():
            listener.set(table)

    def note_times(self) -> None:
        """Has in the table's times what native code has noted."""
        for listener in self.listeners.values():
            listener.note_times()

    def used_times(self) -> Iterator[RowTimes]:
        """Those that something will be noted in."""
        return chain.from_iterable(listener.used_times() for listener in self.listeners.values())

    @property
    def count(self) -> int:
        """Requests that were taken natively so far."""
        return sum(listener.native.request_count for listener in self.listeners.values())

    def close(self) -> None:
        """There will be no link any more."""
        self._native.close()
