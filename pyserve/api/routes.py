"""From a request to the endpoint that answers it; and from whatever happens there to exactly one answer.

An endpoint is called as ``endpoint(exchange, **path_parameters)``, on the loop. It may

- return a ``Response``;
- be ``async`` and return one, or None as above: it then runs as one task;
- return None and answer later, through ``exchange.respond``: no task is made for it;
- raise. ``Router.respond_error`` is the one place where errors become answers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from pyserve.api import openapi
from pyserve.errors import (
    JsonObject,
    MethodNotAllowedError,
    OverloadedError,
    ResourceNotFoundError,
    ServeError,
    ServerError,
)
from pyserve.log import about
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Request, Response, json_response
from pyserve.security.cors import Cors, is_preflight
from pyserve.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

ANY = "*"
Endpoint = Callable[..., Response | Coroutine[Any, Any, Response | None] | None]
RouteRow = tuple[str, str, Endpoint]  # methods separated by blanks, or ANY; pattern; endpoint


_METHOD_ORDER = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")
# Of paths that were asked for before.
_FOUND_MAX = 1024
_FOUND_SIZE_MAX = 256


class Route:
    """A pattern of path segments and what answers there.

    A segment of the pattern is a literal, ``{name}``, ``{name}:literal``, or, as the last one, ``{name...}`` for one
    or more segments joined with ``/``. A parameter never matches an empty segment.
    """

    __slots__ = ("_count", "_literals", "_names", "_rest", "endpoint", "first", "methods", "pattern")

    def __init__(self, methods: str, pattern: str, endpoint: Endpoint):
        self.methods = None if methods == ANY else frozenset(methods.split())
        self.pattern = pattern
        self.endpoint = endpoint
        segments = pattern.rstrip("/").split("/")[1:]
        self._literals: list[tuple[int, str]] = []
        self._names: list[tuple[int, str, str]] = []
        self._rest = ""
        for index, segment in enumerate(segments):
            name, brace, suffix = segment.removeprefix("{").partition("}")
            if not brace:
                self._literals.append((index, segment))
            elif name.endswith("..."):
                self._rest = name.removesuffix("...")
            else:
                self._names.append((index, name, suffix))
        self._count = len(segments)
        self.first = segments[0] if segments and self._literals and self._literals[0][0] == 0 else None

    def match(self, segments: tuple[str, ...]) -> dict[str, str] | None:
        """The path parameters, or None if the path is another."""
        count = len(segments)
        if count != self._count and not (self._rest and count > self._count):
            return None
        for index, literal in self._literals:
            if segments[index] != literal:
                return None
        parameters = {}
        for index, name, suffix in self._names:
            value = segments[index]
            if suffix:
                if not value.endswith(suffix):
                    return None
                value = value.removesuffix(suffix)
            if not value:
                return None
            parameters[name] = value
        if self._rest:
            parameters[self._rest] = "/".join(segments[self._count - 1 :])
            if not parameters[self._rest]:
                return None
        return parameters

    def allows(self, method: str) -> bool:
        return self.methods is None or method in self.methods


class Router:
    """The app of one listener. Loop thread only.

    Args:
        rows: (methods, pattern, endpoint). Of several that match, the first whose methods are listed wins; then the
            first that takes any method.
        error_format: how errors become answers.
        cors: what other sites' pages may read; if anything, preflights are answered for every path there is.
        signposts: what to tell of a path without a route, given the request and the first segments of all routes.
        on_answer: called with the status of each answer that the router itself gives: those of endpoints that return
            a ``Response``, and errors. Answers that an endpoint gives by ``exchange.respond`` are not seen here.
        on_error: called with each error that becomes an answer here.

    Attributes:
        tasks: the ``async`` endpoints that are running.
    """

    def __init__(
        self,
        rows: Iterable[RouteRow],
        *,
        error_format: ErrorFormat | None = None,
        cors: Cors | None = None,
        on_answer: Callable[[int], None] | None = None,
        signposts: Callable[[Request, Iterable[str]], JsonObject] | None = None,
        on_error: Callable[[ServeError, Request], None] | None = None,
    ):
        # constant
        self._signposts = signposts
        self._error_format = error_format or ErrorFormat()
        self._answers_preflights = bool(cors)
        self._on_answer = on_answer
        self._on_error = on_error
        self._by_first: dict[str, list[Route]] = {}
        self._others: list[Route] = []
        for row in rows:
            route = Route(*row)
            same = self._others if route.first is None else self._by_first.setdefault(route.first, [])
            same.append(route)
        self._found: dict[tuple[str, str], tuple[Endpoint, dict[str, str]]] = {}
        # per request
        self.tasks: set[asyncio.Task[None]] = set()

    def __call__(self, exchange: Exchange) -> None:
        """Sees to it that ``exchange`` is answered, now or later."""
        request = exchange.request
        try:
            endpoint, parameters = self._found.get((request.method, request.path)) or self._look_up(request)
            if self._answers_preflights and is_preflight(request):
                endpoint, parameters = _preflight, {}
            answer = endpoint(exchange, **parameters)
        except Exception as error:
            self.respond_error(exchange, error)
            return
        if answer is None:
            return
        if isinstance(answer, Response):
            self._respond(exchange, answer)
        elif inspect.iscoroutine(answer):
            task = asyncio.get_running_loop().create_task(self._finish(exchange, answer))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def respond_error(self, exchange: Exchange, error: BaseException) -> None:
        """Answers with what ``error`` says of itself, or with a plain 500 if it says nothing."""
        request = exchange.request
        if not isinstance(error, ServeError):
            log.error("request %s %s %s failed", request.id, request.method, request.path, exc_info=error,
                      extra=about(request_id=request.id))  # fmt: skip
            error = ServerError("Internal error")
        if self._on_error is not None:
            self._on_error(error, request)
        self._respond(exchange, self._error_format.answer(error, request))

    def _respond(self, exchange: Exchange, response: Response) -> None:
        if self._on_answer is not None and not exchange.answered:
            self._on_answer(response.status)
        exchange.respond(response)

    async def _finish(self, exchange: Exchange, answer: Coroutine[Any, Any, Response | None]) -> None:
        try:
            response = await answer
        except asyncio.CancelledError:
            self.respond_error(exchange, OverloadedError("The server is shutting down.", headers={"Retry-After": "1"}))
            raise
        except Exception as error:
            self.respond_error(exchange, error)
        else:
            if response is not None:
                self._respond(exchange, response)

    def _look_up(self, request: Request) -> tuple[Endpoint, dict[str, str]]:
        """`_find`, remembered: only what has a route of its own, so that strangers cannot crowd the others out."""
        found = self._find(request)
        if found[0] is not _preflight and len(request.path) <= _FOUND_SIZE_MAX:
            if len(self._found) >= _FOUND_MAX:
                self._found.clear()
            self._found[request.method, request.path] = found
        return found

    def _find(self, request: Request) -> tuple[Endpoint, dict[str, str]]:
        segments = request.segments
        method = "GET" if request.method == "HEAD" else request.method
        fallback: tuple[Endpoint, dict[str, str]] | None = None
        allowed: set[str] = set()
        listed = self._by_first.get(segments[0], ()) if segments else ()
        for routes in (listed, self._others):
            for route in routes:
                parameters = route.match(segments)
                if parameters is None:
                    continue
                if route.methods is None:
                    fallback = fallback or (route.endpoint, parameters)
                elif method in route.methods:
                    return route.endpoint, parameters
                else:
                    allowed |= route.methods
            if fallback is not None:
                return fallback
        if not allowed:
            raise ResourceNotFoundError(detail=self._signposts(request, self._by_first) if self._signposts else None)
        if "GET" in allowed:
            allowed.add("HEAD")
        if self._answers_preflights and is_preflight(request):
            return _preflight, {}
        methods = ", ".join(each for each in _METHOD_ORDER if each in allowed)
        raise MethodNotAllowedError(methods, detail={"fix": f"methods here: {methods}"})


def _preflight(exchange: Exchange) -> Response:
    """A browser asks before a cross-origin call; the answer is in the CORS headers."""
    return Response(200)


def inference_descriptions(rows: Iterable[RouteRow], find: Callable[[str, str | None], object]) -> list[RouteRow]:
    """The rows that describe the inference ``rows``: the API as a whole, and each model by ``OPTIONS``.

    ``find`` is called with name and version of the model; it raises for an unknown one.
    """
    patterns = [pattern for _, pattern, _ in rows] + ["/", "/api-description"]

    def describe_api(exchange: Exchange) -> Response:
        return json_response(openapi.inference_api(patterns))

    def describe_model(
        exchange: Exchange, model_name: str, model_version: str | None = None, rest: str = ""
    ) -> Response:
        find(model_name, model_version)
        return json_response(openapi.model_api(model_name, patterns))

    return [
        ("OPTIONS", "/", describe_api),
        (ANY, "/api-description", describe_api),
        *(("OPTIONS", each, describe_model) for each in patterns if "{model_name}" in each),
        *(("OPTIONS", each, describe_api) for each in patterns if each == "/invocations"),
    ]


def metrics_routes(metrics: Metrics) -> list[RouteRow]:
    """What the metrics listener answers; for one that is shared, leave out the first two rows."""

    def describe(exchange: Exchange) -> Response:
        return json_response(openapi.metrics_api())

    def scrape(exchange: Exchange, rest: str = "") -> Response:
        return metrics.scrape(exchange.request)

    return [
        ("OPTIONS", "/", describe),
        (ANY, "/api-description", describe),
        (ANY, "/metrics", scrape),
        (ANY, "/metrics/{rest...}", scrape),
    ]
