"""One set of models behind two listeners of this process: one answers plain requests natively, one does not."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from pyserve.api.checks import protected
from pyserve.api.coded_bodies import CodedBodies
from pyserve.api.inference import Inference
from pyserve.api.kserve import KServe
from pyserve.api.routes import Router
from pyserve.archive.archive import open_archive
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource
from pyserve.engine import Engine
from pyserve.fronts.fast_path import FastPath
from pyserve.fronts.listening import new_compression
from pyserve.fronts.tensors import Tensors
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.http1.protocol import Http1Protocol
from pyserve.lanes.resources import Services
from pyserve.lanes.spawner import Spawner
from pyserve.models.registry import Registry
from pyserve.request.body_budget import BodyBudget
from pyserve.request.messages import ErrorFormat
from pyserve.security.cors import Cors
from pyserve.security.tokens import Tokens
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.metrics import Metrics
from tests.support.fakes import FakeTransport
from tests.support.networks import Gate

HANG_S = 120
_DATE = re.compile(rb"(?<=\r\nDate: )[^\r]*")
_SIZE = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)


class Wire:
    """A connection without sockets, on the real loop."""

    def __init__(self, protocol: Http1Protocol):
        self.protocol = protocol
        self.transport = FakeTransport(self, protocol)  # type: ignore[arg-type]
        protocol.connection_made(self.transport)
        self._seen = 0

    def advance(self, seconds: float = 0.0) -> None:
        """As of `FakeLoop`: the real one turns by itself."""

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        asyncio.get_running_loop().call_soon(callback, *args)

    def send(self, *pieces: bytes) -> None:
        """Delivers segments, as long as there is a connection."""
        for piece in pieces:
            if piece and not self.transport.closed:
                self.transport.protocol.data_received(piece)

    @property
    def is_over(self) -> bool:
        return self.transport.closed or self.transport.eof_written

    async def answers(self, count: int = 1) -> bytes:
        """The next answers, or fewer if the connection ends."""
        end = time.monotonic() + HANG_S
        while not self.is_over and _count(self.transport.output[self._seen :]) < count:
            assert time.monotonic() < end, f"hangs: {self.transport.output[self._seen :]!r}"
            await asyncio.sleep(0)
        told = self.transport.output[self._seen :]
        self._seen += len(told)
        return _DATE.sub(b"DATE", told)


class Way:
    """A listener's part."""

    def __init__(self, connections: Connections, protocol: Callable[[], Http1Protocol]):
        self.connections = connections
        self._protocol = protocol

    def wire(self) -> Wire:
        return Wire(self._protocol())


class Site:
    """Attributes:
        fast, slow: the two listeners.
        path: of the first.
    """  # fmt: skip

    def __init__(
        self, registry: Registry, services: Services, limits: Http1Limits, log: AccessLog | None = None,
        tokens: Tokens | None = None,
    ):  # fmt: skip
        self.registry = registry
        self.services = services
        services.metrics.models = registry.all_models
        bodies = CodedBodies(limits.body_size_max, BodyBudget(limits.body_budget_size), services.preprocess_pool)
        inference = Inference(registry, bodies)
        kserve = KServe(registry, inference, services.metrics, services.config.max_response_size,
                        is_strict=False, error_format=services.error_format)  # fmt: skip
        rows = protected([*inference.routes(), *kserve.routes()], tokens, "inference")
        cors = Cors(services.config)
        router = Router(rows, error_format=services.error_format, cors=cors)
        fast, slow = (
            Connections(
                limits, BodyBudget(limits.body_budget_size), decorate=cors.add if cors else None,
                compression=new_compression(services.config, services.preprocess_pool),
            )
            for _ in range(2)
        )  # fmt: skip
        tensors = Tensors(registry, services.engine.core, tokens=tokens, decodes=True)
        self.path = FastPath(tensors, fast, router, log, services.config.max_response_size)
        services.engine.let_wait(self.path.native)
        self.fast = Way(fast, self.path.protocol)
        self.slow = Way(slow, lambda: Http1Protocol(router, limits, slow))

    @property
    def taken(self) -> int:
        """Requests that were answered natively, or begun so."""
        return self.path.native.request_count

    def lane(self, name: str) -> Any:
        return self.registry.get(name)._lane

    async def until(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + HANG_S
        while not is_done():
            assert time.monotonic() < end, "hangs"
            await asyncio.sleep(0)

    async def both(self, *pieces: bytes, count: int = 1) -> tuple[bytes, bytes]:
        """What the two answer, each on a new connection."""
        wires = self.fast.wire(), self.slow.wire()
        told = []
        for wire in wires:
            wire.send(*pieces)
            told.append(await wire.answers(count))
            if not wire.is_over:
                wire.transport.lose()
        return told[0], told[1]


def archives_in(store: Path) -> list[Path]:
    return sorted(store.glob("*.mar"))


@asynccontextmanager
async def site(
    store: Path, *, limits: Http1Limits | None = None, log: AccessLog | None = None, gate: Gate | None = None,
    tokens: Tokens | None = None, **config: Any,
) -> AsyncIterator[Site]:  # fmt: skip
    """A site with all archives of the folder ``store``. At its end ``gate`` is opened: what it holds up must end."""
    engine = Engine(asyncio.get_running_loop(), cpu_budget=2)
    pool = ThreadPoolExecutor(2)
    spawner = Spawner()
    services = Services(
        Config(model_store=str(store), **config), engine, Metrics(torch_version=torch.__version__), pool, spawner,
        ErrorFormat(),
    )  # fmt: skip
    registry = Registry(services)
    archives = {str(path): open_archive(str(path)) for path in archives_in(store)}
    await registry.load_at_start([ModelSource(None, path) for path in archives], archives, {})
    made = Site(registry, services, limits or Http1Limits(), log, tokens)
    try:
        yield made
    finally:
        if gate is not None:
            gate.open()
        made.path.close()
        await registry.drain()
        await spawner.close()
        pool.shutdown()
        engine.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    """On a loop of its own."""
    asyncio.run(asyncio.wait_for(test, 4 * HANG_S))


def post(path: str, body: bytes, *lines: str, id: str = "an-id") -> bytes:
    """A request; without an id if that is empty."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", *lines, f"Content-Length: {len(body)}"]
    head += [f"x-request-id: {id}"] if id else []
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def _count(output: bytes) -> int:
    """Complete answers, as long as each has a size."""
    count = 0
    while output:
        head, blank, output = output.partition(b"\r\n\r\n")
        size = _SIZE.search(head + b"\r\n")
        if not blank or (size is not None and len(output) < int(size[1])):
            return count
        output = output[int(size[1]) if size is not None else 0 :]
        count += not head.startswith(b"HTTP/1.1 100 ")
    return count
