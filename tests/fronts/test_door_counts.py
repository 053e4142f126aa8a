"""What a front end counts of a request that crossed as a tensor is told, though what crosses changes meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, cast

import pytest

from pyserve.fronts import wire
from pyserve.fronts.door import Door
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request
from tests.fronts.test_gate import SHARES
from tests.fronts.test_rows import ENTRY

NAME, VERSION = ENTRY["name"], ENTRY["version"]


class Ring:
    """Stands in for a link: notes what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int, bytes, bytes]] = []

    def send(self, kind: int, flags: int, ticket: int, head: bytes = b"", body: bytes = b"") -> None:
        self.sent.append((kind, flags, ticket, head, bytes(body)))

    send_whole = send

    def take_back(self, ticket: int) -> None:
        pass

    def times(self) -> list[wire.ToldTimes]:
        return [wire.ToldTimes.read(body) for kind, *_, body in self.sent if kind == wire.TIMES]


def table(generation: int, *entries: dict[str, Any]) -> bytes:
    return json.dumps({"generation": generation, "entries": entries}).encode()


def door_with(ring: Ring) -> Door:
    door = Door(
        cast(Any, None), SHARES, ErrorFormat(), on_open=lambda: None, on_parting=lambda: None, on_close=lambda: None,
        on_drain=lambda: None, answer_size_max=1000,
    )  # fmt: skip
    door.row_listeners = frozenset({0})
    door._channel, door._is_open = cast(Any, ring), True
    return door


def ask(door: Door) -> Exchange:
    body = bytearray(json.dumps([1.0] * (ENTRY["size"] // 4)).encode())
    request = Request("POST", f"/predictions/{NAME}", body=body, id="x", client="127.0.0.1:1",
                      headers=[("Content-Type", "application/json")], arrived_at=time.monotonic_ns())  # fmt: skip
    exchange = Exchange(request, lambda exchange: None)
    door.app(0)(exchange)
    return exchange


@pytest.mark.parametrize("tables", [0, 1, 3])
@pytest.mark.parametrize("ends", ["again", "answered", "gone"])
def test_a_decoded_body_is_told_once_however_often_the_table_changes(tables: int, ends: str) -> None:
    async def run() -> None:
        ring = Ring()
        door = door_with(ring)
        door._take(wire.TABLE, 0, 0, b"", table(1, ENTRY))
        exchange = ask(door)
        kind, _, ticket, *_ = ring.sent[-1]
        assert kind == wire.ROW
        for generation in range(tables):
            door._take(wire.TABLE, 0, 0, b"", table(2 + generation))
        if ends == "again":
            door._take(wire.AGAIN, 1, ticket, b"", b"")
            assert ring.sent[-1][0] == wire.REQUEST
        elif ends == "answered":
            door._take(wire.ANSWER, 200, ticket, b'["text/plain", "", false, []]', b"")
        else:
            assert exchange.on_disconnect is not None
            exchange.on_disconnect()
        door._tell_counts()
        door._tell_counts()
        (told,) = ring.times()
        assert (told.name, told.version, sum(told.preprocess[0])) == (NAME, VERSION, 1)
        door._take(wire.TABLE, 0, 0, b"", table(9))
        assert not door._former_tables  # nothing is on its way under them

    asyncio.run(run())
