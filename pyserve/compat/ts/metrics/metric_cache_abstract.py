"""What every cache of metrics can do."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from pyserve.telemetry.custom_metrics import Dimension, MetricsCache, MetricTypes
from ts.metrics.metric_abstract import MetricAbstract

__all__ = ["Dimension", "MetricAbstract", "MetricCacheAbstract", "MetricTypes"]


class _AsCaches(abc.ABCMeta):
    """Takes the cache that the server gives handlers for one of these."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, MetricsCache) or super().__instancecheck__(instance)


class MetricCacheAbstract(MetricsCache, metaclass=_AsCaches):
    """Metrics that a configuration file declares.

    Args:
        config_file_path: a metrics.yaml.
    """

    def __init__(self, config_file_path: str):
        self.config_file_path = config_file_path
        super().__init__()

    def set_request_ids(self, request_ids: Mapping[int, str] | None) -> None:
        """The batch that the metrics that follow are of."""
        self.request_ids = request_ids or {}

    @abc.abstractmethod
    def initialize_cache(self) -> None:
        """Reads the file."""
