"""The metrics of a batch as handlers of old made them: a list of `Metric`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ts.metrics.dimension import Dimension
from ts.metrics.metric import Metric


class MetricsStore:
    """Metrics in ``store``; the first value of each stays there, and what is added later is logged.

    Args:
        request_ids: of the batch, by index.
        model_name: a label of every metric.
    """

    def __init__(self, request_ids: Mapping[int, str] | Any, model_name: str):
        self.store: list[Metric] = []
        self.request_ids = request_ids
        self.model_name = model_name
        self.cache: dict[str, Metric] = {}

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Adds to a counter."""
        self._add_or_update(name, value, self._get_req(idx), "count", "counter", dimensions)

    def add_time(
        self, name: str, value: float, idx: int | None = None, unit: str = "ms",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:  # fmt: skip
        """A time in ``ms`` or ``s``. ValueError for another unit."""
        if unit not in ("ms", "s"):
            raise ValueError("the unit for a timed metric should be one of ['ms', 's']")
        self._add_or_update(name, value, self._get_req(idx), unit, None, dimensions)

    def add_size(
        self, name: str, value: float, idx: int | None = None, unit: str = "MB",
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:  # fmt: skip
        """A size in ``MB``, ``kB``, ``GB`` or ``B``. ValueError for another unit."""
        if unit not in ("MB", "kB", "GB", "B"):
            raise ValueError("The unit for size based metric is one of ['MB','kB', 'GB', 'B']")
        self._add_or_update(name, value, self._get_req(idx), unit, None, dimensions)

    def add_percent(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """A percentage."""
        self._add_or_update(name, value, self._get_req(idx), "percent", None, dimensions)

    def add_error(self, name: str, value: Any, dimensions: Sequence[Dimension] | None = None) -> None:
        """An error: a number or its text."""
        labels = [*(dimensions or []), Dimension("Level", "Error")]
        self.store.append(Metric(name, value, "", labels))

    def add_metric(
        self, name: str, value: float, unit: str, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Any metric."""
        self._add_or_update(name, value, self._get_req(idx), unit, None, dimensions)

    def _add_or_update(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, req_id: str | None, unit: str, metrics_method: str | None = None,
        dimensions: Sequence[Dimension] | None = None,
    ) -> None:  # fmt: skip
        labels = [*(dimensions or []), Dimension("ModelName", self.model_name), Dimension("Level", "Model")]
        key = f"{name}-{unit}-{'-'.join(map(str, labels))}-{req_id}"
        known = self.cache.get(key)
        if known is not None:
            known.update(value)
            return
        self.cache[key] = Metric(name, value, unit, labels, req_id, metrics_method)
        self.store.append(self.cache[key])

    def _get_req(self, idx: int | None) -> str | None:
        if not isinstance(self.request_ids, Mapping):
            return None
        if idx is not None and idx in self.request_ids:
            return self.request_ids[idx]
        return ",".join(self.request_ids.values()) or None
