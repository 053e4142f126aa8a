"""``GET /openapi.json``: the listener's OpenAPI document, with the models that are served now.

The description that TorchServe's clients ask for (``OPTIONS /``) is of the API alone, and stays as it is.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyserve.api import openapi
from pyserve.api.checks import protected
from pyserve.api.docs_page import docs_routes
from pyserve.api.openapi_models import model_paths
from pyserve.api.openapi_schemas import TEXT
from pyserve.api.parameters import Parameter, read_values
from pyserve.api.routes import RouteRow
from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.security.browser_guard import BrowserGuard
from pyserve.security.cors import allowed_origins
from pyserve.security.tokens import Scope, Tokens

if TYPE_CHECKING:
    from pyserve.models.model import Model
    from pyserve.models.registry import Registry

PATTERN = "/openapi.json"
MODELS_MAX = 100
# For running models once that never told their outputs.
ASKING_S = 2.0
_PARAMETERS = (Parameter("model", str, "any text", "The one model to describe; the first hundred by default.", TEXT),)


class LiveDocument:
    """The endpoint of one listener. Loop thread only.

    Args:
        describe: makes the document of the API.
        registry: None for a listener that tells nothing of models.
    """

    def __init__(self, describe: Callable[[], JsonObject], registry: Registry | None):
        self._describe = describe
        self._registry = registry
        self._kept: tuple[object, bytes] = (None, b"")

    def route(self) -> RouteRow:
        return ("GET", PATTERN, self.show)

    async def show(self, exchange: Exchange) -> Response:
        """The document; its ``info`` says how many models of how many it has."""
        named = read_values(exchange.request.params, _PARAMETERS).get("model")
        models: list[Model] = []
        count = 0
        if self._registry is not None:
            models = [self._registry.get(named)] if named else self._registry.default_models()
            count = len(models)
            models = models[:MODELS_MAX]
        key = named, count, [_key(model) for model in models]
        if self._kept[0] != key:
            self._kept = key, json.dumps(await self._document(models, count, named), separators=(",", ":")).encode()
        return _answer(self._kept[1])

    async def _document(self, models: list[Model], count: int, named: str | None) -> JsonObject:
        document = self._describe()
        own: JsonObject = {}
        until = time.monotonic() + ASKING_S
        for model in models:
            own |= await model_paths(model, document["paths"], asks=time.monotonic() < until and model.has_ready_worker)
        document["info"] = {**document["info"], "description": _about(len(models), count, named)}
        document["tags"] = [{"name": model.name} for model in models]
        document["paths"] = {**own, **document["paths"]}
        for item in document["paths"].values() if models else ():
            for operation in item.values():
                _name_one(operation["parameters"], models[0].name)
        return document


def _name_one(parameters: list[JsonObject], name: str) -> None:
    """Gives the path's parameter for a model an example that there is."""
    for index, parameter in enumerate(parameters):
        if parameter["in"] == "path" and parameter["name"] == "model_name":
            parameters[index] = {**parameter, "example": name}


def _key(model: Model) -> object:
    """What its part of the document depends on. The address of one that is gone may be that of the next."""
    return (
        weakref.ref(model),
        model.state,
        model.has_ready_worker,
        model.network is None or model.network.outputs is None,
    )


def _answer(body: bytes) -> Response:
    return Response(200, body, content_type="application/json", headers={"Cache-Control": "no-cache"})


def _about(described: int, count: int, named: str | None) -> str:
    if named or count == described:
        return "This server's API, with the models that it serves." if count else "This server's API."
    return f"This server's API, with {described} of its {count} models; {PATTERN}?model=NAME describes any of them."


def document_rows(
    names: Sequence[str], documents: Sequence[Callable[[], JsonObject]], config: Config, tokens: Tokens | None,
    registry: Registry,
) -> list[RouteRow]:  # fmt: skip
    """``/openapi.json`` and ``/docs`` of the listener of ``names``, with the checks of the API that they describe.

    Where one listener answers for several that is inference, whose callers may list the models.
    """
    if config.compat == "strict":  # TorchServe has neither
        return []
    has_models = tuple(names) != ("metrics",)
    live = LiveDocument(lambda: openapi.joined(make() for make in documents), registry if has_models else None)
    pages = docs_routes() if config.has_console else []
    scope: Scope = "inference" if "inference" in names else "management"
    guards = [] if "inference" in names else [BrowserGuard(config.addresses()[names[0]], allowed_origins(config))]
    return protected([live.route(), *pages], tokens if has_models else None, scope, *guards)
