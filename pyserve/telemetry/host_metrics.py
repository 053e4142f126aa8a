"""TorchServe's metrics that are about the whole server: gauges with the last value, and their lines in the log files.

Loop thread only.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client.metrics_core import Metric

from pyserve.telemetry.exposition import torchserve_family
from pyserve.telemetry.metric_log import LineForm, MetricLog, line_form
from pyserve.telemetry.metrics_config import SERVER_METRICS, MetricsConfig
from pyserve.telemetry.request_lines import MODEL_TIMES, TORCHSERVE_NAMES, ModelTimeLines

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
        self._thread_time = self.form("WorkerThreadTime", ("Host", hostname))

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

    def form(self, name: str, labels: Sequence[str]) -> LineForm | None:
        """The lines about a metric; None if none are written."""
        log = self.log
        if log is None or (self._is_strict and name not in self._config.server):
            return None
        if name in TORCHSERVE_NAMES and not log.has_counters:
            return None
        declared = self._config.server.get(name) or SERVER_METRICS[name]
        return line_form(name, declared.unit, self.labels(name, labels), log.hostname)

    def note(self, name: str, value: float, labels: Sequence[str]) -> None:
        """Writes a line, if lines are written."""
        form = self.form(name, labels)
        if form is not None:
            self.note_lines(form.line, value)

    def note_lines(self, make: Callable[..., str], *values: Any) -> None:
        """As `MetricLog.note_lines`. REQUIRES: lines are written."""
        assert self.log is not None
        self.log.note_lines(make, *values)

    def load_time(self, worker: str, value: float) -> None:
        """A worker was loaded, in so many ms. TorchServe's own thread has a line about that too."""
        self.set("WorkerLoadTime", value, worker)
        self.thread_time(0)

    def thread_time(self, value_ms: int) -> None:
        """Writes what the server did about a batch beside the model's own time, if lines are written."""
        if self._thread_time is not None:
            self.note_lines(self._thread_time.line, value_ms)

    def load_times(self, times: dict[str, float]) -> None:
        """How long the workers there are took to load, in ms, by their names."""
        host = ("Host", self.hostname)
        self._gauges["WorkerLoadTime"] = {(worker, *host): value for worker, value in times.items()}

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
        "_host", "_is_native", "_lines", "_model", "arrived_at", "delivered_at", "fill_counts", "fill_sum",
        "finished_at", "staged_at", "started_at",
    )  # fmt: skip

    def __init__(self, host: HostMetrics, model: str, *, is_native: bool):
        self._host = host
        self._model = model
        self._is_native = is_native
        self._lines = ModelTimeLines(host.log, model) if host.log is not None and is_native else None
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
        return [
            {"name": name, "unit": "ms", "type": "GAUGE", "value": value, "dimensions": labels}
            for name, value in zip(MODEL_TIMES, self._times_ms(), strict=True)
        ]

    def _times_ms(self) -> tuple[float, float]:
        handler_ns, prediction_ns = self.finished_at - self.staged_at, self.finished_at - self.started_at
        return round(handler_ns / 1e6, 2), round(prediction_ns / 1e6, 2)

    @property
    def is_noted(self) -> bool:
        """Whether lines are written of it."""
        return self._host.log is not None

    def note_thread_time(self, value_ms: int) -> None:
        """Writes the `overhead_ms` of a batch. To be called after its answers, as TorchServe does."""
        self._host.thread_time(value_ms)

    def note_model_times(self, request_ids: str) -> None:
        """Writes what a native model took for the last batch, which had these requests, joined by commas."""
        if self._lines is not None:
            self._lines.note(self._times_ms(), request_ids)
