"""Metrics of handlers under TorchServe's names."""

from pyserve.telemetry.custom_metrics import MetricTypes

__all__ = ["MetricTypes"]
