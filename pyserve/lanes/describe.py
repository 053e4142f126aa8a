"""How a handler describes itself: a request of its own kind, which a worker answers alone. Loop thread only."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NamedTuple

from pyserve.errors import OverloadedError, ServerError
from pyserve.lanes.lane import Lane
from pyserve.lanes.pending import Pending
from pyserve.lanes.python import DESCRIBE
from pyserve.request.exchange import Exchange
from pyserve.request.ids import new_id
from pyserve.request.messages import Request, Response


class SelfDescription(NamedTuple):
    """The answer of a handler that was asked to describe itself.

    Attributes:
        value: parsed from JSON; None when it says nothing.
        status, headers, reason: that the handler set for its answer.
    """

    value: Any = None
    status: int = 200
    headers: dict[str, str] = {}
    reason: str = ""


class _Question(Pending):
    """It is about the handler, and no request for what the model does."""

    __slots__ = ()
    is_counted = False


async def ask_handler(lane: Lane | None, name: str, version: str) -> SelfDescription:
    """Asks a handler of ``lane``. The built-in ones in the native lane say nothing.

    Raises:
        OverloadedError: there is no worker to ask.
        ServeError: the handler failed, or did not answer in time.
    """
    if lane is None or not (lane.ready_count or lane.may_take):
        raise OverloadedError(
            f'Model "{name}" has no worker to serve describe request. Please use scale workers API to add workers.',
            detail={"reason": "no worker", "fix": f"PUT /models/{name}?min_worker=1"},
        )
    if lane.is_native:
        return SelfDescription()
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    request = Request("GET", "", headers=[("describe", "True")], id=new_id(), arrived_at=time.monotonic_ns())

    def deliver(exchange: Exchange) -> None:
        if not answered.done():
            answered.set_result(None)

    exchange = Exchange(request, deliver)
    lane.predict(_Question(lane, exchange, version, "default", flags=DESCRIBE))
    await answered
    assert exchange.response is not None
    return _description(exchange.response)


def _description(response: Response) -> SelfDescription:
    try:
        value = json.loads(bytes(response.body))
    except (ValueError, RecursionError):
        value = None
    if response.status >= 400 and isinstance(value, dict) and {"code", "type", "message"} <= value.keys():
        error = ServerError(str(value["message"]), detail=value.get("detail"))
        error.status, error.type = response.status, str(value["type"])
        raise error
    return SelfDescription(value, response.status, dict(response.headers or {}), response.reason or "")
