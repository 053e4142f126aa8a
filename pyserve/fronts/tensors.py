"""The engine's side of requests that come as tensors: which there may be, told to the front ends in a table.

An entry says of a path what its model takes and how its answers look. A front end that has it decodes bodies and
encodes answers, and what crosses is taken and answered without Python (csrc/bindings_rows.h). Only what needs none of
an endpoint's care is in it: a built-in handler of plain tensors, one input whose size is known, nobody who has to see
the request. A table has a number; the engine takes a row only of the last one. So what changes in the registry is told
by taking the number back at once, and by a new table when the loop turns.

Loop thread only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyserve.errors import JsonObject, ServeError
from pyserve.fronts.shares import Shares
from pyserve.fronts.wire import ToldTimes
from pyserve.handlers.tensor import TensorHandler
from pyserve.lanes.front_rows import RowsLane
from pyserve.models.registry import Registry
from pyserve.request.datatypes import datatype_of
from pyserve.security.tokens import Tokens

if TYPE_CHECKING:
    from pyserve import _core
    from pyserve.fronts.link import Link

# Between two looks at what there is: at workers that came, audits that began and the like, which are told by nobody.
LOOK_S = 0.25
# How much larger a tensor may be than the body that it was made of: "1," of JSON becomes eight bytes.
_GROWTH_MAX = 4
# Names in paths that need no decoding; others take the usual way.
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-~")
_KINDS = {
    "float32": "f", "float64": "d", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H",
    "uint32": "I",
}  # fmt: skip

Route = tuple["_core.LaneRows", str]


class Tensors:
    """Args:
        rings: the engine's module.
        tokens: the keys, if there are any. Front ends are told what the key of inference looks like, not the key.
        decodes: whether JSON is decoded.

    Attributes:
        tokens: the keys, if requests need one.
        table: the engine's; it takes nothing any more as soon as what it was told is no longer so.
        generation: its number.
        entries, routes: what it takes, and how that is told.
    """  # fmt: skip

    def __init__(self, registry: Registry, rings: Any, *, tokens: Tokens | None, decodes: bool):
        self.rings = rings
        self._registry = registry
        self.tokens = tokens if tokens is not None and tokens.guards("inference") else None
        self._key: JsonObject | None = None
        self._decodes = decodes
        self.table: _core.RowTable = rings.RowTable()
        self.generation = 0
        self.entries: list[JsonObject] = []
        self.routes: list[Route] = []
        self._send: Callable[[bytes], None] = lambda table: None
        self._looking: asyncio.TimerHandle | None = None

    def start(self, send: Callable[[bytes], None]) -> None:
        """From now on front ends are told by ``send`` what there is."""
        self._send = send
        self._registry.on_names = self.take_back
        if self.tokens is not None:
            loop = asyncio.get_running_loop()
            self.tokens.on_change = lambda: loop.call_soon_threadsafe(self.take_back)
        self._look()

    def stop(self) -> None:
        """Nothing is taken any more."""
        if self._looking is not None:
            self._looking.cancel()
        self._registry.on_names = bool
        if self.tokens is not None:
            self.tokens.on_change = bool
        self.table.set(0, [])

    def join(self, link: Link, shares: Shares) -> _core.FrontRows:
        """What takes the rows of a front end that has come."""
        channel = link.channel
        rows: _core.FrontRows = self.rings.FrontRows(
            link, channel.writer, channel.other_wake, self.table, count_max=shares.in_flight_max,
            size_max=_GROWTH_MAX * shares.body_budget_size,
        )  # fmt: skip
        rows.read_from(channel.reader)
        link.on_times = self.note_times
        link.send_table(self._told())
        return rows

    def take_back(self) -> None:
        """What names and versions stand for has changed: no row that was sent before is taken."""
        self.generation += 1
        self.table.set(self.generation, [])
        self.entries, self.routes = [], []
        if self._looking is not None:
            self._looking.cancel()
        self._looking = asyncio.get_running_loop().call_later(0, self._look)

    def note_times(self, told: ToldTimes) -> None:
        """What a front end did for requests of a model, which may be another one by now."""
        try:
            model = self._registry.get(told.name, told.version)
        except ServeError:
            return
        # It was done, even if the model has turned out since to be one that front ends decode nothing for.
        for times, (counts, total_s) in zip(model.stage_times or (), (told.preprocess, told.postprocess), strict=False):
            times.add(counts, total_s)

    def _look(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        entries, routes = self._found()
        key = self._told_key()
        if entries == self.entries and routes == self.routes and key == self._key:
            return
        self.entries, self.routes, self._key = entries, routes, key
        self.generation += 1
        self.table.set(self.generation, routes)
        self._send(self._told())

    def _told(self) -> bytes:
        told = {"generation": self.generation, "entries": self.entries, "key": self._key}
        return json.dumps(told).encode()

    def _told_key(self) -> JsonObject | None:
        key = None if self.tokens is None else self.tokens.digest("inference")
        return None if key is None else {"digest": key[0], "expires_at": key[1]}

    def _found(self) -> tuple[list[JsonObject], list[Route]]:
        entries: list[JsonObject] = []
        routes: list[Route] = []
        if self.tokens is not None and self.tokens.digest("inference") is None:
            return entries, routes  # nobody may
        for model in self._registry.all_models():
            lane = model.row_lane
            described = None if lane is None else self.described(lane)
            if lane is None or lane.rows is None or described is None:
                continue
            entries.append({**described, "is_default": False})
            routes.append((lane.rows, model.version))
            if model is self._registry.get(model.name):
                entries.append({**described, "is_default": True})
                routes.append((lane.rows, "default"))
        return entries, routes

    def described(self, lane: RowsLane) -> JsonObject | None:
        """What a model takes and how its answers look; None if its requests have to be seen."""
        handler = lane.row_handler
        if not isinstance(handler, TensorHandler) or not _PLAIN.issuperset(lane.name + lane.version):
            return None
        [spec] = handler.specs
        kind = _KINDS.get(spec.dtype)
        if kind is None:
            return None
        names = handler.output_names
        return {
            "name": lane.name,
            "version": lane.version,
            "kind": kind,
            "shape": list(spec.shape),
            "size": spec.fixed_size,
            "takes_json": self._decodes,
            "input": spec.name,
            "datatype": datatype_of(spec.torch_dtype),
            "output": names[0] if len(names) == 1 else "output0",
        }
