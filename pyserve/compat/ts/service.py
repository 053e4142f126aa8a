"""A handler with its context: what a worker of TorchServe calls. pyserve's workers do not; tests of handlers do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pyserve import TORCHSERVE_VERSION
from pyserve.context import Context, RequestProcessor
from pyserve.handler import PredictionException
from ts.protocol.otf_message_handler import create_predict_response
from ts.utils.util import get_yaml_config

PREDICTION_METRIC = "PredictionTime"
logger = logging.getLogger(__name__)

__all__ = [
    "PREDICTION_METRIC", "Context", "PredictionException", "RequestProcessor", "Service", "create_predict_response",
    "emit_metrics", "get_yaml_config", "logger",
]  # fmt: skip


class Service:
    """Calls a handler for batches.

    Args:
        model_name: what the model is served as.
        model_dir: folder of its files.
        manifest: MANIFEST.json as a dict, or None.
        entry_point: ``handle(data, context)``.
        gpu: index, or None.
        batch_size: the largest batch.
        limit_max_image_pixels: whether pictures over Pillow's limit are refused.
        metrics_cache: what the handler finds as ``context.metrics``.
    """

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, model_name: str, model_dir: str, manifest: dict[str, Any] | None,
        entry_point: Callable[[Any, Context], Any] | None, gpu: int | None, batch_size: int,
        limit_max_image_pixels: bool = True, metrics_cache: Any = None,
    ):  # fmt: skip
        config_file = ((manifest or {}).get("model") or {}).get("configFile")
        config = get_yaml_config(Path(model_dir, config_file)) if config_file else None
        self._context = Context(
            model_name, model_dir, manifest, batch_size, gpu, TORCHSERVE_VERSION, limit_max_image_pixels,
            metrics_cache, config,
        )  # fmt: skip
        self._entry_point = entry_point
        self.cl_socket: Any = None

    @property
    def context(self) -> Context:
        """The context that the handler gets."""
        return self._context

    def set_cl_socket(self, cl_socket: Any) -> None:
        """Where parts of answers are sent."""
        self.cl_socket = cl_socket

    @staticmethod
    def retrieve_data_for_inference(
        batch: list[dict[str, Any]] | None,
    ) -> tuple[list[RequestProcessor], list[dict[str, Any]], dict[int, str]]:
        """Requests as the wire has them -> headers, rows for the handler, and request ids.

        Raises:
            ValueError: there is no list.
        """
        if batch is None:
            raise ValueError("Received invalid inputs")
        processors, rows, ids = [], [], {}
        for index, request in enumerate(batch):
            ids[index] = _text(request["requestId"])
            headers: dict[str, Any] = {}
            row = {}
            for part in request["parameters"]:
                name = _text(part["name"])
                row[name] = part["value"]
                if part.get("contentType"):
                    headers[name] = {"content-type": part["contentType"]}
            headers |= {_text(each["name"]): _text(each["value"]) for each in request.get("headers") or []}
            processors.append(RequestProcessor(headers))
            rows.append(row)
        return processors, rows, ids

    def predict(self, batch: list[dict[str, Any]] | None) -> bytearray:
        """What goes back for a batch, as `create_predict_response` writes it."""
        processors, rows, ids = self.retrieve_data_for_inference(batch)
        context = self._context
        context.request_ids, context.request_processor, context.cl_socket = ids, processors, self.cl_socket
        if context.metrics is not None:
            context.metrics.request_ids = ids
        began = time.perf_counter()
        try:
            answers = self._entry_point(rows, context)  # type: ignore[misc]
        except MemoryError:
            logger.error("System out of memory", exc_info=True)
            return create_predict_response(None, ids, "Out of resources", 507)
        except PredictionException as error:
            logger.error("Prediction error", exc_info=True)
            return create_predict_response(None, ids, error.message, error.error_code)
        except Exception as error:
            if "CUDA" in str(error):
                logger.error("CUDA out of memory", exc_info=True)
                return create_predict_response(None, ids, "Out of resources", 507)
            logger.warning("Invoking custom service failed.", exc_info=True)
            return create_predict_response(None, ids, "Prediction failed", 503)
        if not isinstance(answers, list):
            logger.warning("model: %s, Invalid return type: %s.", context.model_name, type(answers))
            return create_predict_response(None, ids, "Invalid model predict output", 503)
        if len(answers) != len(ids):
            logger.warning(
                "model: %s, number of batch response mismatched, expect: %d, got: %d.", context.model_name, len(ids),
                len(answers),
            )  # fmt: skip
            return create_predict_response(None, ids, "number of batch response mismatched", 503)
        if context.metrics is not None:
            context.metrics.add_time(PREDICTION_METRIC, round((time.perf_counter() - began) * 1e3, 2))
        return create_predict_response(answers, ids, "Prediction success", 200, context)


def emit_metrics(metrics: Iterable[Any] | None) -> None:
    """Logs each metric of a list, as TorchServe's workers print it."""
    for metric in metrics or []:
        logger.info("[METRICS]%s", metric)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, (bytes, bytearray)) else str(value)
