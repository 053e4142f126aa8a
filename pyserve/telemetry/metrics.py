"""Counters of what was served, and ``/metrics`` in Prometheus' text format.

Recording is a few integer additions per request, on the event loop; everything else happens at scrape time, from
these numbers and from each model's own ``stats()``. Series exist only for models that are registered: a name that
somebody asks for in vain makes none, and those of an unregistered model go with it. A model that is registered again
starts from 0, which Prometheus takes for a restart.

Names are of two kinds: TorchServe's, with its labels and units, and ``pyserve_*`` after Prometheus' own rules.
"""

from __future__ import annotations

import socket
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Protocol

from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pyserve import __version__
from pyserve.errors import JsonObject
from pyserve.request.messages import Request, Response
from pyserve.telemetry.audit_families import audit_families
from pyserve.telemetry.custom_sums import CustomMetrics
from pyserve.telemetry.device_metrics import DeviceMemory, engine_families, memory_family
from pyserve.telemetry.exposition import CONTENT_TYPE, add_histogram, render
from pyserve.telemetry.host_metrics import FILL_BOUNDS, BatchRecorder, HostMetrics
from pyserve.telemetry.load_gauges import LoadGauges, load_families, serving
from pyserve.telemetry.metric_log import MetricLog
from pyserve.telemetry.metrics_config import MetricsConfig
from pyserve.telemetry.request_lines import CLASS_NAMES, TORCHSERVE_NAMES, AnswerLines, RequestLines

REQUEST_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip

# Key of ``stats()`` -> (metric, what it says).
_HISTOGRAMS = {
    "preprocess": ("pyserve_preprocess_duration_seconds", "Time a request's body took to become an input."),
    "queue": ("pyserve_queue_duration_seconds", "Time a request waited for a worker."),
    "staging": ("pyserve_staging_duration_seconds", "Time to gather a batch and copy it to the device."),
    "inference": ("pyserve_inference_duration_seconds", "Time a batch ran in the model."),
    "postprocess": ("pyserve_postprocess_duration_seconds", "Time the handler took to turn an output into answers."),
    "batch_size": ("pyserve_batch_size", "Requests in a batch."),
}
_COUNTERS = {
    "submitted": ("pyserve_submitted", "Requests that entered the queue."),
    "batches": ("pyserve_batches", "Batches run."),
    "failed": ("pyserve_failed", "Requests whose own run failed."),
    "expired": ("pyserve_expired", "Requests dropped from the queue because their time had passed."),
    "cancelled": ("pyserve_cancelled", "Requests whose client went away before the answer."),
    "retried_singly": ("pyserve_retried_singly", "Requests run alone because their batch had failed."),
    "interrupted": ("pyserve_batches_interrupted", "Runs of the network that were ended because they took too long."),
    "lost": ("pyserve_workers_lost", "Workers given up because their batch did not come to an end."),
    "staging_fallback": ("pyserve_staging_fallback", "Batches too large for the staging buffer."),
}
_GAUGES = {
    "queue_size": ("pyserve_queue_size", "Requests that wait."),
    "running": ("pyserve_batches_running", "Batches that run."),
    "stuck": ("pyserve_workers_stuck", "Workers that were given up and still run."),
}


class Worker(Protocol):
    """What a scrape reads of a worker."""

    status: str


class MeasuredModel(Protocol):
    """What a scrape reads of a model."""

    name: str
    version: str

    @property
    def lane(self) -> str:
        """``native`` or ``python``."""

    @property
    def native_devices(self) -> Sequence[str]:
        """Accelerators that it runs on in this process; none on a CPU, or in worker processes."""

    @property
    def requests_in_flight(self) -> int:
        """Requests accepted and not answered yet."""

    def worker_rows(self) -> Sequence[Worker]:
        """The workers."""

    def worker_load_ms(self) -> dict[str, float]:
        """How long the workers took to load, by their names."""

    def stats(self) -> JsonObject:
        """Counters, and histograms as (bounds, counts that are not cumulative, sum); empty while none are kept."""

    def audit_report(self) -> JsonObject | None:
        """``requests``, ``differences`` and ``skipped`` by reason, of a model that is audited."""


