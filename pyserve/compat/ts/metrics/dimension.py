"""Metrics of handlers under TorchServe's names."""

from pyserve.custom_metrics import Dimension

__all__ = ["Dimension"]
