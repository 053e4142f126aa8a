"""What stands before an endpoint: the checks of browsers and of keys. An endpoint without any is called directly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from pyserve.api.routes import ANY, Endpoint, RouteRow
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from pyserve.security.tokens import Scope, Tokens

Check = Callable[[Request], None]

# Probes and descriptions: load balancers have no keys, and the descriptions tell nothing of the models.
OPEN_PATTERNS = frozenset(
    {
        "/", "/api-description", "/ping", "/ping/{rest...}", "/ready", "/live", "/v2", "/v2/health/live",
        "/v2/health/ready",
    }
)  # fmt: skip


def protected(rows: Iterable[RouteRow], tokens: Tokens | None, scope: Scope, *checks: Check) -> list[RouteRow]:
    """The same rows, whose endpoints are called once all ``checks`` and that of the key of ``scope`` have passed."""
    with_key = checks if tokens is None or not tokens.guards(scope) else (*checks, _key_check(tokens, scope))
    return [
        (methods, pattern, _behind(endpoint, checks if pattern in OPEN_PATTERNS else with_key))
        for methods, pattern, endpoint in rows
    ]


def rotation_routes(tokens: Tokens | None) -> list[RouteRow]:
    """``/token?type=management|inference``, with the API key: replaces a key. TorchServe takes any method."""

    async def rotate(exchange: Exchange) -> Response:
        assert tokens is not None
        request = exchange.request
        tokens.check_rotation(request.header("authorization"))
        scope = next((value for name, value in request.params if name == "type"), "")
        await asyncio.to_thread(tokens.rotate, scope)
        return Response(200, b"\n", content_type="application/json")

    return [] if tokens is None else [(ANY, "/token", rotate)]


def _key_check(tokens: Tokens, scope: Scope) -> Check:
    def check(request: Request) -> None:
        tokens.check(scope, request.header("authorization"))

    return check


def _behind(endpoint: Endpoint, checks: Sequence[Check]) -> Endpoint:
    if not checks:
        return endpoint

    def call(exchange: Exchange, **parameters: str) -> Response | Coroutine[Any, Any, Response | None] | None:
        for check in checks:
            check(exchange.request)
        return endpoint(exchange, **parameters)

    return call
