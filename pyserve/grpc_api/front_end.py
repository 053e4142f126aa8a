"""gRPC's part in a server process: whether there is any, and which services each port has."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pyserve.api.inference import Inference
from pyserve.api.management import Management
from pyserve.api.model_repository import ModelRepository
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.lanes.resources import Services
from pyserve.models.registry import Registry
from pyserve.request.body_budget import BodyBudget
from pyserve.telemetry.request_log import AnswerLog

if TYPE_CHECKING:
    from pyserve.grpc_api.server import GrpcServer, Listener
    from pyserve.grpc_api.service import Dispatcher, Service

log = logging.getLogger(__name__)

# gRPC prints what it also raises, and would look after forks, which here exec at once. Not for worker processes.
_VARIABLES = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}

FIX = "pip install grpcio grpcio-health-checking grpcio-reflection"
# For what is no request: reflection, say.
STOP_GRACE_S = 0.2


class GrpcFrontEnd:
    """The gRPC side of one server process. Loop thread only.

    Args:
        restart: how many servers there were before this one; only the first may fail for want of a port.
        is_successor: another server has the ports, and this one is to share them until it goes. It may fail, too.
    """

    def __init__(self, config: Config, restart: int, *, is_successor: bool = False):
        self._config = config
        self._restart = restart
        self._is_successor = is_successor
        self._server: GrpcServer | None = None
        self._dispatcher: Dispatcher | None = None

    async def bind(self) -> None:
        """Takes the ports. Nothing of gRPC is imported if it is switched off.

        Raises:
            ConfigError: ``enable_grpc=true`` and it cannot be had.
        """
        config = self._config
        if config.enable_grpc == "false":
            return
        with _environment():
            await self._bind(must=config.enable_grpc == "true")

    async def _bind(self, *, must: bool) -> None:
        config = self._config
        missing = await asyncio.to_thread(_import)
        if missing and must:
            raise ConfigError(f"enable_grpc=true ({config.origin.get('enable_grpc')}): {missing}; {FIX}")
        if missing:
            log.info("gRPC is off: %s (%s)", missing, FIX)
            return
        from pyserve.grpc_api.server import GrpcServer

        self._server = GrpcServer(
            config, must_bind=must and (self._is_successor or not self._restart), shares_ports=self._is_successor
        )

    @property
    def addresses(self) -> dict[str, str]:
        """``grpc_inference`` and ``grpc_management`` to ``host:port``; of those that there are."""
        return self._server.addresses if self._server is not None else {}

    @property
    def notes(self) -> list[tuple[str, str]]:
        """What the user should know: (kind, one line)."""
        return [("warning", text) for text in self._server.warnings] if self._server is not None else []

    async def open(
        self, services: Services, registry: Registry, inference: Inference, budget: BodyBudget, access: AnswerLog, *,
        repository: ModelRepository,
    ) -> None:  # fmt: skip
        """Begins to answer; each call is reported to ``access``."""
        if self._server is None:
            return
        from pyserve.grpc_api.service import Dispatcher

        self._dispatcher = Dispatcher(services, budget, access)
        for listener in self._server.listeners:
            served = self._services(listener, services, registry, inference, self._dispatcher, repository=repository)
            await self._server.start(listener, served, self._dispatcher)

    def _services(
        self, listener: Listener, services: Services, registry: Registry, inference: Inference, dispatcher: Dispatcher,
        *, repository: ModelRepository,
    ) -> list[Service]:  # fmt: skip
        from pyserve.grpc_api.inference import InferenceService
        from pyserve.grpc_api.management import ManagementService
        from pyserve.grpc_api.messages import OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE
        from pyserve.grpc_api.open_inference import OpenInferenceService

        config = self._config
        has_inference = "inference" in listener.names
        common = (registry, inference, config, services.error_format, dispatcher.streams)
        open_inference = OpenInferenceService(
            *common, metrics=services.metrics, repository=repository,
            management_address=self.addresses.get("grpc_management", str(config.management_address)),
        )  # fmt: skip
        has_control = "management" in listener.names or config.model_control_on_inference
        served = [
            open_inference.service(each, has_inference=has_inference, has_control=has_control)
            for each in (OPEN_INFERENCE, OPEN_INFERENCE_TORCHSERVE)
        ]
        if has_inference:
            served.append(InferenceService(*common).service())
        if "management" in listener.names:
            # What it allows depends on who can reach it, which is not who can reach HTTP's.
            address = Address(config.grpc_management_address, listener.port)
            local = config.management_address if address.is_loopback else address
            management = Management(
                registry, replace(config, management_address=local),
                tells_errors=services.error_format.with_private_detail,
            )  # fmt: skip
            served.append(ManagementService(management, is_strict=config.compat == "strict").service())
        try:
            from pyserve.grpc_api.health import HealthService
        except ImportError as error:  # not there, or made for another protobuf
            log.warning("gRPC health checks are off: %s (%s)", error, FIX)
        else:
            names = [each.name for each in served]
            served.append(HealthService(registry, inference, names, dispatcher.streams).service())
        return served

    async def drain(self) -> None:
        """Closes the ports, after the answers to what was taken."""
        if self._server is not None and self._dispatcher is not None:
            stopping = asyncio.ensure_future(self._server.stop(None))
            await self._dispatcher.drain()
            await self.close()
            await stopping

    async def close(self) -> None:
        """Closes the ports."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(STOP_GRACE_S)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Sets what gRPC reads when it begins, unless it is set already."""
    mine = {name: value for name, value in _VARIABLES.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def _import() -> str:
    """Why gRPC cannot be used; ``""`` if it can. Any thread."""
    for module in ("grpc", "google.protobuf"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
    try:
        importlib.import_module("pyserve.grpc_api.server")
    except (ImportError, AttributeError) as error:
        return f"the grpcio or protobuf that is installed cannot be used ({error})"
    return ""
