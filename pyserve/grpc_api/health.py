"""grpc.health.v1: of the server, and of each model under its name (``densenet161``, ``densenet161/1.0``)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any

from grpc_health.v1 import health_pb2

from pyserve.api.inference import Inference
from pyserve.errors import ModelNotFoundError, ServeError, VersionNotFoundError
from pyserve.grpc_api.call import Call
from pyserve.grpc_api.service import Method, Service
from pyserve.grpc_api.status import Code, Verdict, code_of
from pyserve.models.registry import Registry

NAME = "grpc.health.v1.Health"
# How often a watched status is looked at.
WATCH_INTERVAL_S = 0.5

_Status = health_pb2.HealthCheckResponse


class HealthService:
    """Computes each answer when it is asked for, so that it cannot be out of date. Loop thread only.

    Args:
        names: of the services that the listener has; each is as healthy as the server.
    """

    def __init__(self, registry: Registry, inference: Inference, names: Collection[str]):
        self._registry = registry
        self._inference = inference
        self._names = {"", NAME, *names}

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
        while True:
            status = self._status(asked.service)
            if status != last:
                last = status
                yield _Status(status=status)
            if not self._inference.is_ready:
                return
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _status(self, name: str) -> int:
        if name in self._names:
            return int(_Status.SERVING if self._inference.is_healthy else _Status.NOT_SERVING)
        model, _, version = name.partition("/")
        try:
            ready = self._registry.get(model, version or None).has_ready_worker and self._inference.is_ready
        except (ModelNotFoundError, VersionNotFoundError):
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if ready else _Status.NOT_SERVING)


def judge_health(error: ServeError) -> Verdict:
    """As the protocol wants it."""
    return Verdict(Code.NOT_FOUND if isinstance(error, ModelNotFoundError) else code_of(error.status))
