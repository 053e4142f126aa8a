"""Names of TorchServe's module of the same name that handlers import."""

from __future__ import annotations

from typing import Any

from pyserve.handler import PredictionException

PREDICTION_METRIC = "PredictionTime"

__all__ = ["PREDICTION_METRIC", "PredictionException", "Service", "emit_metrics"]


class Service:
    """A handler with its context, as tests of handlers make it."""

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, model_name: str, model_dir: str, manifest: dict[str, Any] | None, entry_point: Any, gpu: int | None,
        batch_size: int, *args: Any, **kwargs: Any,
    ):  # fmt: skip
        from pyserve.context import Context

        self._context = Context(model_name, model_dir, manifest, batch_size, gpu)
        self._entry_point = entry_point

    @property
    def context(self) -> Any:
        """The context that the handler gets."""
        return self._context

    def predict(self, batch: Any) -> Any:
        """What the handler answers for ``batch``."""
        return self._entry_point(batch, self._context)


def emit_metrics(metrics: Any) -> None:
    """Does nothing: what a handler emits is reported after its batch."""
