"""What Triton's clients ask beyond the Open Inference Protocol: configurations, and the models that there are.

Loading and unloading belong to the management API: they are on its port, with its key and its checks, and on the
inference port only where ``model_control_on_inference`` says so. The rest is refused by name. No shared memory is ever
registered here: what asks which is, or to forget it, is answered as by a Triton without any.
"""

from __future__ import annotations

from typing import Any

from pyserve.api.model_configuration import model_configuration
from pyserve.api.model_repository import ModelRepository, parameters_of
from pyserve.api.routes import RouteRow
from pyserve.config.config import Config
from pyserve.errors import BadRequestError
from pyserve.models.registry import Registry
from pyserve.request.exchange import Exchange
from pyserve.request.json_body import parse_json
from pyserve.request.messages import Request, Response, json_response

SHARED_MEMORY = {"systemsharedmemory": "system_shared_memory", "cudasharedmemory": "cuda_shared_memory"}
_INDEX = "/v2/repository/index"
_LOAD = "/v2/repository/models/{model_name}/load"
_UNLOAD = "/v2/repository/models/{model_name}/unload"
_ASKED_SIZE_MAX = 64 << 10


class NotHereError(BadRequestError):
    """An extension that this server does not have, or not on this port."""

    def __init__(self, extension: str, instead: str, *, where: str = ""):
        super().__init__(
            f"This server does not have the extension {extension!r}{where}; {instead}.", detail={"extension": extension}
        )


def model_control_elsewhere(address: str) -> NotHereError:
    """For a call on the inference port that loads or unloads.

    Args:
        address: of management; ``""`` for an application, which has none.
    """
    place = f"on the management port, {address}" if address else "by pyserve.asgi.management(engine)"
    return NotHereError(
        "model_repository",
        f"load and unload models {place}, or set model_control_on_inference=true in config.properties",
        where=" on the inference port",
    )


class TritonExtensions:
    """Endpoints of the inference port, and those of the management port. Loop thread only.

    Args:
        has_ports: else they are those of applications.
    """

    def __init__(self, registry: Registry, repository: ModelRepository, config: Config, *, has_ports: bool = True):
        self._registry = registry
        self._repository = repository
        self._management_address = str(config.management_address) if has_ports else ""

    def reading_routes(self) -> list[RouteRow]:
        """What either listener answers."""
        return [
            ("GET", "/v2/models/{model_name}/config", self.show_configuration),
            ("GET", "/v2/models/{model_name}/versions/{model_version}/config", self.show_configuration),
        ]

    def index_route(self, *, shows_store: bool) -> RouteRow:
        """The index; with those in the model store that are not loaded, for who may load them."""
        return ("POST", _INDEX, self.show_index if shows_store else self.show_registered)

    def control_routes(self) -> list[RouteRow]:
        """Loading and unloading, for callers that may."""
        return [("POST", _LOAD, self.load), ("POST", _UNLOAD, self.unload)]

    def refused_routes(self, *, has_control: bool) -> list[RouteRow]:
        """What the inference listener refuses by name."""
        rows: list[RouteRow] = []
        if not has_control:
            rows += [("POST", _LOAD, self.refuse_control), ("POST", _UNLOAD, self.refuse_control)]
        for kind in SHARED_MEMORY:
            rows += [
                ("GET", f"/v2/{kind}/status", self.show_no_regions),
                ("GET", f"/v2/{kind}/region/{{region}}/status", self.refuse_region),
                ("POST", f"/v2/{kind}/region/{{region}}/register", self.refuse_region),
                ("POST", f"/v2/{kind}/region/{{region}}/unregister", self.forget_regions),
                ("POST", f"/v2/{kind}/unregister", self.forget_regions),
            ]
        for path in ("/v2/trace/setting", "/v2/models/{model_name}/trace/setting", "/v2/logging"):
            rows.append(("GET POST", path, self.refuse_settings))
        return rows

    # --- models ---------------------------------------------------------------------------------------------------

    def show_registered(self, exchange: Exchange) -> Response:
        """All models with their states; with ``{"ready": true}`` only those that can answer."""
        return json_response(self._repository.registered(only_ready=_asks_for_ready(exchange.request)))

    async def show_index(self, exchange: Exchange) -> Response:
        """The same, and what of the model store is not loaded."""
        request = exchange.request
        only_ready = _asks_for_ready(request)
        return json_response(
            await self._repository.index(only_ready=only_ready, authorization=request.header("authorization"))
        )

    async def load(self, exchange: Exchange, model_name: str) -> Response:
        """Returns when the model can answer."""
        await self._repository.load(model_name, parameters_of(_told(exchange.request), "load"))
        return Response(200)

    async def unload(self, exchange: Exchange, model_name: str) -> Response:
        """Returns when it has finished its requests and is gone."""
        await self._repository.unload(model_name, parameters_of(_told(exchange.request), "unload"))
        return Response(200)

    def refuse_control(self, exchange: Exchange, model_name: str) -> Response:
        """A port that is open to those who ask for predictions must not let them take models away."""
        raise model_control_elsewhere(self._management_address)

    async def show_configuration(
        self, exchange: Exchange, model_name: str, model_version: str | None = None
    ) -> Response:
        """What Triton's ``config.pbtxt`` would say of the model."""
        return json_response(await model_configuration(self._registry.get(model_name, model_version)))

    # --- what is not here -----------------------------------------------------------------------------------------

    def refuse_settings(self, exchange: Exchange, model_name: str = "") -> Response:
        """Neither are they to be had nor set."""
        extension = "logging" if exchange.request.path.startswith("/v2/logging") else "trace"
        raise NotHereError(extension, "what is logged and traced is set in config.properties and the environment")

    def show_no_regions(self, exchange: Exchange) -> Response:
        """Those that are registered: none."""
        return json_response([])

    def forget_regions(self, exchange: Exchange, region: str = "") -> Response:
        """There are none to forget; clients ask for it before they register theirs."""
        return Response(200)

    def refuse_region(self, exchange: Exchange, region: str) -> Response:
        """None is registered, nor will be."""
        kind = exchange.request.segments[1]
        raise NotHereError(SHARED_MEMORY[kind], "send tensors in the body, as binary data")


def _told(request: Request) -> Any:
    """The JSON of a call's body; an empty object if there is none.

    Raises:
        BadRequestError: it is no JSON, or more than these calls ever have.
    """
    if not request.body.strip():
        return {}
    if len(request.body) > _ASKED_SIZE_MAX:  # it is read on the loop
        raise BadRequestError(
            f"The body of this call has {len(request.body)} bytes, more than {_ASKED_SIZE_MAX}: files and "
            "configurations cannot be sent with it. Put the archive into the model store, and load it by its name."
        )
    return parse_json(request.body)


def _asks_for_ready(request: Request) -> bool:
    asked = _told(request)
    ready = asked.get("ready", False) if isinstance(asked, dict) else None
    if not isinstance(ready, bool):
        raise BadRequestError('the body of this call is empty or {"ready": true}')
    return ready
