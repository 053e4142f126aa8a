"""The HTTP paths of an engine as ASGI 3 applications."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyserve.embedding.engine import EmbeddedServer
from pyserve.embedding.given_models import AnyModel
from pyserve.embedding.http_call import HttpCall, Receive, Send
from pyserve.embedding.http_scope import Scope
from pyserve.errors import ConfigError, OverloadedError, ResourceNotFoundError
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat
from pyserve.serving import ServingError

log = logging.getLogger("pyserve.asgi")


class Application:
    """An ASGI 3 application. Made by `application` and `management`.

    Attributes:
        engine: that answers.
    """

    def __init__(self, engine: EmbeddedServer, names: Sequence[str]):
        self.engine = engine
        self._names = list(names)
        self._owns = False  # it has started the engine, and stops it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, request or life of a server.

        Raises:
            RuntimeError: of a kind that ASGI has not, or on another event loop than the engine's.
        """
        kind = scope["type"]
        if kind == "http":
            await self._call(scope, receive, send).run()
        elif kind == "lifespan":
            await self._live(receive, send)
        elif kind == "websocket":
            await _refuse_websocket(scope, receive, send)
        else:
            raise RuntimeError(f"scopes of the type {kind!r} are not served")

    def _call(self, scope: Scope, receive: Receive, send: Send) -> HttpCall:
        if not self.engine.is_started:
            return HttpCall(_not_started, _strangers(), scope, receive, send)
        running = self.engine.running
        if running.loop is not asyncio.get_running_loop():
            raise RuntimeError("the engine runs on another event loop; start it in the server's lifespan")
        router, connections = running.listener(tuple(self._names))
        return self._new_call(router, connections, scope, receive, send)

    def _new_call(
        self, router: Callable[[Exchange], None], connections: Connections, scope: Scope, receive: Receive, send: Send
    ) -> HttpCall:
        return HttpCall(router, connections, scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """The engine's life is the server's, unless somebody else has started it."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    if not self.engine.is_started:
                        await self.engine.start()
                        self._owns = True
                except (ServingError, ConfigError) as error:
                    await send({"type": "lifespan.startup.failed", "message": f"pyserve: {error}"})
                    return
                except Exception as error:
                    log.exception("the engine cannot be started")
                    await send({"type": "lifespan.startup.failed", "message": f"pyserve: {type(error).__name__}"})
                    return
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                if self._owns:
                    self._owns = False
                    await self.engine.stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


def application(
    engine: EmbeddedServer | Sequence[AnyModel] | AnyModel, *, config: Mapping[str, Any] | None = None,
    config_file: str | os.PathLike[str] | None = None,
) -> Application:  # fmt: skip
    """What the inference port of a server answers, and ``/metrics`` unless ``enable_metrics_api`` is off.

    Args:
        engine: an engine, or models for a new one. One that does not run is started and stopped by the server's
            lifespan.
        config, config_file: of a new one, as for `pyserve.embedded`.

    Raises:
        TypeError: a configuration is given beside an engine.
    """
    return Application(_engine(engine, config, config_file), ["inference", "metrics"])


def management(engine: EmbeddedServer) -> Application:
    """What the management port of a server answers.

    As nobody knows who can reach it, calls need the management key (`EmbeddedServer.keys`) unless
    ``disable_token_authorization`` is on, and registering ``enable_model_api``.
    """
    return Application(_engine(engine, None, None), ["management"])


def _engine(
    engine: EmbeddedServer | Sequence[AnyModel] | AnyModel, config: Mapping[str, Any] | None,
    config_file: str | os.PathLike[str] | None,
) -> EmbeddedServer:  # fmt: skip
    if not isinstance(engine, EmbeddedServer):
        models = list(engine) if isinstance(engine, list | tuple) else [engine]
        return EmbeddedServer(models, config=config, config_file=config_file)
    if config is not None or config_file is not None:
        raise TypeError("give config to the engine: pyserve.embedded(models, config=...)")
    return engine


def _not_started(exchange: Exchange) -> None:
    raise OverloadedError(
        "The engine is not started.",
        detail={"fix": "run the server with its lifespan on, or start the engine in that of the application around it"},
        headers={"Retry-After": "1"},
    )


def _strangers() -> Connections:
    """Of requests that no engine answers."""
    return Connections(Http1Limits(), error_format=ErrorFormat(with_private_detail=False))


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()  # websocket.connect
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1000, "reason": "there are no websockets here"})
        return
    error = ResourceNotFoundError()
    body = ErrorFormat(with_detail=False).response(error, "").body
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": bytes(body), "more_body": False})
