"""The lines that TorchServe writes of each request, of each other answer, and of each worker's start, in its order.

    ts_inference_requests_total                    of every request for a model that there is
    Requests2XX, Requests4XX or Requests5XX        of every answer over HTTP
    ts_inference_latency_microseconds              of what a handler has answered, whatever its status, over HTTP
    ts_queue_latency_microseconds                  the same
    QueueTime                                      of what a handler has answered

Errors have the first two only, calls of gRPC neither the second nor the times in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pyserve.log import time_text
from pyserve.telemetry.exposition import number_text
from pyserve.telemetry.metric_log import LineForm, MetricLog, line_form

CLASS_NAMES = ("Requests2XX", "Requests4XX", "Requests5XX")
TORCHSERVE_NAMES = (
    "ts_inference_requests_total", "ts_inference_latency_microseconds", "ts_queue_latency_microseconds",
)  # fmt: skip
MODEL_TIMES = ("HandlerTime", "PredictionTime")
_IDS = "(ids)"  # stands for them in a template


class LineWriter(Protocol):
    """What is needed of `HostMetrics`."""

    hostname: str

    def form(self, name: str, labels: Sequence[str]) -> LineForm | None:
        """The lines about a metric; None if none are written."""

    def note_lines(self, make: Callable[..., str], *values: Any) -> None:
        """Writes what ``make`` makes of the time and ``values``."""


class AnswerLines:
    """Of answers that no model gave."""

    def __init__(self, host: LineWriter):
        self._host = host
        self._classes = [host.form(name, ("Host", host.hostname)) for name in CLASS_NAMES]

    def note(self, answer_class: int) -> None:
        """``answer_class``: an index of CLASS_NAMES."""
        form = self._classes[answer_class]
        if form is not None:
            self._host.note_lines(form.line, 1)


class RequestLines:
    """Of the requests of one model under one version as in the URL."""

    def __init__(self, host: LineWriter, model: str, url_version: str):
        self._host = host
        here = ("Host", host.hostname)
        self._classes = [host.form(name, here) for name in CLASS_NAMES]
        self._counted, self._latency, self._queued = (
            host.form(name, (model, url_version, host.hostname)) for name in TORCHSERVE_NAMES
        )
        self._queue_time = host.form("QueueTime", here)
        self._templates: dict[tuple[int, bool, bool], str] = {}  # the writer's thread only

    def note(self, answer_class: int, duration_s: float, queue_s: float, *, has_times: bool, is_http: bool) -> None:
        """A request was answered.

        Args:
            answer_class: an index of CLASS_NAMES.
            has_times: it came to its handler, which answered it.
        """
        self._host.note_lines(self._text, answer_class, duration_s, queue_s, has_times, is_http)

    def note_abort(self) -> None:
        """Its client hung up."""
        if self._counted is not None:
            self._host.note_lines(self._counted.line, 1)

    def _text(  # noqa: PLR0917
        self, at: float, answer_class: int, duration_s: float, queue_s: float, has_times: bool, is_http: bool
    ) -> str:
        template = self._templates.get((answer_class, has_times, is_http))
        if template is None:
            template = self._template(answer_class, has_times, is_http)
            self._templates[answer_class, has_times, is_http] = template
        if not has_times:
            return template % {"at": time_text(at), "s": int(at)}
        return template % {
            "at": time_text(at), "s": int(at), "latency": number_text(round(duration_s * 1e6, 3)),
            "queued": number_text(round(queue_s * 1e6, 3)), "queue_ms": number_text(int(queue_s * 1e3)),
        }  # fmt: skip

    def _template(self, answer_class: int, has_times: bool, is_http: bool) -> str:
        """All lines of a request in one, for the ``%`` operator: made once, since it is used for every request."""
        forms: list[tuple[LineForm | None, str]] = [(self._counted, "1.0")]
        if is_http:
            forms.append((self._classes[answer_class], "1.0"))
        if has_times and is_http:
            forms += [(self._latency, "%(latency)s"), (self._queued, "%(queued)s")]
        if has_times:
            forms.append((self._queue_time, "%(queue_ms)s"))
        return "".join(
            f"%(at)s{_escaped(form.before)}{value}{_escaped(form.after)}%(s)d\n"
            for form, value in forms if form is not None
        )  # fmt: skip


class ModelTimeLines:
    """What a native model took for a batch, as a worker process of TorchServe notes it."""

    def __init__(self, log: MetricLog, model: str):
        self._log = log
        labels = {"ModelName": model, "Level": "Model"}
        forms = [line_form(name, "ms", labels, log.hostname, _IDS) for name in MODEL_TIMES]
        self._template = "".join(
            f"%s{_escaped(form.before)}%s{_escaped(form.after).replace(_IDS, '%s')}%d\n" for form in forms
        )

    def note(self, times_ms: Sequence[float], request_ids: str) -> None:
        """``times_ms``: of MODEL_TIMES; ``request_ids``: of the batch, joined by commas."""
        self._log.note_model_lines(self._text, *times_ms, request_ids)

    def _text(self, at: float, handler_ms: float, prediction_ms: float, ids: str) -> str:
        text, second = time_text(at), int(at)
        return self._template % (
            text, number_text(handler_ms), ids, second, text, number_text(prediction_ms), ids, second,
        )  # fmt: skip


def _escaped(text: str) -> str:
    """For the ``%`` operator."""
    return text.replace("%", "%%")
