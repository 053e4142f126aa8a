"""KServe's protocols over HTTP, versions 1 and 2: their paths, and what stands at each."""

from __future__ import annotations

from pyserve.api import event_streams
from pyserve.api import open_inference_models as models
from pyserve.api.generate import Generate
from pyserve.api.inference import METHODS, PREDICT_HEADER, Inference, Run, Undoing
from pyserve.api.kserve_v1 import InstancesPending, is_instances_request
from pyserve.api.open_inference_rest import JSON_SIZE_HEADER, RestTransport, has_no_json, is_infer_request
from pyserve.api.routes import ANY, RouteRow
from pyserve.lanes.audit import Repetition
from pyserve.lanes.kept_output import model_that_ran
from pyserve.models.model import EXPLAIN_HEADER, Model
from pyserve.models.registry import Registry
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, ExtraHeaders, Response, json_response
from pyserve.telemetry.metrics import Metrics

_MODELS = ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}")


class KServe:
    """Endpoints of the inference port. Loop thread only.

    Args:
        inference: tells whether the server takes requests and which models cannot.
        response_size_max: bytes of an answer.
        is_strict: whether ``GET /`` is refused, as by TorchServe.
    """

    def __init__(
        self, registry: Registry, inference: Inference, metrics: Metrics, response_size_max: int, *, is_strict: bool,
        error_format: ErrorFormat | None = None,
    ):  # fmt: skip
        self._generate = Generate(registry, inference.bodies, error_format or ErrorFormat(), response_size_max)
        self._is_strict = is_strict
        self._registry = registry
        self._inference = inference
        self._bodies = inference.bodies
        self._metrics = metrics
        self._response_size_max = response_size_max

    def routes(self) -> list[RouteRow]:
        """What the inference listener answers of these protocols."""
        rows: list[RouteRow] = [
            ("GET", "/v1/models", self.list_models),
            (METHODS, "/v1/models/{model_name}:predict", self._v1(explains=False)),
            (METHODS, "/v1/models/{model_name}:explain", self._v1(explains=True)),
            ("GET", "/v1/models/{model_name}", self.show_readiness),
            *self.reading_routes(),
        ]
        if not self._is_strict:
            rows.append(("GET", "/", self.show_alive))
        infer, explain = self._v2(explains=False), self._v2(explains=True)
        for model in _MODELS:
            rows += [
                (ANY, f"{model}/infer", infer),
                (ANY, f"{model}/explain", explain),
                ("POST", f"{model}/generate", self._generate.endpoint(streams=False)),
                ("POST", f"{model}/generate_stream", self._generate.endpoint(streams=True)),
            ]
        return rows

    def reading_routes(self) -> list[RouteRow]:
        """What of version 2 runs no model; Triton's clients ask the management listener, too."""
        rows: list[RouteRow] = [
            ("GET", "/v2", self.show_server),
            ("GET", "/v2/health/live", self.show_live),
            ("GET", "/v2/health/ready", self.show_ready),
            ("GET", "/v2/models/stats", self.show_statistics),
        ]
        for model in _MODELS:
            rows += [
                ("GET", model, self.show_model),
                ("GET", f"{model}/ready", self.show_model_ready),
                ("GET", f"{model}/stats", self.show_statistics),
            ]
        return rows

    # --- running models -------------------------------------------------------------------------------------------

    def _v1(self, *, explains: bool) -> Run:
        extra = ExtraHeaders(EXPLAIN_HEADER if explains else PREDICT_HEADER)

        def run(exchange: Exchange, model_name: str) -> Undoing | None:
            model = model_that_ran(exchange) or self._registry.get(model_name)
            if self._bodies.are_undone(exchange.request, model):
                return self._bodies.undo(exchange, lambda: take(exchange, model))
            take(exchange, model)
            return None

        def take(exchange: Exchange, model: Model) -> None:
            if model.built_in_handler is None or not is_instances_request(exchange.request):
                exchange.request.add_headers(extra)
                event_streams.predict(model, exchange, explains=explains)
                return
            model.take(
                exchange,
                lambda lane: InstancesPending(lane, exchange, model.version, explains=explains),
                explains=explains,
                repetition=Repetition(lambda lane, copy: InstancesPending(lane, copy, model.version, explains=False)),
            )

        return run

    def _v2(self, *, explains: bool) -> Run:
        extra = ExtraHeaders(EXPLAIN_HEADER if explains else PREDICT_HEADER)

        def run(exchange: Exchange, model_name: str, model_version: str | None = None) -> Undoing | None:
            model = model_that_ran(exchange) or self._registry.get(model_name, model_version)
            has_tensors = bool(exchange.request.header(JSON_SIZE_HEADER)) and not has_no_json(exchange.request)
            if self._bodies.are_undone(exchange.request, model, has_tensors=has_tensors):
                return self._bodies.undo(exchange, lambda: take(exchange, model, model_version or "default"))
            take(exchange, model, model_version or "default")
            return None

        def take(exchange: Exchange, model: Model, url_version: str) -> None:
            request = exchange.request
            is_raw = has_no_json(request)
            if model.built_in_handler is not None:
                is_meant = is_infer_request(request)
            else:
                is_meant = bool(request.header(JSON_SIZE_HEADER)) and not is_raw
            if is_meant:
                raw_input = models.raw_input(model) if is_raw else None
                transport = RestTransport(request, self._response_size_max, raw_input)
                models.infer(model, exchange, transport, url_version, explains=explains)
            else:
                # As in TorchServe: what the body means is up to the model's envelope or handler.
                request.add_headers(extra)
                event_streams.predict(model, exchange, url_version, explains=explains)

        return run

    # --- what there is --------------------------------------------------------------------------------------------

    def show_alive(self, exchange: Exchange) -> Response:
        """What KServe's clients ask in version 1 to see whether the server runs."""
        return json_response({"status": "alive"})

    def list_models(self, exchange: Exchange) -> Response:
        """Their names."""
        return json_response({"models": [model.name for model in self._registry.default_models()]})

    def show_readiness(self, exchange: Exchange, model_name: str) -> Response:
        """``{"name": ..., "ready": true}``, as the management port answers."""
        model = self._registry.get(model_name)
        is_ready = any(row.status == "READY" for row in model.worker_rows())
        return json_response({"name": model.name, "ready": is_ready})

    def show_server(self, exchange: Exchange) -> Response:
        """Name, version and extensions."""
        return json_response(models.server_metadata())

    def show_live(self, exchange: Exchange) -> Response:
        """200 as long as the event loop turns."""
        return json_response({"live": True})

    def show_ready(self, exchange: Exchange) -> Response:
        """200 when every model can answer; else 503, with the reasons as ``/ready`` gives them."""
        told = self._inference.ready(exchange)
        return json_response({"ready": True}) if told.status == 200 else told

    async def show_model(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """Name, versions, platform, inputs and outputs."""
        model = self._registry.get(model_name, model_version)
        versions = [each.version for each in self._registry.versions(model_name)]
        return json_response(await models.model_metadata(model, versions))

    def show_model_ready(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """200 when it has a worker that is ready, else 503."""
        model = self._registry.get(model_name, model_version)
        ready = model.has_ready_worker
        return json_response({"name": model.name, "ready": ready}, 200 if ready else 503)

    def show_statistics(
        self, exchange: Exchange, model_name: str | None = None, model_version: str | None = None
    ) -> Response:
        """Of a version, of all versions of a model, or of all models."""
        told = self._statistics_of(model_name, model_version)
        has_whole_numbers = model_name is not None and model_version is None
        return json_response(models.statistics(told, self._metrics, has_whole_numbers=has_whole_numbers))

    def _statistics_of(self, name: str | None, version: str | None) -> list[Model]:
        if name is None:
            return self._registry.all_models()
        return self._registry.versions(name) if version is None else [self._registry.get(name, version)]