@dataclass(frozen=True)
class MetricsOptions:
    """What the configuration says of metrics.

    Attributes:
        mode: ``prometheus``, ``log`` or ``legacy``.
        is_strict: ``compat=strict``: the mode rules what the endpoint shows, and only what is declared is kept.
        takes_undeclared: of handlers, all the same.
    """

    config: MetricsConfig = field(default_factory=MetricsConfig)
    mode: str = "prometheus"
    is_strict: bool = False
    takes_undeclared: bool = False


class _Series:
    """What is recorded of one version of a model."""

    __slots__ = ("aborted", "counts", "duration_sum_s", "failed_sum_s", "statuses")

    def __init__(self) -> None:
        self.aborted = 0
        self.statuses: dict[int, int] = {}
        self.counts = [0] * (len(REQUEST_BOUNDS_S) + 1)
        self.duration_sum_s = 0.0
        self.failed_sum_s = 0.0  # the part of it that is of errors


def _class_of(status: int) -> int:
    # All that is neither 2xx nor 4xx counts as 5XX, as in TorchServe.
    return 0 if 200 <= status < 300 else 1 if 400 <= status < 500 else 2


class RequestRecorder:
    """Counts the requests of one version under one name."""

    __slots__ = ("_classes", "_lines", "_series", "_sums")

    def __init__(self, series: _Series, sums: list[float], classes: list[int], lines: RequestLines | None):
        self._series = series
        self._sums = sums
        self._classes = classes
        self._lines = lines

    def observe(
        self, status: int, duration_s: float, queue_s: float, *, is_error: bool = False, is_http: bool = True
    ) -> None:
        """As `Metrics.observe_request`.

        Args:
            is_error: no handler has answered it.
            is_http: it came over HTTP.
        """
        series, sums = self._series, self._sums
        series.statuses[status] = series.statuses.get(status, 0) + 1
        series.counts[bisect_left(REQUEST_BOUNDS_S, duration_s)] += 1
        series.duration_sum_s += duration_s
        if status >= 400:
            series.failed_sum_s += duration_s
        sums[0] += 1
        sums[1] += duration_s
        sums[2] += queue_s
        answer_class = _class_of(status)
        self._classes[answer_class] += 1
        if self._lines is not None:
            self._lines.note(answer_class, duration_s, queue_s, has_times=not is_error, is_http=is_http)

    def observe_many(self, counts: Sequence[int], count: int, duration_s: float, queue_s: float) -> None:
        """As `observe` of ``count`` answers with 200 that took ``duration_s`` together; no lines are written of them.

        Args:
            counts: of each bucket of REQUEST_BOUNDS_S.
        """
        series, sums = self._series, self._sums
        series.statuses[200] = series.statuses.get(200, 0) + count
        series.counts[:] = map(add, series.counts, counts)
        series.duration_sum_s += duration_s
        sums[0] += count
        sums[1] += duration_s
        sums[2] += queue_s
        self._classes[0] += count


