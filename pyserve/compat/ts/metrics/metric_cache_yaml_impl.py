"""A cache of metrics that a file declares, as tests of handlers make it. A server's own is `MetricsCache`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import yaml

from pyserve.telemetry.custom_metrics import CachingMetric, MetricTypes, metric_text
from ts.metrics.metric_cache_abstract import MetricCacheAbstract
from ts.metrics.metric_cache_errors import (
    MetricsCacheIOError,
    MetricsCacheKeyError,
    MetricsCachePyYamlError,
    MetricsCacheTypeError,
    MetricsCacheValueError,
)

logger = logging.getLogger(__name__)

__all__ = ["CachingMetric", "MetricCacheAbstract", "MetricTypes", "MetricsCacheYamlImpl", "logger"]


class MetricsCacheYamlImpl(MetricCacheAbstract):
    """What is emitted is logged, as TorchServe's workers print it; in a server handlers have one that reports.

    Args:
        config_file_path: a metrics.yaml; `initialize_cache` reads it.
    """

    def __init__(self, config_file_path: str):
        super().__init__(config_file_path)
        self.model_name: Any = None
        self.cache.update({kind: {} for kind in MetricTypes})

    def initialize_cache(self) -> None:
        """Reads the metrics of ``model_metrics``.

        Raises:
            MetricsCacheIOError: the file cannot be read.
            MetricsCachePyYamlError: it is not YAML.
            MetricsCacheKeyError: it has no ``model_metrics``.
            MetricsCacheValueError: there is none in it.
            MetricsCacheTypeError: it is not of that form.
        """
        section = self._parse_metrics_section()
        for kind in MetricTypes:
            for each in section.get(kind.value) or []:
                try:
                    self.add_metric_to_cache(each["name"], each["unit"], each.get("dimensions") or [], kind)
                except KeyError as error:
                    raise MetricsCacheKeyError(f"a metric of {self.config_file_path} has no {error}") from error

    def cache_keys(self) -> list[str]:
        """``kind:name`` of every metric."""
        return [f"{kind.value}:{name}" for kind, metrics in self.cache.items() for name in metrics]

    def emit(  # noqa: PLR0917 - as the cache that it derives from
        self, name: str, value: float, unit: str, kind: MetricTypes, dimensions: Mapping[str, str],
        request_id: str | None,
    ) -> None:  # fmt: skip
        """Logs one value."""
        labels = ",".join(f"{key}:{text}" for key, text in dimensions.items())
        logger.info("[METRICS]%s", metric_text(name, value, unit, labels, kind, request_id))

    def _parse_yaml_file(self, config_file_path: str) -> Any:
        if not config_file_path:
            raise MetricsCacheTypeError("the path of a metrics.yaml is needed")
        try:
            with open(config_file_path) as file:
                return yaml.safe_load(file)
        except OSError as error:
            raise MetricsCacheIOError(f"Error reading file: {error}") from error
        except yaml.YAMLError as error:
            raise MetricsCachePyYamlError(f"Error parsing file: {error}") from error

    def _parse_metrics_section(self, key: str = "model_metrics") -> dict[str, Any]:
        found = self._parse_yaml_file(self.config_file_path)
        if not isinstance(found, dict):
            raise MetricsCacheTypeError(f"{self.config_file_path} holds no mapping")
        if key not in found:
            raise MetricsCacheKeyError(f"{key!r} key not found in {self.config_file_path}")
        if not found[key]:
            raise MetricsCacheValueError(f"Missing `{key}` specification")
        section: dict[str, Any] = found[key]
        return section
