"""What Triton's clients ask beyond the Open Inference Protocol: the index of models; the rest is refused by name.

No shared memory is ever registered here: what asks which is, or to forget it, is answered as by a Triton without any.
"""

from __future__ import annotations

from pyserve.api.routes import RouteRow
from pyserve.errors import BadRequestError, JsonObject
from pyserve.models.registry import Registry
from pyserve.request.exchange import Exchange
from pyserve.request.json_body import parse_json
from pyserve.request.messages import Request, Response, json_response

SHARED_MEMORY = {"systemsharedmemory": "system_shared_memory", "cudasharedmemory": "cuda_shared_memory"}


class NotHereError(BadRequestError):
    """An extension that this server does not have."""

    def __init__(self, extension: str, instead: str):
        super().__init__(
            f"This server does not have the extension {extension!r}; {instead}.", detail={"extension": extension}
        )


def repository_index(registry: Registry, *, only_ready: bool, tells_errors: bool) -> list[JsonObject]:
    """Name, version, state and reason of all models, or of those that can answer.

    Args:
        tells_errors: whether ``reason`` may quote exceptions.
    """
    states = {"LOADING": "LOADING", "DRAINING": "UNLOADING"}
    return [
        {
            "name": model.name,
            "version": model.version,
            "state": "READY" if model.has_ready_worker else states.get(model.state, "UNAVAILABLE"),
            "reason": model.error if tells_errors else "",
        }
        for model in registry.all_models()
        if model.has_ready_worker or not only_ready
    ]


class TritonExtensions:
    """Endpoints of the inference port. Loop thread only.

    Args:
        tells_errors: whether the index may say why a model failed, in the words of an exception.
    """

    def __init__(self, registry: Registry, *, tells_errors: bool):
        self._registry = registry
        self._tells_errors = tells_errors

    def routes(self) -> list[RouteRow]:
        """What the inference listener answers of these."""
        rows: list[RouteRow] = [
            ("POST", "/v2/repository/index", self.show_index),
            ("POST", "/v2/repository/models/{model_name}/load", self.refuse_repository),
            ("POST", "/v2/repository/models/{model_name}/unload", self.refuse_repository),
            ("GET", "/v2/models/{model_name}/config", self.refuse_configuration),
            ("GET", "/v2/models/{model_name}/versions/{model_version}/config", self.refuse_configuration),
        ]
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

    def show_index(self, exchange: Exchange) -> Response:
        """All models with their states; with ``{"ready": true}`` only those that can answer."""
        only_ready = _asks_for_ready(exchange.request)
        return json_response(repository_index(self._registry, only_ready=only_ready, tells_errors=self._tells_errors))

    def refuse_repository(self, exchange: Exchange, model_name: str) -> Response:
        """TorchServe's management API is the one way to load models."""
        raise NotHereError("model_repository", "register and unregister models over the management API, /models")

    def refuse_configuration(self, exchange: Exchange, model_name: str, model_version: str = "") -> Response:
        """There is no config.pbtxt to show."""
        self._registry.get(model_name, model_version or None)
        raise NotHereError("model_configuration", "GET /v2/models/{name} names inputs and outputs")

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


_ASKED_SIZE_MAX = 64 << 10


def _asks_for_ready(request: Request) -> bool:
    if not request.body.strip():
        return False
    if len(request.body) > _ASKED_SIZE_MAX:  # it is read on the loop
        raise BadRequestError('the body of this call is empty or {"ready": true}')
    asked = parse_json(request.body)
    ready = asked.get("ready", False) if isinstance(asked, dict) else None
    if not isinstance(ready, bool):
        raise BadRequestError('the body of this call is empty or {"ready": true}')
    return ready
