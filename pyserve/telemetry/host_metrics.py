"""TorchServe's metrics that are about the whole server: gauges with the last value, and their lines in the log files.

Loop thread only.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.metrics_core import Metric

from pyserve.telemetry.exposition import torchserve_family
from pyserve.telemetry.metric_log import MetricLog
from pyserve.telemetry.metrics_config import SERVER_METRICS, MetricsConfig

FILL_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class HostMetrics:
    """The last values.

    Args:
        config: names, units and labels.
        log: where values are noted too.
        is_strict: what ``config`` does not declare is not shown.
    """

    def __init__(self, hostname: str, config: MetricsConfig, log: MetricLog | None, *, is_strict: bool):
        self.hostname = hostname
        self.log = log if log is not None and log.is_on else None
        self._config = config
        self._is_strict = is_strict
        self._gauges: dict[str, dict[tuple[str, ...], float]] = {}

    def family(self, name: str) -> Metric | None:
        """Without samples; None if it is not to be shown."""
        declared = self._config.server.get(name)
        if declared is None and self._is_strict:
            return None
        built_in = SERVER_METRICS[name]
        return torchserve_family(name, built_in.kind, declared.unit if declared else built_in.unit)

    def labels(self, name: str, values: Sequence[str]) -> dict[str, str]:
        """The names are by position what is declared."""
        declared = self._config.server.get(name) or SERVER_METRICS[name]
        return dict(zip(declared.dimensions, values, strict=True))

    def set(self, name: str, value: float, *labels: str) -> None:
        """A gauge's value; ``labels`` are those before ``Level`` and ``Hostname``."""
        values = (*labels, "Host", self.hostname)
        self._gauges.setdefault(name, {})[values] = value
        self.note(name, value, values)

    def show(self, name: str, value: float) -> None:
        """As `set`, without a line: it was noted when it came."""
        self._gauges.setdefault(name, {})["Host", self.hostname] = value

    def set_gpu(self, name: str, value: float, index: int) -> None:
        values = ("Host", str(index), self.hostname)
        self._gauges.setdefault(name, {})[values] = value
        self.note(name, value, values)

    def note(self, name: str, value: float, labels: Sequence[str]) -> None:
        """Writes a line, if lines are written."""
        if self.log is not None and not (self._is_strict and name not in self._config.server):
            declared = self._config.server.get(name) or SERVER_METRICS[name]
            self.log.note(name, declared.unit, value, self.labels(name, labels))

    def load_times(self, times: dict[str, float]) -> None:
        """How long workers took to load, in ms, by their names; noted when new."""
        before = self._gauges.get("WorkerLoadTime", {})
        known = {key: value for key, value in before.items() if key[0] in times}
        self._gauges["WorkerLoadTime"] = known
        for worker, value in times.items():
            if known.get((worker, "Host", self.hostname)) != value:
                self.set("WorkerLoadTime", value, worker)

    def collect(self) -> Iterator[Metric]:
        """The gauges."""
        for name, built_in in SERVER_METRICS.items():
            if built_in.kind != "gauge":
                continue
            family = self.family(name)
            if family is not None:
                for values, value in self._gauges.get(name, {}).items():
                    family.add_sample(name, self.labels(name, values), value)
                yield family


class BatchRecorder:
    """What is known of the batches of one version of a model: its last one, and how full they were.

    Attributes:
        fill_counts, fill_sum: of the batch fill ratio; one more count than FILL_BOUNDS.
        delivered_at: when the last batch was, ns; 0 before the first.
    """

    __slots__ = (
        "_host", "_is_native", "_model", "arrived_at", "delivered_at", "fill_counts", "fill_sum", "finished_at",
        "staged_at", "started_at",
    )  # fmt: skip

    def __init__(self, host: HostMetrics, model: str, *, is_native: bool):
        self._host = host
        self._model = model
        self._is_native = is_native
        self.arrived_at = self.started_at = self.staged_at = self.finished_at = self.delivered_at = 0
        self.fill_counts = [0] * (len(FILL_BOUNDS) + 1)
        self.fill_sum = 0.0

    def note(self, completion: Any, arrived_at: int, batch_size_max: int) -> None:
        """A batch was run; once per batch, also of the fastest models."""
        self.arrived_at = arrived_at
        self.started_at = completion.started_at
        self.staged_at = completion.staged_at
        self.finished_at = completion.finished_at
        self.delivered_at = time.monotonic_ns()
        ratio = min(1.0, completion.batch_size / batch_size_max)
        self.fill_counts[bisect_left(FILL_BOUNDS, ratio)] += 1
        self.fill_sum += ratio
        if self._host.log is not None:
            self._write()

    @property
    def queue_ms(self) -> int:
        return max(0, self.started_at - self.arrived_at) // 1_000_000

    @property
    def overhead_ms(self) -> int:
        """What the server did about the batch, beside the model's own time."""
        return max(0, self.staged_at - self.started_at + self.delivered_at - self.finished_at) // 1_000_000

    def model_times(self) -> list[dict[str, Any]]:
        """Of a native model, as its worker would report them; a worker process does so by itself."""
        if not self._is_native or not self.delivered_at:
            return []
        labels = {"ModelName": self._model, "Level": "Model"}
        times = {"HandlerTime": self.finished_at - self.staged_at, "PredictionTime": self.finished_at - self.started_at}
        return [
            {"name": name, "unit": "ms", "type": "GAUGE", "value": round(ns / 1e6, 2), "dimensions": labels}
            for name, ns in times.items()
        ]

    def _write(self) -> None:
        labels = ("Host", self._host.hostname)
        self._host.note("QueueTime", self.queue_ms, labels)
        self._host.note("WorkerThreadTime", self.overhead_ms, labels)
        log = self._host.log
        for each in self.model_times() if log is not None else ():
            assert log is not None
            log.note_model(each["name"], each["unit"], each["value"], each["dimensions"])
