"""Metrics of handlers under TorchServe's names."""

from pyserve.telemetry.custom_metrics import CachingMetric

__all__ = ["CachingMetric"]
