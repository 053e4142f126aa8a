"""`MetricsCache` under the name that handlers of old import."""

from __future__ import annotations

from collections.abc import Mapping

from pyserve.telemetry.custom_metrics import MetricsCache


class MetricsStore(MetricsCache):
    """The metrics of a batch."""

    def __init__(self, request_ids: Mapping[int, str] | None = None, model_name: str = ""):
        super().__init__(model_name, request_ids)
