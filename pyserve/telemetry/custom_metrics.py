"""Metrics that handlers make, in a worker process: what they call (`MetricsCache`, TorchServe's API).

What a handler emits is added up in its worker, reported a few times a second (`MetricsReport`), and added up over all
workers by the server (`custom_sums`). Nothing has to be declared; a ``metrics.yaml`` only fixes units and the order
of labels.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import yaml

from pyserve.telemetry.metrics_config import MODEL_METRICS, Declared, MetricsConfigError, read_metrics_config

log = logging.getLogger(__name__)

UNITS = {
    "ms": "Milliseconds", "s": "Seconds", "percent": "Percent", "count": "Count", "MB": "Megabytes",
    "GB": "Gigabytes", "kB": "Kilobytes", "B": "Bytes", "": "unit",
}  # fmt: skip
VALUES_MAX = 10_000
# A report costs the server more than a request does.
REPORT_INTERVAL_S = 0.1


class MetricTypes(Enum):
    """Kinds of metrics."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricsCacheKeyError(KeyError):
    """There is no such metric."""


class MetricsCacheTypeError(TypeError):
    """An argument is of the wrong type."""


class MetricsCacheValueError(ValueError):
    """An argument has a value that is not allowed."""


class MetricsCachePyYamlError(yaml.YAMLError):
    """metrics.yaml is not YAML."""


class Dimension:
    """A label and its value."""

    def __init__(self, name: str, value: str):
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"

    def to_dict(self) -> dict[str, str]:
        """Both, as TorchServe's JSON has them."""
        return {"Name": self.name, "Value": self.value}


def metric_text(  # noqa: PLR0917 - the parts of a line, in their order
    name: str, value: float | str, unit: str, labels: str, kind: MetricTypes | None, request_id: str | None
) -> str:
    """A value as TorchServe's workers print it; ``labels`` is ``name:value`` pairs, separated by commas."""
    type_text = f"|#type:{kind.name}" if kind is not None else ""
    suffix = f",{request_id}" if request_id else ""
    return f"{name}.{unit}:{value}|#{labels}{type_text}|#hostname:{socket.gethostname()},{int(time.time())}{suffix}"


class CachingMetric:
    """One metric of a handler: a name, a unit, a kind and the names of its labels.

    One that belongs to no cache writes its values to the log.
    """

    def __init__(
        self, metric_name: str, unit: str, dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER, cache: MetricsCache | None = None,
    ):  # fmt: skip
        self.metric_name = metric_name
        self.unit = UNITS.get(unit, unit)
        self.dimension_names = list(dimension_names or [])
        self.metric_type = metric_type
        self._cache = cache

    def add_or_update(self, value: float, dimension_values: Sequence[str] | None = None, request_id: str = "") -> None:
        """Emits ``value`` with label values in the order of ``dimension_names``.

        As many values as names are needed, and a counter cannot be lowered: else an error is logged, as there.
        """
        values = list(dimension_values or [])
        if len(values) != len(self.dimension_names):
            log.error(
                "metric %s has %d dimensions %s, got %s", self.metric_name, len(self.dimension_names),
                self.dimension_names, values,
            )  # fmt: skip
            return
        if self._lowers(value):
            return
        self._emit(value, dict(zip(self.dimension_names, map(str, values), strict=True)), request_id)

    def update(self, value: float, request_id: str = "", dimensions: Sequence[Dimension] | None = None) -> None:
        """Emits ``value`` with these labels; a counter cannot be lowered."""
        if self._lowers(value):
            return
        self._emit(value, {each.name: str(each.value) for each in dimensions or []}, request_id)

    def _lowers(self, value: float) -> bool:
        if self.metric_type is not MetricTypes.COUNTER or value >= 0:
            return False
        log.error("counter %s cannot be lowered by %s", self.metric_name, value)
        return True

    def _emit(self, value: float, dimensions: dict[str, str], request_id: str) -> None:
        if self._cache is not None:
            self._cache.emit(self.metric_name, value, self.unit, self.metric_type, dimensions, request_id or None)
            return
        labels = ",".join(f"{name}:{text}" for name, text in dimensions.items())
        log.info("[METRICS]%s", metric_text(self.metric_name, value, self.unit, labels, self.metric_type, request_id))


