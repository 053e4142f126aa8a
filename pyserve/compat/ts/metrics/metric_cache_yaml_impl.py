"""`MetricsCache` under TorchServe's name."""

from pyserve.telemetry.custom_metrics import MetricsCache as MetricsCacheYamlImpl

__all__ = ["MetricsCacheYamlImpl"]
