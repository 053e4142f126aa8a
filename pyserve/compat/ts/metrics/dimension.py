"""Metrics of handlers under TorchServe's names."""

from pyserve.telemetry.custom_metrics import Dimension

__all__ = ["Dimension"]