class MetricsCache:
    """What handlers find as ``context.metrics``.

    Args:
        config: path of a metrics.yaml; None for TorchServe's own.
        keeps_each: every value is told, as it came; else those of the same metric are added up.

    Attributes:
        cache: metrics by kind and name.
        store: itself; old handlers look for it.
        request_ids: of the batch, by index.
        is_muted: whether what is emitted is dropped: it is about no request of a client.
    """

    is_muted = False

    def __init__(
        self,
        model_name: str = "",
        request_ids: Mapping[int, str] | None = None,
        *,
        config: str | None = None,
        keeps_each: bool = False,
    ):
        self.model_name = model_name
        self.request_ids: Mapping[int, str] = request_ids or {}
        self.cache: dict[MetricTypes, dict[str, CachingMetric]] = {kind: {} for kind in MetricTypes}
        self.store = self
        self._emissions: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.keeps_each = keeps_each
        for kind, name, unit, dimensions in _declared(config):
            # Units stay as they are written there.
            self.add_metric_to_cache(name, unit, dimensions, MetricTypes(kind)).unit = unit

    # --- for the server -------------------------------------------------------------------------------------------

    def bind(self, request_ids: Mapping[int, str]) -> None:
        """The batch that is about to run."""
        self.request_ids = request_ids

    def drain(self) -> list[dict[str, Any]]:
        """What was emitted since the last time: of a counter the sum, of a gauge the last value, of a histogram all."""
        if not self._emissions:
            return []
        emissions, self._emissions = list(self._emissions.values()), {}
        return emissions

    def emit(  # noqa: PLR0917
        self, name: str, value: float, unit: str, kind: MetricTypes, dimensions: Mapping[str, str],
        request_id: str | None,
    ) -> None:  # fmt: skip
        """Notes one value.

        Raises:
            MetricsCacheTypeError: it is not a number.
        """
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise MetricsCacheTypeError(f"the value of metric {name} is a number, got {value!r}") from None
        if self.is_muted:
            return
        key: tuple[Any, ...] = (name, kind, *dimensions.items())
        if self.keeps_each:
            key = (len(self._emissions),)
        known = self._emissions.get(key)
        if known is None:
            if len(self._emissions) < VALUES_MAX:
                self._emissions[key] = {
                    "name": name, "value": [number] if kind is MetricTypes.HISTOGRAM else number, "unit": unit,
                    "type": kind.name, "dimensions": dict(dimensions), "request_id": request_id,
                }  # fmt: skip
            return
        known["request_id"] = request_id
        if kind is MetricTypes.COUNTER:
            known["value"] += number
        elif kind is MetricTypes.GAUGE:
            known["value"] = number
        elif len(known["value"]) < VALUES_MAX:
            known["value"].append(number)

    # --- for handlers ---------------------------------------------------------------------------------------------

    def add_metric_to_cache(
        self, metric_name: str, unit: str, dimension_names: Sequence[str] | None = None,
        metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> CachingMetric:  # fmt: skip
        """A metric to emit values of later. It takes the place of one of that name and kind.

        Raises:
            MetricsCacheTypeError: a name or unit that is no text, a kind that is none, or label names that are no list.
        """
        if not isinstance(metric_name, str):
            raise MetricsCacheTypeError(f"a metric's name is text, got {metric_name!r}")
        if not isinstance(metric_type, MetricTypes):
            raise MetricsCacheTypeError(f"metric_type is a MetricTypes, got {metric_type!r}")
        if not isinstance(unit, str):
            raise MetricsCacheTypeError(f"the unit of metric {metric_name} is text, got {unit!r}")
        if isinstance(dimension_names, str):
            raise MetricsCacheTypeError(
                f"the dimension names of metric {metric_name} are a list, got {dimension_names!r}"
            )
        made = CachingMetric(metric_name, unit, dimension_names, metric_type, self)
        self.cache[metric_type][metric_name] = made
        return made

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """A metric that was added or declared.

        Raises:
            MetricsCacheKeyError: there is none.
            MetricsCacheTypeError: ``metric_name`` is no text, or ``metric_type`` no `MetricTypes`.
        """
        if not isinstance(metric_name, str) or not isinstance(metric_type, MetricTypes):
            raise MetricsCacheTypeError(f"a name and a MetricTypes are needed, got {metric_name!r}, {metric_type!r}")
        try:
            return self.cache[metric_type][metric_name]
        except KeyError:
            raise MetricsCacheKeyError(f"no {metric_type.value.lower()} named {metric_name!r}") from None

    def add_metric(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, unit: str = "", idx: int | None = None,
        dimensions: Sequence[Dimension] | None = None, metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:  # fmt: skip
        """Emits ``value``, labelled with the model's name too.

        Raises:
            MetricsCacheTypeError: the name is no text.
        """
        if not isinstance(name, str):
            raise MetricsCacheTypeError(f"a metric's name is text, got {name!r}")
        labels = {each.name: str(each.value) for each in dimensions or []}
        labels |= {"ModelName": self.model_name, "Level": "Model"}
        metric = self.cache[metric_type].get(name)
        self.emit(
            name, value, metric.unit if metric else UNITS.get(unit, unit), metric_type, labels, self._request_id(idx)
        )
        if metric is None and len(self.cache[metric_type]) < VALUES_MAX:  # names may be made without end
            self.add_metric_to_cache(name, unit, list(labels), metric_type)

    def add_counter(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None
    ) -> None:
        """Adds to a counter; a negative value is logged and not counted."""
        if value < 0:
            log.error("counter %s cannot be lowered by %s", name, value)
            return
        self.add_metric(name, value, "count", idx, dimensions, MetricTypes.COUNTER)

    def add_time(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, idx: int | None = None, unit: str = "ms",
        dimensions: Sequence[Dimension] | None = None, metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:  # fmt: skip
        """Emits a time in ``ms`` or ``s``.

        Raises:
            MetricsCacheValueError: another unit.
        """
        self._check_unit(name, unit, ("ms", "s"))
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_size(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, idx: int | None = None, unit: str = "MB",
        dimensions: Sequence[Dimension] | None = None, metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:  # fmt: skip
        """Emits a size in ``GB``, ``MB``, ``kB`` or ``B``.

        Raises:
            MetricsCacheValueError: another unit.
        """
        self._check_unit(name, unit, ("GB", "MB", "kB", "B"))
        self.add_metric(name, value, unit, idx, dimensions, metric_type)

    def add_percent(
        self, name: str, value: float, idx: int | None = None, dimensions: Sequence[Dimension] | None = None,
        metric_type: MetricTypes = MetricTypes.GAUGE,
    ) -> None:  # fmt: skip
        """Emits a percentage."""
        self.add_metric(name, value, "percent", idx, dimensions, metric_type)

    def add_error(self, name: str, value: float, dimensions: Sequence[Dimension] | None = None) -> None:
        """Counts an error."""
        labels = [*(dimensions or []), Dimension("Level", "Error")]
        self.emit(name, value if isinstance(value, (int, float)) else 1, "unit", MetricTypes.COUNTER,
                  {each.name: str(each.value) for each in labels}, None)  # fmt: skip

    def _request_id(self, idx: int | None) -> str | None:
        if idx is not None and idx in self.request_ids:
            return self.request_ids[idx]
        return ",".join(self.request_ids.values()) or None

    @staticmethod
    def _check_unit(name: str, unit: str, allowed: tuple[str, ...]) -> None:
        if unit not in allowed:
            raise MetricsCacheValueError(f"{name}: the unit is one of {', '.join(allowed)}, got {unit!r}")


class MetricsReport:
    """Sends the server what a worker's metrics have come to, ten times a second at most.

    Args:
        send: called with what `MetricsCache.drain` gave.
    """

    def __init__(self, metrics: MetricsCache, send: Callable[[list[dict[str, Any]]], None]):
        self._metrics = metrics
        self._send = send
        self._next_at = 0.0
        self._prediction_s = self._handler_s = -1.0

    def note_prediction(self, seconds: float, handler_s: float = -1.0) -> None:
        """How long the last batch was in the worker, and in its handler: TorchServe's times."""
        self._prediction_s, self._handler_s = seconds, handler_s
        if self._metrics.keeps_each:
            self._add_times()

    def look(self) -> int:
        """Reports if it is time to. Returns in how many ms it will be, -1 if there is nothing to report."""
        if self._prediction_s < 0 and not self._metrics._emissions:
            return -1
        now = time.monotonic()
        if now < self._next_at:
            return int((self._next_at - now) * 1e3) + 1
        self.flush()
        self._next_at = now + REPORT_INTERVAL_S
        return -1

    def _add_times(self) -> None:
        for name, seconds in (("HandlerTime", self._handler_s), ("PredictionTime", self._prediction_s)):
            if seconds >= 0:
                self._metrics.add_time(name, round(seconds * 1e3, 2))
        self._prediction_s = self._handler_s = -1.0

    def flush(self) -> None:
        """Reports what there is."""
        self._add_times()
        values = self._metrics.drain()
        if values:
            self._send(values)


def _declared(path: str | None) -> Sequence[Declared]:
    """The ``model_metrics``.

    Raises:
        MetricsCachePyYamlError: the file cannot be read, or is not of that form.
    """
    try:
        return read_metrics_config(path).model if path else MODEL_METRICS
    except MetricsConfigError as error:
        raise MetricsCachePyYamlError(str(error)) from error
