"""The inference API: predictions and health."""

from __future__ import annotations

from pyserve.http1_exchange import Exchange
from pyserve.messages import Response, json_response
from pyserve.registry import Registry


class Inference:
    """Endpoints of the inference port. Loop thread only.

    Args:
        tells_errors: whether ``/ready`` may say why a model failed to load, in the words of an exception.

    Attributes:
        is_ready: whether the server takes requests: not while it starts or drains.
    """

    def __init__(self, registry: Registry, *, tells_errors: bool = True):
        self._registry = registry
        self._tells_errors = tells_errors
        self.is_ready = False

    def predict(
        self, exchange: Exchange, model_name: str, model_version: str | None = None, rest: str = ""
    ) -> None:
        """Runs the model on the body. Answers later, without a task."""
        model = self._registry.get(model_name, model_version)
        model.predict(exchange, model_version or "default", (("explain", "False"), ("url_path", rest)))

    def ping(self, exchange: Exchange) -> Response:
        """200 Healthy, or 500 Unhealthy when a model that should have workers has none that is ready."""
        healthy = self.is_ready and not self._not_ready()
        return json_response({"status": "Healthy" if healthy else "Unhealthy"}, 200 if healthy else 500)

    def ready(self, exchange: Exchange) -> Response:
        """200 when every model can answer; else 503 with the reason for each that cannot."""
        reasons = self._not_ready()
        if not self.is_ready:
            return json_response({"status": "NotReady", "reason": "the server is starting or stopping"}, 503)
        if reasons:
            return json_response({"status": "NotReady", "models": reasons}, 503)
        return json_response({"status": "Ready"})

    def live(self, exchange: Exchange) -> Response:
        """200 as long as the event loop turns."""
        return json_response({"status": "Live"})

    def _not_ready(self) -> dict[str, dict[str, str]]:
        reasons = {}
        for model in self._registry.default_models():
            if model.state == "FAILED" or (model.wanted_workers > 0 and not model.has_ready_worker):
                reasons[model.name] = self._reason(model.state, model.error)
        for failure in self._registry.failures:
            reasons[failure.name] = self._reason("FAILED", failure.error)
        return reasons

    def _reason(self, state: str, error: str) -> dict[str, str]:
        return {"state": state, **({"error": error} if error and self._tells_errors else {})}
