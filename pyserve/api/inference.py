"""The inference API: predictions and health."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from pyserve.api import event_streams
from pyserve.api.coded_bodies import CodedBodies
from pyserve.api.routes import ANY, RouteRow
from pyserve.errors import BadRequestError
from pyserve.lanes.kept_output import model_that_ran
from pyserve.models.model import EXPLAIN_HEADER
from pyserve.models.registry import Registry
from pyserve.request import codec
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ExtraHeaders, Request, Response, json_response

# A body whose compression is being undone.
Undoing = Coroutine[Any, Any, None]
Run = Callable[..., Undoing | None]

PREDICT_HEADER = ("explain", "False")
# By name, for paths that others of the same form stand beside: a listed method wins over ANY.
METHODS = "GET POST PUT PATCH DELETE"


class Inference:
    """Endpoints of the inference port. Loop thread only.

    Args:
        tells_errors: whether ``/ready`` may say why a model failed to load, in the words of an exception.
        lenient: ``compat=strict``: how forms are read, see `codec.decode_request`, and what `is_healthy` counts.

    Attributes:
        bodies: undoes the compression of bodies.
        is_ready: whether the server takes requests: not while it starts or drains.
        generation: number of what a cluster serves, if this is a part of one; ``/ready`` tells it.
    """

    def __init__(self, registry: Registry, bodies: CodedBodies, *, tells_errors: bool = True, lenient: bool = False):
        self.bodies = bodies
        self._run_with_query = self._endpoint(query_is_input=True)
        self._registry = registry
        self._tells_errors = tells_errors
        self._lenient = lenient
        self.is_ready = False
        self.generation: int | None = None

    def routes(self) -> list[RouteRow]:
        """What the inference listener answers."""
        rows: list[RouteRow] = [
            (ANY, "/ping", self.ping),
            (ANY, "/ping/{rest...}", self.ping),
            ("GET", "/ready", self.ready),
            ("GET", "/live", self.live),
        ]
        for name, header in (("predictions", PREDICT_HEADER), ("explanations", EXPLAIN_HEADER)):
            run = self._endpoint(header, ("url_path", ""))
            rows += [
                (ANY, f"/{name}/{{model_name}}", run),
                (ANY, f"/{name}/{{model_name}}/{{model_version}}", run),
                (ANY, f"/{name}/{{model_name}}/{{model_version}}/{{rest...}}", self._endpoint_with_path(header)),
            ]
        return [
            *rows,
            # SageMaker's, and TorchServe's oldest: here the query's parameters are inputs.
            # On a port that is shared this is no version "invoke" of management's, as in TorchServe.
            (METHODS, "/models/{model_name}/invoke", self._run_with_query),
            (ANY, "/invocations", self.invoke),
            (ANY, "/{model_name}/predict", self._run_with_query),
            (ANY, "/{model_name}/{model_version}/predict", self._run_with_query),
        ]

    def _endpoint(self, *headers: tuple[str, str], query_is_input: bool = False) -> Run:
        """Runs a model on the body, and answers later, without a task; ``headers`` are added for its handler."""

        extra = ExtraHeaders(*headers)
        explains = EXPLAIN_HEADER in headers

        def run(exchange: Exchange, model_name: str, model_version: str | None = None) -> Undoing | None:
            exchange.request.add_headers(extra)
            model = model_that_ran(exchange) or self._registry.get(model_name, model_version)
            version = model_version or "default"
            if self.bodies.are_undone(exchange.request, model):
                options = {"explains": explains, "query_is_input": query_is_input}
                return self.bodies.undo(exchange, partial(event_streams.predict, model, exchange, version, **options))
            event_streams.predict(model, exchange, version, explains=explains, query_is_input=query_is_input)
            return None

        return run

    def _endpoint_with_path(self, header: tuple[str, str]) -> Run:
        def run(exchange: Exchange, model_name: str, model_version: str, rest: str) -> Undoing | None:
            return self._endpoint(header, ("url_path", rest))(exchange, model_name, model_version)

        return run

    def invoke(self, exchange: Exchange) -> Undoing | None:
        """SageMaker's one path: the model is a parameter, or the only one there is."""
        return self._run_with_query(exchange, self._invoked_name(exchange.request))

    def _invoked_name(self, request: Request) -> str:
        for key, value in request.params:
            if key == "model_name":
                return value
        loaded = [model.name for model in self._registry.default_models() if model.loaded_at_startup]
        if len(loaded) == 1:
            return loaded[0]
        if request.content_type in codec.FORM_TYPES:
            field = codec.decode_request(request, lenient=self._lenient).get("model_name")
            named = field.decode("utf-8", "replace") if isinstance(field, bytearray) else field
            if named:
                return str(named)
        raise BadRequestError("Parameter model_name is required.")

    def ping(self, exchange: Exchange, rest: str = "") -> Response:
        """200 Healthy, or 500 Unhealthy when a model that should have workers has none that is ready."""
        healthy = self.is_healthy
        return json_response({"status": "Healthy" if healthy else "Unhealthy"}, 200 if healthy else 500)

    @property
    def is_healthy(self) -> bool:
        """Whether the server takes requests, and every model that should have workers has one.

        Under ``compat=strict`` archives that could not be opened at the start do not count, as in TorchServe.
        """
        reasons = self._not_ready()
        if self._lenient:
            served = {model.name for model in self._registry.default_models()}
            reasons = {name: reason for name, reason in reasons.items() if name in served}
        return self.is_ready and not reasons

    def ready(self, exchange: Exchange) -> Response:
        """200 when every model can answer; else 503 with the reason for each that cannot."""
        reasons = self._not_ready()
        if not self.is_ready:
            return json_response({"status": "NotReady", "reason": "the server is starting or stopping"}, 503)
        if reasons:
            return json_response({"status": "NotReady", "models": reasons}, 503)
        numbered = {} if self.generation is None else {"generation": self.generation}
        return json_response({"status": "Ready", **numbered})

    def live(self, exchange: Exchange) -> Response:
        """200 as long as the event loop turns."""
        return json_response({"status": "Live"})

    def _not_ready(self) -> dict[str, dict[str, str]]:
        reasons = {}
        for model in self._registry.default_models():
            # A model that somebody adds, or gives its first workers, must not take the others out of rotation.
            is_coming = model.state == "LOADING" or model.starts_first_workers
            is_short = model.wanted_workers > 0 and not model.has_ready_worker and not is_coming
            if model.state == "FAILED" or is_short:
                reasons[model.name] = self._reason(model.state, model.error)
        for failure in self._registry.failures:
            reasons[failure.name] = self._reason("FAILED", failure.error)
        return reasons

    def _reason(self, state: str, error: str) -> dict[str, str]:
        return {"state": state, **({"error": error} if error and self._tells_errors else {})}
