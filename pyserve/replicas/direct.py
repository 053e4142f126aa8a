"""The direct path: a port of each replica's own, which the engine reads itself.

For cheap models, large bodies and long streams, where a proxy's copy of each costs more than the prediction. Clients
choose the replica, so that nothing spreads requests but they.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pyserve.embedding.application import Application
from pyserve.embedding.http_call import Receive, Send
from pyserve.embedding.http_scope import Scope
from pyserve.errors import ConfigError
from pyserve.http1.protocol import Http1Protocol
from pyserve.serving import ServingError

log = logging.getLogger("pyserve.replicas")

# Of one node: so many replicas may stand beside each other.
PORTS_MAX = 100
BACKLOG = 2048


class DirectApplication:
    """An engine's ASGI application whose lifespan opens and closes the port, too.

    Args:
        application: whose engine its lifespan starts.
        port: the first that is tried; another replica of the node has the next free one.
        host: that it listens on.

    Attributes:
        address: ``host:port`` while it listens, else ``""``.
    """

    def __init__(self, application: Application, port: int, host: str = "0.0.0.0"):
        self._application = application
        self._engine, self._port, self._host = application.engine, port, host
        self._server: asyncio.Server | None = None
        self.address = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As of `Application`."""
        if scope["type"] != "lifespan":
            await self._application(scope, receive, send)
            return

        async def receive_closing() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._close()  # who connects from now on takes another replica; who is connected is answered
            return message

        await self._application(scope, receive_closing, self._opening(send))

    def _opening(self, send: Send) -> Callable[[MutableMapping[str, Any]], Awaitable[None]]:
        async def send_when_open(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    await self._open()
                except (ServingError, ConfigError, OSError) as error:
                    await self._engine.stop()
                    message = {"type": "lifespan.startup.failed", "message": f"pyserve: {error}"}
            await send(message)

        return send_when_open

    async def _open(self) -> None:
        running = self._engine.running
        if running.config.disable_token_authorization is not True and "inference" not in self._engine.keys:
            raise ServingError(
                f"direct_port {self._port} would answer everybody: {running.config.token_file or 'token_file'} has no "
                "key for inference"
            )
        router, connections = running.listener(("inference", "metrics"))
        sock = free_socket(self._host, self._port)
        self._server = await running.loop.create_server(
            lambda: Http1Protocol(router, connections.limits, connections), sock=sock, backlog=BACKLOG
        )
        self.address = "{}:{}".format(*sock.getsockname()[:2])
        log.info("listening on %s besides Ray's proxies", self.address)

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.address = ""


def free_socket(host: str, first: int) -> socket.socket:
    """Bound to the first free port from ``first`` on.

    Raises:
        ServingError: all of `PORTS_MAX` are taken.
    """
    for port in range(first, min(first + PORTS_MAX, 65_536)):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(BACKLOG)  # two may bind to one port, but only one can listen
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return sock
    raise ServingError(f"direct_port: the ports from {first} to {first + PORTS_MAX - 1} are all taken on this node")
