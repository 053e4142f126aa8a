"""What every metric can do."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from ts.metrics.metric_type_enum import MetricTypes
from ts.metrics.unit import Units

MetricUnit = Units()


class MetricAbstract(abc.ABC):
    """A name, a unit, a kind and the names of labels."""

    def __init__(
        self, metric_name: str, unit: str, dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ):  # fmt: skip
        self.metric_name = metric_name
        self.unit = MetricUnit.units.get(unit, unit)
        self.dimension_names = list(dimension_names or [])
        self.metric_type = metric_type

    @abc.abstractmethod
    def add_or_update(self, value: float, dimension_values: Sequence[str], request_id: str = "") -> None:
        """Emits a value with the labels' values in the order of their names."""
