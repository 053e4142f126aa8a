"""Errors of metrics under TorchServe's names."""

from pyserve.telemetry.custom_metrics import (
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)

__all__ = ["MetricsCacheKeyError", "MetricsCachePyYamlError", "MetricsCacheTypeError", "MetricsCacheValueError"]
