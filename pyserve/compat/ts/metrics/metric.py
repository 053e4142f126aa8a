"""One value of a metric."""

from __future__ import annotations

import socket
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from pyserve.telemetry.custom_metrics import CachingMetric, Dimension, MetricTypes, metric_text
from ts.metrics.unit import Units

MetricUnit = Units()

__all__ = ["CachingMetric", "Dimension", "Metric", "MetricTypes", "MetricUnit", "Units"]


class Metric:
    """One value of a metric; its text is the line that TorchServe's log has.

    Args:
        name: of the metric.
        value: what it was when the metric was made.
        unit: short or long.
        dimensions: labels.
        request_id: what request it is of.
        metric_method: "counter" or None; kept only.
    """

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, unit: str, dimensions: Sequence[Dimension], request_id: str | None = None,
        metric_method: str | None = None,
    ):  # fmt: skip
        self.name = name
        self.value = value
        self.unit = MetricUnit.units.get(unit, unit)
        self.dimensions = list(dimensions)
        self.dimension_names = [each.name for each in self.dimensions]
        self.dimension_values = [each.value for each in self.dimensions]
        self.request_id = request_id
        self.metric_method = metric_method
        self.metric_type = MetricTypes.COUNTER
        self._caching_metric = CachingMetric(name, unit, self.dimension_names, self.metric_type)

    def update(self, value: float) -> None:
        """Emits ``value``: it is written to the log."""
        self._caching_metric.add_or_update(value, self.dimension_values, self.request_id or "")

    def reset(self) -> None:
        """Emits 0."""
        self.update(0)

    def __str__(self) -> str:
        labels = ",".join(map(str, self.dimensions))
        return metric_text(self.name, self.value, self.unit, labels, None, self.request_id)

    def to_dict(self) -> dict[str, Any]:
        """Its parts, as TorchServe's JSON names them."""
        return OrderedDict(
            {
                "MetricName": self.name,
                "Value": self.value,
                "Unit": self.unit,
                "Dimensions": self.dimensions,
                "Timestamp": int(time.time()),
                "HostName": socket.gethostname(),
                "RequestId": self.request_id,
            }
        )
