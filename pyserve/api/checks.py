"""What stands before an endpoint: the checks of browsers and of keys. An endpoint without any is called directly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Container, Coroutine, Iterable, Sequence
from typing import Any

from pyserve.api.routes import ANY, Endpoint, RouteRow
from pyserve.models.changes import Changes
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response
from pyserve.security.tokens import Scope, TokenError, Tokens

Check = Callable[[Request], None]

# Probes and descriptions: load balancers have no keys, and the descriptions tell nothing of the models.
OPEN_PATTERNS = frozenset(
    {
        "/", "/api-description", "/ping", "/ping/{rest...}", "/ready", "/live", "/v2", "/v2/health/live",
        "/v2/health/ready", "/console/{asset}", "/docs", "/docs/{file}",
    }
)  # fmt: skip


def protected(
    rows: Iterable[RouteRow], tokens: Tokens | None, scope: Scope, *checks: Check, managed: Container[str] = ()
) -> list[RouteRow]:
    """The same rows, whose endpoints are called once all ``checks`` and that of the key of ``scope`` have passed.

    Args:
        managed: patterns of both APIs where one listener has both: the key of management is as good.
    """
    found = []
    # Where models run, what has run was let in before.
    is_passed = scope == "inference"
    for methods, pattern, endpoint in rows:
        passed = list(checks)
        if tokens is not None and tokens.guards(scope) and pattern not in OPEN_PATTERNS:
            passed.append(_key_check(tokens, scope, is_managed=pattern in managed))
        found.append((methods, pattern, _behind(endpoint, passed, is_passed=is_passed)))
    return found


def rotation_routes(tokens: Tokens | None, changes: Changes) -> list[RouteRow]:
    """``/token?type=management|inference``, with the API key: replaces a key. TorchServe takes any method."""

    async def rotate(exchange: Exchange) -> Response:
        assert tokens is not None
        request = exchange.request
        tokens.check_rotation(request.header("authorization"))
        scope = next((value for name, value in request.params if name == "type"), "")
        with changes.one():
            await asyncio.to_thread(tokens.rotate, scope)
        return Response(200, b"\n", content_type="application/json")

    return [] if tokens is None else [(ANY, "/token", rotate)]


def _key_check(tokens: Tokens, scope: Scope, *, is_managed: bool) -> Check:
    def check(request: Request) -> None:
        tokens.check(scope, request.header("authorization"))

    def check_both(request: Request) -> None:
        try:
            tokens.check(scope, request.header("authorization"))
        except TokenError:
            if not tokens.guards("management"):
                raise
            with contextlib.suppress(TokenError):
                tokens.check("management", request.header("authorization"))
                return
            raise

    return check_both if is_managed else check


def _behind(endpoint: Endpoint, checks: Sequence[Check], *, is_passed: bool) -> Endpoint:
    if not checks:
        return endpoint

    def call(exchange: Exchange, **parameters: str) -> Response | Coroutine[Any, Any, Response | None] | None:
        if not is_passed or exchange.kept is None:
            for check in checks:
                check(exchange.request)
        return endpoint(exchange, **parameters)

    return call
