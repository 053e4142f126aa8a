"""Where there is one front end, plain requests to models of plain tensors are answered natively by this very process.

What models take so, and for how long, is what front ends are told (`tensors.py`); how requests ask and are answered is
the same there (`fast_forms.py`). See csrc/bindings_fast.h for the rest.

Loop thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pyserve.config.config import Config
from pyserve.engine import Engine
from pyserve.fronts.fast_forms import lines_of, may_be_fast, options_of, paths_of
from pyserve.fronts.rows import Route
from pyserve.fronts.tensors import Tensors
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol, FastTlsProtocol
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.models.registry import Registry
from pyserve.request.exchange import Exchange
from pyserve.security.tokens import Tokens
from pyserve.telemetry.access_log import AccessLog

if TYPE_CHECKING:
    from pyserve import _core


def protocol_maker(  # noqa: PLR0917 - all that a listener has
    registry: Registry, engine: Engine, config: Config, connections: Connections, app: Callable[[Exchange], None],
    log: object, tokens: Tokens | None, *, is_tls: bool, predicts: bool,
) -> Callable[[], Http1Protocol]:  # fmt: skip
    """What makes the protocols of a listener's connections.

    Args:
        log: notes answers.
        tokens: the keys, if there are any.
        predicts: predictions are asked for there.
    """
    # Else in a checkout whose extensions were built before there was this one.
    is_built = hasattr(getattr(engine.core, "FastPath", None), "wait_awake")
    if not (predicts and is_built and may_be_fast(config, log)):
        return partial(Http1TlsProtocol if is_tls else Http1Protocol, app, connections.limits, connections)
    tensors = Tensors(registry, engine.core, tokens=tokens, decodes=config.decode_input_request)
    path = FastPath(tensors, connections, app, lines_of(log), config.max_response_size)
    engine.let_wait(path.native)
    return partial(path.protocol, FastTlsProtocol if is_tls else FastProtocol)


class FastPath:
    """Of one listener.

    Args:
        tensors: which models take plain tensors; nobody else has started it.
        app: answers all other requests.
        log: notes answers.
        answer_size_max: bytes (``max_response_size``).
    """

    def __init__(
        self, tensors: Tensors, connections: Connections, app: Callable[[Exchange], None], log: AccessLog | None,
        answer_size_max: int,
    ):  # fmt: skip
        self._tensors = tensors
        self._connections = connections
        self._app = app
        self._log = log
        self._answer_size_max = answer_size_max
        self._core: Any = tensors.rings
        self._is_closed = False
        keys = tensors.tokens
        self.native: _core.FastPath = self._core.FastPath(
            tensors.table, budget=connections.budget, call_soon=asyncio.get_running_loop().call_soon, log=log,
            key_until=None if keys is None else partial(keys.passes_until, "inference"),
            **options_of(connections),
        )  # fmt: skip
        connections.on_parting = self.close
        tensors.start(self._set)

    def protocol(self, kind: type[FastProtocol] = FastProtocol) -> FastProtocol:
        """Of a connection that has come."""
        connections = self._connections
        native = self._core.FastConnection(self.native)
        return kind(self._app, connections.limits, connections, native)

    def close(self) -> None:
        """Takes nothing any more; what is under way becomes ordinary requests."""
        if self._is_closed:
            return
        self._is_closed = True
        self._tensors.stop()
        self.native.close()
        for connection in self._connections.members:
            if isinstance(connection, FastProtocol):
                connection.take_over()

    def _set(self, told: bytes) -> None:
        tensors = self._tensors
        routes: dict[str, _core.FastRoute] = {}
        for entry, (rows, url_version) in zip(tensors.entries, tensors.routes, strict=True):
            route = Route(0, entry, self._answer_size_max)
            for path, options, _ in paths_of(entry, route, self._connections, self._log):
                routes[path] = self._core.FastRoute(rows, url_version, **options)
        self.native.set(tensors.generation, routes)
