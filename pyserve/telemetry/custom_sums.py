"""What handlers' metrics come to: the server's sums of what all workers report, for its endpoint and its log.

Reports come from processes that run anybody's code: what is no metric is dropped, and there is a bound on how many.
"""

from __future__ import annotations

import logging
import math
import socket
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from prometheus_client.metrics_core import Metric as Family

from pyserve.telemetry.custom_metrics import VALUES_MAX, MetricTypes
from pyserve.telemetry.exposition import add_histogram, torchserve_family
from pyserve.telemetry.metric_log import MetricLog
from pyserve.telemetry.metrics_config import MODEL_METRICS, Declared

log = logging.getLogger(__name__)

HISTOGRAM_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
# Of one model; a worker process may be anybody's code.
NAMES_MAX = 200
SERIES_MAX = 1000
TEXT_SIZE_MAX = 200


class CustomMetrics:
    """The server's sums of what all workers report. Loop thread only.

    Args:
        declared: of metrics.yaml: their units, and what stands on the endpoint before the first value.
        drops_undeclared: others are not kept.
        log: where values are noted too.
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
        kind = MetricTypes[value["type"]].name
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
