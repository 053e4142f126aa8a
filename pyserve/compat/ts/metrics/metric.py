"""One value of a metric."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from pyserve.telemetry.custom_metrics import UNITS, Dimension, MetricTypes


class Metric:
    """One value of a metric; its text is the line that TorchServe's log has."""

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, unit: str, dimensions: Sequence[Dimension], request_id: str | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ):  # fmt: skip
        self.name = name
        self.value = value
        self.unit = UNITS.get(unit, unit)
        self.dimensions = list(dimensions)
        self.request_id = request_id
        self.metric_type = metric_type

    def update(self, value: float) -> None:
        """Adds to a counter, replaces any other."""
        self.value = self.value + value if self.metric_type is MetricTypes.COUNTER else value

    def __str__(self) -> str:
        labels = ",".join(map(str, self.dimensions))
        suffix = f",{self.request_id}" if self.request_id else ""
        return (
            f"{self.name}.{self.unit}:{self.value}|#{labels}|#type:{self.metric_type.value}|"
            f"#hostname:{socket.gethostname()},{int(time.time())}{suffix}"
        )
