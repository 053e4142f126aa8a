"""One set of models behind two listeners of this process: one answers plain requests natively, one does not.

The first is the engine's own, or, for a test that asks for `front_end`, that of a front end: a door and a gate with a
ring between them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
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
from pyserve.fronts.door import Door
from pyserve.fronts.fast_path import FastPath
from pyserve.fronts.gate import Gate as EngineGate
from pyserve.fronts.listening import new_compression
from pyserve.fronts.meeting import Meeting
from pyserve.fronts.meeting import Way as MeetingWay
from pyserve.fronts.shared_budget import SharedBudget
from pyserve.fronts.shares import Shares
from pyserve.fronts.tensors import Tensors
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol
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


# What `site` makes: see `front_end`.
_HAS_FRONT_END = False


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites have a front end."""
    monkeypatch.setattr("tests.support.two_ways._HAS_FRONT_END", True)


@pytest.fixture(params=["own process", "front end"])
def either(request: pytest.FixtureRequest) -> str:
    """Sites have a front end, or none."""
    if request.param == "front end":
        request.getfixturevalue("front_end")
    return str(request.param)


class Site:
    """Attributes:
        fast, slow: the two listeners.
        path: of the first.
        front: the front end that it is of; None if it is the engine's own.
    """  # fmt: skip

    front: FrontEnd | None = None

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
        self.router, self.log, self.tokens = router, log, tokens
        self.tensors = self.new_tensors()
        self.fast = Way(fast, lambda: Http1Protocol(router, limits, fast))
        self.slow = Way(slow, lambda: Http1Protocol(router, limits, slow))

    def new_tensors(self) -> Tensors:
        return Tensors(self.registry, self.services.engine.core, tokens=self.tokens, decodes=True)

    async def open(self) -> None:
        """Has the first listener answer natively what it can."""
        if _HAS_FRONT_END:
            self.front = FrontEnd(self)
            await self.front.open()
            self.fast = self.front.way
            self.path: Any = self.front.listener
            return
        config, connections = self.services.config, self.fast.connections
        self.path = FastPath(self.tensors, connections, self.router, self.log, config.max_response_size)
        self.services.engine.let_wait(self.path.native)
        self.fast = Way(connections, self.path.protocol)

    def close(self) -> None:
        if self.front is not None:
            self.front.close()
        else:
            self.path.close()

    @property
    def taken(self) -> int:
        """Requests that were answered natively, or begun so."""
        return int(self.path.native.request_count)

    def lane(self, name: str) -> Any:
        return self.registry.get(name)._lane

    async def until(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + HANG_S
        while not is_done():
            assert time.monotonic() < end, "hangs"
            await asyncio.sleep(0)

    async def until_told(self) -> None:
        """Returns once what there is may be answered natively."""
        tensors, front = self.tensors, self.front
        await self.until(
            lambda: bool(tensors.entries) and (front is None or front.door._table.generation == tensors.generation)
        )

    async def until_crossed(self) -> None:
        """Returns once the engine has all that was sent."""
        if self.front is not None:
            [link], sent = self.front.gate._links.values(), self.front.door._ticket + self.taken
            await self.until(lambda: link.request_count >= sent)

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


class FrontEnd:
    """The front end of a site, and the engine's side of it."""

    def __init__(self, site: Site):
        config, connections = site.services.config, site.fast.connections
        limits, format = connections.limits, site.services.error_format
        self.shares = Shares(
            process_count=2, body_budget_size=limits.body_budget_size, connection_count_max=1000, in_flight_max=10_000,
            body_size_max=limits.body_size_max, answer_size_max=2**31, waiting_size_max=64 << 20,
        )  # fmt: skip
        self._site = site
        self._meeting = Meeting.make()
        self.gate = self.new_gate()
        connections.budget = self.shares.new_budget()
        self.door = Door(
            MeetingWay.of(self._meeting.for_front_end(0)), self.shares, format, on_open=self._opened,
            on_parting=connections.part, on_close=bool, on_drain=bool, answer_size_max=config.max_response_size,
            bodies=connections.budget,
        )  # fmt: skip
        self.door.connections, self.door.row_listeners = [connections], frozenset({0})
        assert self.door.fast is not None
        make = self.door.fast.listen(0, connections, self.door.app(0), site.log, config.max_response_size)
        self.listener = self.door.fast.listeners[0]
        self.way = Way(connections, partial(make, FastProtocol))

    def new_gate(self) -> EngineGate:
        """An engine's; one at a time."""
        again = Meeting(self._meeting.sock.dup(), self._meeting.secret)
        again.sock.setblocking(False)
        budget = SharedBudget(self.shares.body_budget_size, self.shares.process_count)
        gate = EngineGate(again, 1, self.shares, budget, self._site.services.error_format)
        gate.tensors = self._site.tensors = self._site.new_tensors()
        return gate

    async def open(self) -> None:
        """Returns when what there is may be answered natively."""
        self.door.start()
        await self.gate.open([self._site.router])
        budget = self.way.connections.budget
        if budget.reserve(1):  # bytes are leased from now on
            budget.release(1)
        await self._site.until(lambda: self.door._table.generation == self._site.tensors.generation)

    def _opened(self) -> None:
        self.way.connections.parting = False
        self.door.tell_listening()

    def close(self) -> None:
        self.listener._part()
        self.door.stop()
        self.gate.close()
        self._meeting.sock.close()


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
    await made.open()
    try:
        yield made
    finally:
        if gate is not None:
            gate.open()
        made.close()
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
