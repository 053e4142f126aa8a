"""Metrics that handlers make: what they call (`MetricsCache`, TorchServe's API), and the server's sums of it.

What a handler emits is added up in its worker, reported a few times a second (`MetricsReport`), and added up over all
workers by the server (`CustomMetrics`). Nothing has to be declared; a ``metrics.yaml`` only fixes units and the order
of labels.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from prometheus_client.metrics_core import Metric as Family

from pyserve.telemetry.exposition import add_histogram, torchserve_family
from pyserve.telemetry.metric_log import MetricLog
from pyserve.telemetry.metrics_config import MODEL_METRICS, Declared, MetricsConfigError, read_metrics_config

log = logging.getLogger(__name__)

UNITS = {
    "ms": "Milliseconds", "s": "Seconds", "percent": "Percent", "count": "Count", "MB": "Megabytes",
    "GB": "Gigabytes", "kB": "Kilobytes", "B": "Bytes", "": "unit",
}  # fmt: skip
HISTOGRAM_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
# Of one model; a worker process may be anybody's code.
NAMES_MAX = 200
SERIES_MAX = 1000
TEXT_SIZE_MAX = 200
VALUES_MAX = 10_000
# A report costs the server more than a request does.
REPORT_INTERVAL_S = 0.1


class MetricTypes(Enum):
    """Kinds of metrics."""

    COUNTER = "COUNTER"
    GAUGE = "GAUGE"
    HISTOGRAM = "HISTOGRAM"


class MetricsCacheKeyError(Exception):
    """There is no such metric."""


class MetricsCacheTypeError(Exception):
    """An argument is of the wrong type."""


class MetricsCacheValueError(Exception):
    """An argument has a value that is not allowed."""


class MetricsCachePyYamlError(Exception):
    """metrics.yaml is not YAML."""


class Dimension:
    """A label and its value."""

    def __init__(self, name: str, value: str):
        self.name = name
        self.value = value

    def __str__(self) -> str:
        return f"{self.name}:{self.value}"


class CachingMetric:
    """One metric of a handler: a name, a unit, a kind and the names of its labels."""

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

        Raises:
            MetricsCacheValueError: as many values as names are needed.
        """
        values = list(dimension_values or [])
        if len(values) != len(self.dimension_names):
            raise MetricsCacheValueError(
                f"{self.metric_name} has {len(self.dimension_names)} dimensions {self.dimension_names}, got {values}"
            )
        self._emit(value, dict(zip(self.dimension_names, map(str, values), strict=True)), request_id)

    def update(self, value: float, request_id: str = "", dimensions: Sequence[Dimension] | None = None) -> None:
        """Emits ``value`` with these labels."""
        self._emit(value, {each.name: str(each.value) for each in dimensions or []}, request_id)

    def _emit(self, value: float, dimensions: dict[str, str], request_id: str) -> None:
        if self._cache is not None:
            self._cache.emit(self.metric_name, value, self.unit, self.metric_type, dimensions, request_id or None)


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
            self.add_metric_to_cache(name, unit, dimensions, MetricTypes(kind.upper())).unit = unit

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
                    "type": kind.value, "dimensions": dict(dimensions), "request_id": request_id,
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
        """A metric to emit values of later; the one there is if there is one of that name and kind.

        Raises:
            MetricsCacheTypeError: a name that is no text, or a kind that is none.
        """
        if not isinstance(metric_name, str) or not metric_name:
            raise MetricsCacheTypeError(f"a metric's name is text, got {metric_name!r}")
        if not isinstance(metric_type, MetricTypes):
            raise MetricsCacheTypeError(f"metric_type is a MetricTypes, got {metric_type!r}")
        known = self.cache[metric_type].get(metric_name)
        if known is None:
            known = CachingMetric(metric_name, unit, dimension_names, metric_type, self)
            self.cache[metric_type][metric_name] = known
        return known

    def get_metric(self, metric_name: str, metric_type: MetricTypes = MetricTypes.COUNTER) -> CachingMetric:
        """A metric that was added or declared.

        Raises:
            MetricsCacheKeyError: there is none.
        """
        try:
            return self.cache[metric_type][metric_name]
        except KeyError:
            raise MetricsCacheKeyError(f"no {metric_type.value.lower()} named {metric_name!r}") from None

    def add_metric(  # noqa: PLR0917 - TorchServe's signature
        self, name: str, value: float, unit: str = "", idx: int | None = None,
        dimensions: Sequence[Dimension] | None = None, metric_type: MetricTypes = MetricTypes.COUNTER,
    ) -> None:  # fmt: skip
        """Emits ``value``, labelled with the model's name too."""
        labels = {each.name: str(each.value) for each in dimensions or []}
        labels |= {"ModelName": self.model_name, "Level": "Model"}
        declared = self.cache[metric_type].get(name)
        self.emit(name, value, declared.unit if declared else UNITS.get(unit, unit), metric_type, labels,
                  self._request_id(idx))  # fmt: skip

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
                  {each.name: str(each.value) for each in labels}, self._request_id(None))  # fmt: skip

    def _request_id(self, idx: int | None) -> str | None:
        if idx is not None:
            return self.request_ids.get(idx)
        return ",".join(self.request_ids.values()) or None

    @staticmethod
    def _check_unit(name: str, unit: str, allowed: tuple[str, ...]) -> None:
        if unit not in allowed:
            raise MetricsCacheValueError(f"{name}: the unit is one of {', '.join(allowed)}, got {unit!r}")


