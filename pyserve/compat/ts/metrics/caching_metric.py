"""Metrics of handlers under TorchServe's names."""

from __future__ import annotations

import logging

from pyserve.telemetry.custom_metrics import CachingMetric, Dimension, MetricTypes
from ts.metrics.metric_abstract import MetricAbstract

logger = logging.getLogger(__name__)
MetricAbstract.register(CachingMetric)

__all__ = ["CachingMetric", "Dimension", "MetricAbstract", "MetricTypes", "logger"]
