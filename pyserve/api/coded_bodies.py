"""Compressed bodies for what the server itself has to read: built-in handlers, and tensors of KServe's protocol.

A handler of an archive's own gets its bodies as they were sent, as TorchServe's do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor

from pyserve.models.model import Model
from pyserve.request.body_budget import BodyBudget, body_budget_error
from pyserve.request.content_coding import Decoding
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request

_HEADER = "content-encoding"
# Bytes that a body may grow by before they are asked for.
_STEP_SIZE = 1 << 20


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
            ServeError: of `Decoding`, of ``then``, or as there is no room for the body.
        """
        request = exchange.request
        codings = ",".join(value for name, value in request.headers if name.lower() == _HEADER)
        loop = asyncio.get_running_loop()
        decoding = Decoding(request.body, codings, self._size_max)
        counted, is_done = 0, False
        while not is_done:
            is_done = await loop.run_in_executor(self._pool, decoding.run, _STEP_SIZE)
            if exchange.disconnected:
                return
            # The packed body goes once the other one is there.
            more = max(0, decoding.held - (len(request.body) if is_done else 0)) - counted
            if more > 0 and not self._budget.reserve(more):
                raise body_budget_error(self._budget)
            if more < 0:
                self._budget.release(-more)
            counted += more
            exchange.reserved += more
        body = decoding.body if isinstance(decoding.body, bytearray) else bytearray(decoding.body)
        request.body = body
        request.replace_headers((_HEADER, "content-length"), [("Content-Length", str(len(body)))])
        then()