class MetricsReport:
    """Tells the server what a worker's metrics have come to, ten times a second at most.

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


class CustomMetrics:
    """The server's sums of what all workers report. Loop thread only.

    Args:
        declared: of metrics.yaml: their units, and what stands on the endpoint before the first value.
        drops_undeclared: others are not kept.
        log: where values are noted too.

    Reports come from processes that run anybody's code: what is no metric is dropped, and there is a bound on how many.
    """

    def __init__(
        self, declared: Sequence[Declared] = MODEL_METRICS, *, drops_undeclared: bool = False,
        log: MetricLog | None = None,
    ):  # fmt: skip
        self._hostname = socket.gethostname()
        self._declared = {(each.name, each.kind.upper()): each for each in declared}
        self._drops_undeclared = drops_undeclared
        self._log = log
        # model -> (name, kind) -> (unit, labels -> value or [counts, sum])
        self._models: dict[str, dict[tuple[str, str], tuple[str, dict[tuple[tuple[str, str], ...], Any]]]] = {}
        self._told: set[str] = set()

    def observe(self, model: str, values: Any, *, is_noted: bool = True) -> None:
        """Adds what a worker of ``model`` reported. ``is_noted``: in the log, too."""
        if not isinstance(values, list):
            return
        for value in values[:VALUES_MAX]:
            try:
                self._add(model, value, self._log if is_noted else None)
            except (KeyError, TypeError, ValueError, AttributeError):
                continue

    def _add(self, model: str, value: dict[str, Any], noted: MetricLog | None) -> None:
        kind = MetricTypes(value["type"]).value
        name = _metric_name(value["name"])
        told = value["value"] if kind == "HISTOGRAM" and isinstance(value["value"], list) else [value["value"]]
        numbers = [float(each) for each in told[:VALUES_MAX]]
        if not all(math.isfinite(each) and (each >= 0 or kind != "COUNTER") for each in numbers):
            return
        metrics = self._models.setdefault(model, {})
        key = (name, kind)
        declared = self._declared.get(key)
        if declared is None and self._drops_undeclared:
            return
        unit = declared.unit if declared else str(value["unit"])[:TEXT_SIZE_MAX]
        if key not in metrics:
            if len(metrics) >= NAMES_MAX:
                self._tell(model, f"more than {NAMES_MAX} metrics; further ones are dropped")
                return
            metrics[key] = (unit, {})
        labels = tuple((_label(key), str(text)[:TEXT_SIZE_MAX]) for key, text in value["dimensions"].items())
        if noted is not None:
            ids = str(value.get("request_id") or "")[:TEXT_SIZE_MAX]
            for number in numbers:
                noted.note_model(name, unit, number, dict(labels), ids)
        series = metrics[key][1]
        if labels not in series:
            if sum(len(each) for _, each in metrics.values()) >= SERIES_MAX:
                self._tell(model, f"more than {SERIES_MAX} combinations of labels; further ones are dropped")
                return
            series[labels] = [[0] * (len(HISTOGRAM_BOUNDS) + 1), 0.0] if kind == "HISTOGRAM" else 0.0
        if kind == "COUNTER":
            series[labels] += sum(numbers)
        elif kind == "GAUGE":
            series[labels] = numbers[-1]
        else:
            counts, total = series[labels]
            for number in numbers:
                counts[bisect_left(HISTOGRAM_BOUNDS, number)] += 1
            series[labels] = [counts, total + sum(numbers)]

    def _tell(self, model: str, text: str) -> None:
        if model not in self._told:
            self._told.add(model)
            log.warning("%s emits %s", model, text)

    def keep(self, models: set[str]) -> None:
        """Forgets all but these."""
        self._models = {name: metrics for name, metrics in self._models.items() if name in models}

    def collect(self, taken: Collection[str] = ()) -> Iterator[Family]:
        """A family per name, over all models.

        The text must be valid whatever handlers emit: of one name used for several kinds the first kind counts, names
        in ``taken`` are not theirs, and values under the same labels are put together.
        """
        kinds: dict[str, str] = {}
        families: dict[tuple[str, str], Family] = {}
        merged: dict[tuple[str, str], dict[tuple[tuple[str, str], ...], tuple[dict[str, str], Any]]] = {}
        for (name, kind), each in self._declared.items():
            if name not in taken and kinds.setdefault(name, kind) == kind:
                families[name, kind] = torchserve_family(name, each.kind, each.unit)
        for model, metrics in self._models.items():
            for (name, kind), (unit, series) in metrics.items():
                if name in taken or kinds.setdefault(name, kind) != kind:
                    self._tell(model, f"{name} as a {kind.lower()}, but that is another metric's name; it is not shown")
                    continue
                if (name, kind) not in families:
                    families[name, kind] = torchserve_family(name, kind.lower(), unit)
                sums = merged.setdefault((name, kind), {})
                for labels, value in series.items():
                    same = tuple(sorted(dict(labels).items()))
                    shown, before = sums.get(same, (dict(labels), None))
                    sums[same] = shown, value if before is None else _together(kind, before, value)
        for key, family in families.items():
            for shown, value in merged.get(key, {}).values():
                named = {**shown, "Hostname": self._hostname}
                if key[1] == "HISTOGRAM":
                    add_histogram(family, named, HISTOGRAM_BOUNDS, *value)
                else:
                    family.add_sample(key[0], named, value)
        yield from families.values()


def _together(kind: str, one: Any, other: Any) -> Any:
    if kind == "COUNTER":
        return one + other
    if kind == "GAUGE":
        return other
    (counts, total), (more, further) = one, other
    return [[a + b for a, b in zip(counts, more, strict=True)], total + further]


def _metric_name(text: Any) -> str:
    return _identifier(str(text), allowed=":")


def _label(text: Any) -> str:
    return _identifier(str(text))


def _identifier(text: str, allowed: str = "") -> str:
    """What Prometheus takes for a name; other characters become ``_``.

    Raises:
        ValueError: nothing of it can be used.
    """
    name = "".join(each if each.isascii() and (each.isalnum() or each in "_" + allowed) else "_" for each in text)
    name = name[:TEXT_SIZE_MAX]
    if not name or name[0].isdigit():
        name = f"_{name}"
    if not name.strip("_"):
        raise ValueError("a name without letters")
    return name
