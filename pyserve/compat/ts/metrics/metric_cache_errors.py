"""Errors of metrics under TorchServe's names."""

from __future__ import annotations

from pyserve.telemetry.custom_metrics import (
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)

__all__ = [
    "GeneralMetricsCacheError", "MetricsCacheIOError", "MetricsCacheKeyError", "MetricsCachePyYamlError",
    "MetricsCacheTypeError", "MetricsCacheValueError",
]  # fmt: skip


class MetricsCacheIOError(OSError):
    """metrics.yaml cannot be read."""

    def __init__(self, message: str):
        super().__init__(message)


class GeneralMetricsCacheError(Exception):
    """Anything else."""

    def __init__(self, message: str):
        super().__init__(message)