class Metrics(Collector):
    """All metrics of one server. Loop thread only.

    Attributes:
        models: gives the registered models at scrape time.
        refused: one per listener, answers the HTTP protocol gave without asking the app, counted by status.
    """

    def __init__(
        self,
        models: Callable[[], Iterable[MeasuredModel]] = tuple,
        *,
        hostname: str | None = None,
        torch_version: str = "",
        options: MetricsOptions | None = None,
        log: MetricLog | None = None,
    ):
        # constant
        self._hostname = socket.gethostname() if hostname is None else hostname
        self._torch_version = torch_version
        self._process = ProcessCollector(registry=None)
        self._options = options = options or MetricsOptions()
        # per server
        self.host = HostMetrics(self._hostname, options.config, log, is_strict=options.is_strict)
        self.models = models
        self.refused: list[Counter[int]] = []
        self.more: list[Callable[[], Iterable[Metric]]] = []  # families of what counts for itself
        self._classes = [0, 0, 0]
        self._answer_lines = AnswerLines(self.host) if self.host.log is not None else None
        # per model
        self._series: dict[tuple[str, str], _Series] = {}
        # (model, version as in the URL) -> [requests, latency in s, queue time in s], TorchServe's three counters
        drops = options.is_strict and not options.takes_undeclared
        self._custom = CustomMetrics(options.config.model, drops_undeclared=drops, log=self.host.log)
        self._batches: dict[tuple[str, str], BatchRecorder] = {}
        self._memory = DeviceMemory()
        self._loads: dict[tuple[str, str], LoadGauges] = {}
        self._torchserve: dict[tuple[str, str], list[float]] = {}
        self._rejected: dict[tuple[str, str], int] = {}  # (model, reason) ->

    # recording

    def observe_request(
        self,
        model: str,
        version: str,
        status: int,
        duration_s: float,
        *,
        queue_s: float = 0.0,
        url_version: str = "default",
    ) -> None:
        """Counts a request for a registered model that was answered through ``exchange.respond``, refusals included.

        Args:
            status: HTTP status of the answer.
            duration_s: from arrival to answer.
            queue_s: from arrival until a worker took it; 0 if none did.
            url_version: the version as in the URL; ``default`` if it names none, which is TorchServe's label.
        """
        self.recorder(model, version, url_version).observe(status, duration_s, queue_s)

    def recorder(self, model: str, version: str, url_version: str = "default") -> RequestRecorder:
        """`observe_request` for many requests of one model, which may not outlive its registration."""
        series = self._series.get((model, version)) or self._new_series(model, version)
        sums = self._torchserve.get((model, url_version)) or self._new_sums(model, url_version)
        return RequestRecorder(series, sums, self._classes, self._lines_of(model, url_version))

    def request_totals(self, model: str, version: str) -> tuple[JsonObject, JsonObject]:
        """Count and ns of the requests of a version that succeeded, and of those that failed."""
        series = self._series.get((model, version)) or _Series()
        failed = sum(count for status, count in series.statuses.items() if status >= 400)
        succeeded_s = series.duration_sum_s - series.failed_sum_s
        return (
            {"count": sum(series.statuses.values()) - failed, "ns": int(succeeded_s * 1e9)},
            {"count": failed, "ns": int(series.failed_sum_s * 1e9)},
        )

    def answered_totals(self) -> JsonObject:
        """Requests of all models that succeeded, and that failed, and their seconds."""
        failed = seconds = count = 0.0
        for series in self._series.values():
            seconds += series.duration_sum_s
            for status, number in series.statuses.items():
                count += number
                failed += number if status >= 400 else 0
        return {"succeeded": int(count - failed), "failed": int(failed), "seconds": seconds}

    def duration_histogram(self, model: str, version: str) -> tuple[list[int], float]:
        """Requests of a version in each of REQUEST_BOUNDS_S and above, and the sum in s."""
        series = self._series.get((model, version)) or _Series()
        return list(series.counts), series.duration_sum_s

    def observe_rejection(self, model: str, reason: str) -> None:
        """Counts why a request for a registered model was refused; ``observe_request`` counts its answer.

        ``reason`` is one of a few fixed texts, such as ``queue full``.
        """
        self._rejected[model, reason] = self._rejected.get((model, reason), 0) + 1

    def observe_abort(self, model: str, version: str, url_version: str = "default") -> None:
        """Counts a request whose client went away before the answer. TorchServe counts it when it comes."""
        series = self._series.get((model, version)) or self._new_series(model, version)
        series.aborted += 1
        sums = self._torchserve.get((model, url_version)) or self._new_sums(model, url_version)
        sums[0] += 1
        lines = self._lines_of(model, url_version)
        if lines is not None:
            lines.note_abort()

    def observe_load(self, worker: str, duration_ms: float) -> None:
        """A worker, called ``W-9000-densenet161_1.0``, takes requests now."""
        self.host.load_time(worker, duration_ms)

    def _lines_of(self, model: str, url_version: str) -> RequestLines | None:
        return RequestLines(self.host, model, url_version) if self.host.log is not None else None

    def batches(self, model: str, version: str, *, is_native: bool) -> BatchRecorder:
        """What the lane of a version reports of its batches."""
        key = (model, version)
        if key not in self._batches:
            self._batches[key] = BatchRecorder(self.host, model, is_native=is_native)
        return self._batches[key]

    def observe_answer(self, status: int, *, is_http: bool = True) -> None:
        """Counts an answer of any listener in ``Requests2XX``, ``4XX`` or ``5XX``."""
        answer_class = _class_of(status)
        self._classes[answer_class] += 1
        if is_http and self._answer_lines is not None:
            self._answer_lines.note(answer_class)

    def observe_custom(self, model: str, values: object) -> None:
        """Adds what a handler of ``model`` has emitted, as `CustomMetrics.observe` takes it."""
        self._custom.observe(model, values)

    def _new_series(self, model: str, version: str) -> _Series:
        return self._series.setdefault((model, version), _Series())

    def _new_sums(self, model: str, url_version: str) -> list[float]:
        return self._torchserve.setdefault((model, url_version), [0, 0.0, 0.0])

    # reading

    def scrape(self, request: Request) -> Response:
        """Answers ``/metrics``; each ``name[]`` of the query asks for the samples of that name."""
        names = [value for name, value in request.params if name == "name[]"]
        if self._options.is_strict and self._options.mode != "prometheus":
            families = self._torchserve_families() if self._options.mode == "legacy" else ()
            self._prune(list(self.models()))
            return Response(200, render(families, names), content_type=CONTENT_TYPE)
        return Response(200, self.render(names), content_type=CONTENT_TYPE)

    def render(self, names: Collection[str] = ()) -> bytes:
        """The text format, version 0.0.4: all samples, or those whose names are exactly one of ``names``."""
        return render(self.collect(), names)

    def collect(self) -> Iterator[Metric]:
        """All families, as prometheus_client has them."""
        models = list(self.models())
        self._prune(models)
        self.look(models)
        own = list(self._own_families(models))
        yield from own
        # A handler cannot take a name that is the server's: the text would not be valid with both.
        yield from self._custom.collect({name for each in own for name in (each.name, *_sample_names(each))})

    def _own_families(self, models: list[MeasuredModel]) -> Iterator[Metric]:
        yield from self._answer_families()
        yield from self._torchserve_families()
        yield from self._request_families()
        yield self._rejected_family()
        yield from _model_families(models)
        yield from self._device_families(models)
        yield from audit_families(models)
        yield from self._batch_families()
        yield from load_families(self.loads(models))
        for families in self.more:
            yield from families()
        yield from self.host.collect()
        build = Metric("pyserve_build_info", "Versions of the server and of torch; always 1.", "gauge")
        build.add_sample("pyserve_build_info", {"version": __version__, "torch": self._torch_version}, 1)
        yield build
        yield from self._process.collect()

    def look(self, models: Iterable[MeasuredModel]) -> None:
        """Takes over what models only report when they are asked."""
        self.host.load_times({name: ms for model in models for name, ms in model.worker_load_ms().items()})
        latest = max(self._batches.values(), key=lambda each: each.delivered_at, default=None)
        if latest is not None and latest.delivered_at:
            self.host.show("QueueTime", latest.queue_ms)
            self.host.show("WorkerThreadTime", latest.overhead_ms)
        for (model, _), batches in self._batches.items():
            self._custom.observe(model, batches.model_times(), is_noted=False)

    def _prune(self, models: list[MeasuredModel]) -> None:
        known = {(model.name, model.version) for model in models}
        names = {model.name for model in models}
        self._custom.keep(names)
        self._series = {key: series for key, series in self._series.items() if key in known}
        self._batches = {key: batches for key, batches in self._batches.items() if key in known}
        self._loads = {key: self._loads.get(key) or LoadGauges() for key in known}
        self._rejected = {key: count for key, count in self._rejected.items() if key[0] in names}
        self._torchserve = {
            key: sums
            for key, sums in self._torchserve.items()
            if key in known or (key[0] in names and key[1] == "default")
        }

    def _answer_families(self) -> Iterator[Metric]:
        for name, count in zip(CLASS_NAMES, self._classes, strict=True):
            answered = self.host.family(name)
            if answered is not None:
                answered.add_sample(name, self.host.labels(name, ("Host", self._hostname)), count)
                yield answered
        refused: Counter[int] = sum(self.refused, Counter())
        family = Metric("pyserve_http_refused", "Answers of the HTTP protocol itself to what is no request.", "counter")
        for status, count in sorted(refused.items()):
            family.add_sample("pyserve_http_refused_total", {"status": str(status)}, count)
        yield family

    def _torchserve_families(self) -> Iterator[Metric]:
        for index, name in enumerate(TORCHSERVE_NAMES):
            scale = 1 if index == 0 else 1e6  # TorchServe counts microseconds
            family = self.host.family(name)
            if family is None:
                continue
            for (model, version), sums in self._torchserve.items():
                labels = self.host.labels(name, (model, version, self._hostname))
                family.add_sample(name, labels, sums[index] * scale)
            yield family

    def _request_families(self) -> Iterator[Metric]:
        requests = Metric("pyserve_requests", "Requests answered.", "counter")
        aborted = Metric("pyserve_requests_aborted", "Requests whose client went away before the answer.", "counter")
        duration = Metric("pyserve_request_duration_seconds", "From a request's last byte to its answer.", "histogram")
        for (model, version), series in self._series.items():
            labels = {"model": model, "version": version}
            for status, count in sorted(series.statuses.items()):
                requests.add_sample("pyserve_requests_total", {**labels, "status": str(status)}, count)
            aborted.add_sample("pyserve_requests_aborted_total", labels, series.aborted)
            add_histogram(duration, labels, REQUEST_BOUNDS_S, series.counts, series.duration_sum_s)
        yield from (requests, aborted, duration)

    def _batch_families(self) -> Iterator[Metric]:
        fill = Metric("pyserve_batch_fill_ratio", "Requests in a batch beside how many it may have.", "histogram")
        for (model, version), batches in self._batches.items():
            add_histogram(
                fill, {"model": model, "version": version}, FILL_BOUNDS, batches.fill_counts, batches.fill_sum
            )
        yield fill

    def loads(self, models: Iterable[MeasuredModel]) -> Iterator[tuple[MeasuredModel, float, float]]:
        """Of each that serves: the busy share of its workers, 0..1, and how long a new request would wait, in s."""
        for model, stats, workers in serving(models):
            gauges = self._loads.setdefault((model.name, model.version), LoadGauges())
            yield model, *gauges.look(stats, workers)

    def refused_count(self, model: str) -> int:
        """Requests for a model that did not enter its queue."""
        return sum(count for (name, why), count in self._rejected.items() if name == model and why != "expired")

    def _device_families(self, models: list[MeasuredModel]) -> Iterator[Metric]:
        there = [model for model in models if model.native_devices]
        yield memory_family(self._memory.look(device for model in there for device in model.native_devices))
        yield from engine_families([
            ({"model": model.name, "version": model.version}, model.stats()) for model in there
        ])  # fmt: skip

    def _rejected_family(self) -> Metric:
        rejected = Metric("pyserve_requests_rejected", "Requests refused, by reason.", "counter")
        for (model, reason), count in sorted(self._rejected.items()):
            rejected.add_sample("pyserve_requests_rejected_total", {"model": model, "reason": reason}, count)
        return rejected


