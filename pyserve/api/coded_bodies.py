"""Compressed bodies for what the server itself has to read: built-in handlers, and tensors of KServe's protocol.

A handler of an archive's own gets its bodies as they were sent, as TorchServe's do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from pyserve.models.model import Model
from pyserve.request.body_budget import BodyBudget, body_budget_error
from pyserve.request.content_coding import decode_body
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request

_HEADER = "content-encoding"


class CodedBodies:
    """Loop thread only.

    Args:
        size_max: bytes of a body once its compression is undone (``max_request_size``).
        budget: of bodies in memory, which it counts in.
        pool: where compression is undone.
        is_on: whether at all; else built-in handlers get bodies as they were sent, too.
    """

    def __init__(self, size_max: int, budget: BodyBudget, pool: Executor, *, is_on: bool = True):
        self._size_max = size_max
        self._budget = budget
        self._pool = pool
        self._is_on = is_on

    def are_undone(self, request: Request, model: Model, *, has_tensors: bool = False) -> bool:
        """Whether ``request`` is one that `undo` is for."""
        return bool(request.header(_HEADER)) and self._is_on and (has_tensors or model.built_in_handler is not None)

    async def undo(self, exchange: Exchange, then: Callable[[], object]) -> None:
        """Calls ``then`` once the body of ``exchange`` has no coding any more.

        Raises:
            ServeError: of `decode_body`, of ``then``, or as there is no room for the body.
        """
        request = exchange.request
        codings = ",".join(value for name, value in request.headers if name.lower() == _HEADER)
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._pool, decode_body, request.body, codings, self._size_max)
        if exchange.disconnected:
            return
        more = max(0, len(body) - len(request.body))
        if not self._budget.reserve(more):
            raise body_budget_error(self._budget)
        exchange.reserved += more
        request.body = body
        request.replace_headers((_HEADER, "content-length"), [("Content-Length", str(len(body)))])
        then()
