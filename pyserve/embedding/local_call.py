"""A request that this process makes of its own engine: no bytes of HTTP, but the paths, limits and answers of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import unquote

from pyserve.client_calls import AnswerError, answer_error, told_error
from pyserve.http1.errors import BodyTooLargeError
from pyserve.request.body_budget import BodyBudget, body_budget_error
from pyserve.request.exchange import Exchange
from pyserve.request.ids import new_id
from pyserve.request.messages import Request, Response

CLIENT = "embedded"  # in the place of an address


class LocalAnswer(NamedTuple):
    """What came: the body, and the headers by their names in lower case."""

    body: bytes
    headers: dict[str, str]


class LocalCalls:
    """Loop thread only.

    Args:
        app: answers requests.
        size_max: bytes that a request's body may have.
        budget: of the bodies in memory.
    """

    def __init__(self, app: Callable[[Exchange], None], size_max: int, budget: BodyBudget):
        self._app = app
        self._size_max = size_max
        self._budget = budget

    async def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> LocalAnswer:
        """The answer. A caller that is cancelled meanwhile cancels the request.

        Args:
            path: with its query, as in a URL.

        Raises:
            AnswerError: of an answer that is an error.
        """
        size = len(body)
        if size > self._size_max:
            raise error_of(BodyTooLargeError(size, self._size_max, announced=size))
        if not self._budget.reserve(size):
            raise error_of(body_budget_error(self._budget))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        parts: list[bytes] = []
        heads: list[Response] = []

        def deliver(exchange: Exchange) -> None:
            if exchange.response is not None:
                heads.append(exchange.response)
                exchange.response = None
            parts.extend(bytes(each) for each in exchange.parts)
            exchange.parts.clear()
            exchange.parts_size = 0
            if (not exchange.is_streaming or exchange.is_ended) and not done.done():
                done.set_result(None)

        target, _, query = path.partition("?")
        request = Request(
            method, unquote(target), query=query, headers=list(headers.items()), body=bytearray(body), client=CLIENT,
            id=new_id(), arrived_at=time.monotonic_ns(),
        )  # fmt: skip
        exchange = Exchange(request, deliver, protocol_bytes=size)
        try:
            self._app(exchange)
            await done
        except asyncio.CancelledError:
            exchange.disconnect()
            raise
        finally:
            self._budget.release(size)
        if exchange.is_aborted and exchange.failure is not None:
            heads = [exchange.failure]
        return _answer(heads[0], parts)


def _answer(response: Response, parts: list[bytes]) -> LocalAnswer:
    if response.error is not None:
        raise error_of(response.error)
    body = b"".join((bytes(response.body), *map(bytes, response.tail))) if not parts else b"".join(parts)
    if response.status >= 400:
        raise answer_error(response.status, response.reason or "", body)
    headers = {str(name).lower(): str(value) for name, value in response.headers.items()}
    if response.content_type is not None:
        headers["content-type"] = response.content_type
    return LocalAnswer(body, headers)


def error_of(error: Exception) -> AnswerError:
    """An error of the engine as the client's exception, with all that is known of it: nobody else reads it."""
    status, detail = getattr(error, "status", 500), getattr(error, "detail", {})
    found = told_error(status, getattr(error, "message", "") or str(error), detail)
    found.__cause__ = error
    return found
