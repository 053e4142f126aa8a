"""grpc.health.v1: of the server, and of each model under its name (``densenet161``, ``densenet161/1.0``)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any

from grpc_health.v1 import health_pb2

from pyserve.api.inference import Inference
from pyserve.errors import ModelNotFoundError, ServeError, VersionNotFoundError
from pyserve.grpc_api.call import Call
from pyserve.grpc_api.service import Method, Service
from pyserve.grpc_api.status import Code, Verdict, code_of
from pyserve.grpc_api.streams import Streams
from pyserve.models.registry import Registry

NAME = "grpc.health.v1.Health"
# How often a watched status is looked at; half of the time within which health is to be true.
WATCH_INTERVAL_S = 0.05

_Status = health_pb2.HealthCheckResponse


class HealthService:
    """Computes each answer when it is asked for, so that it cannot be out of date. Loop thread only.

    Args:
        names: of the services that the listener has; each is as healthy as the server.
        streams: when they are drained, nothing can be watched any more.
    """

    def __init__(self, registry: Registry, inference: Inference, names: Collection[str], streams: Streams):
        self._registry = registry
        self._inference = inference
        self._names = {"", NAME, *names}
        self._streams = streams
        self._lookout = _Lookout(self._seen)

    def service(self) -> Service:
        """Its table."""
        request = health_pb2.HealthCheckRequest
        methods = (Method("Check", self.check, request), Method("Watch", self.watch, request, tells_many=True))
        return Service(NAME, methods, judge_health)

    async def check(self, call: Call, asked: Any) -> Any:
        """NOT_FOUND for what is neither a service nor a model."""
        status = self._status(asked.service)
        if status == _Status.SERVICE_UNKNOWN:
            raise ModelNotFoundError(f"{asked.service[:200]!r} is neither a service nor a model.")
        return _Status(status=status)

    async def watch(self, call: Call, asked: Any) -> AsyncIterator[Any]:
        """The status now, and each that follows, until the server goes."""
        last = None
        with self._lookout.watching(asked.service) as changed:
            while True:
                changed.clear()
                status = self._status(asked.service)
                if status != last:
                    last = status
                    yield _Status(status=status)
                if self._streams.is_draining:
                    return
                await changed.wait()

    def _seen(self, name: str) -> object:
        return self._status(name), self._streams.is_draining

    def _status(self, name: str) -> int:
        if name in self._names:
            return int(_Status.SERVING if self._inference.is_healthy else _Status.NOT_SERVING)
        model, _, version = name.partition("/")
        try:
            ready = self._registry.get(model, version or None).has_ready_worker and self._inference.is_ready
        except (ModelNotFoundError, VersionNotFoundError):
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if ready else _Status.NOT_SERVING)


class _Lookout:
    """Looks at all that is watched with one timer, while there is any; so a thousand clients that watch cost as little
    as one.

    Args:
        see: what a name has now, to be compared.
    """

    def __init__(self, see: Callable[[str], object]):
        self._see = see
        self._watched: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, object] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(self, name: str) -> Iterator[asyncio.Event]:
        """An event that is set when ``name`` has changed."""
        changed = asyncio.Event()
        if name not in self._watched:
            self._watched[name], self._seen[name] = set(), self._see(name)
        self._watched[name].add(changed)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WATCH_INTERVAL_S, self._look)
        try:
            yield changed
        finally:
            self._watched[name].discard(changed)
            if not self._watched[name]:
                del self._watched[name], self._seen[name]

    def _look(self) -> None:
        self._timer = None
        for name, watching in self._watched.items():
            seen = self._see(name)
            if seen != self._seen[name]:
                self._seen[name] = seen
                for changed in watching:
                    changed.set()
        if self._watched:
            self._timer = asyncio.get_running_loop().call_later(WATCH_INTERVAL_S, self._look)


def judge_health(error: ServeError) -> Verdict:
    """As the protocol wants it."""
    return Verdict(Code.NOT_FOUND if isinstance(error, ModelNotFoundError) else code_of(error.status))