def _sample_names(family: Metric) -> Iterator[str]:
    return (sample.name for sample in family.samples)


def _model_families(models: Iterable[MeasuredModel]) -> Iterator[Metric]:
    rows = [({"model": model.name, "version": model.version}, model, model.stats()) for model in models]
    for key, (name, about) in _HISTOGRAMS.items():
        family = Metric(name, about, "histogram")
        for labels, _, stats in rows:
            if key in stats:
                add_histogram(family, labels, *stats[key])
        yield family
    for kind, suffix, table in (("counter", "_total", _COUNTERS), ("gauge", "", _GAUGES)):
        for key, (name, about) in table.items():
            family = Metric(name, about, kind)
            for labels, _, stats in rows:
                if key in stats:
                    family.add_sample(name + suffix, labels, stats[key])
            yield family
    in_flight = Metric("pyserve_requests_in_flight", "Requests accepted and not answered yet.", "gauge")
    workers = Metric("pyserve_workers", "Workers that are ready.", "gauge")
    for labels, model, _ in rows:
        in_flight.add_sample("pyserve_requests_in_flight", labels, model.requests_in_flight)
        ready = sum(1 for row in model.worker_rows() if row.status == "READY")
        workers.add_sample("pyserve_workers", {**labels, "lane": model.lane}, ready)
    yield from (in_flight, workers)
