"""Metrics as lines of log files, as TorchServe writes them with ``metrics_mode=log``.

    2026-11-23T01:57:16,182 - CPUUtilization.Percent:100.0|#Level:Host|#hostname:vm,timestamp:1795399036

Noting a value, or a whole request, costs a tuple; lines are made by the thread that writes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyserve.log import time_text
from pyserve.telemetry.exposition import number_text
from pyserve.telemetry.log_files import LogWriter

TS_FILE = "ts_metrics.log"
MODEL_FILE = "model_metrics.log"
_HOST_NAMES = ("Hostname", "hostname")  # it stands at the end of a line


class LineForm(NamedTuple):
    """A line about one metric, but for its time and value."""

    before: str
    after: str

    def line(self, at: float, value: float) -> str:
        return f"{time_text(at)}{self.before}{number_text(value)}{self.after}{int(at)}\n"


def line_form(name: str, unit: str, labels: Mapping[str, str], hostname: str, request_ids: str = "") -> LineForm:
    """Of the values of a metric under ``labels``."""
    dimensions = ",".join(f"{key}:{text}" for key, text in labels.items() if key not in _HOST_NAMES)
    ids = f"requestID:{request_ids}," if request_ids else ""
    parts = f" - {name}.{unit}:", f"|#{dimensions}|#hostname:{hostname},{ids}timestamp:"
    return LineForm(*map(_printable, parts))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)


class MetricLog:
    """The two files. Loop thread only.

    Args:
        folder: of the files.
        is_on: whether anything is written; else the files are made, and stay empty.
        has_counters: whether TorchServe's three counters of requests are written; in ``legacy`` they are not.
    """

    def __init__(
        self, writer: LogWriter, folder: Path, hostname: str, *, is_on: bool, has_counters: bool = True
    ):  # fmt: skip
        self.is_on = is_on
        self.has_counters = has_counters
        self.hostname = hostname
        self._ts = writer.open(folder / TS_FILE, _lines)
        self._model = writer.open(folder / MODEL_FILE, _lines)

    def note(self, name: str, unit: str, value: float, labels: Mapping[str, str]) -> None:
        """A value of a metric of the server."""
        if self.is_on:
            self._ts.put((time.time(), self._value_line, name, unit, value, labels, ""))

    def note_model(self, name: str, unit: str, value: float, labels: Mapping[str, str], request_ids: str = "") -> None:
        """A value of a model's metric, emitted for these requests, joined by commas."""
        if self.is_on:
            self._model.put((time.time(), self._value_line, name, unit, value, labels, request_ids))

    def note_lines(self, make: Callable[..., str], *values: Any) -> None:
        """Lines about the server that ``make`` makes of the time now and ``values``, in the writer's thread."""
        if self.is_on:
            self._ts.put((time.time(), make, *values))

    def note_model_lines(self, make: Callable[..., str], *values: Any) -> None:
        """As `note_lines`, of a model's metrics."""
        if self.is_on:
            self._model.put((time.time(), make, *values))

    def _value_line(  # noqa: PLR0917
        self, at: float, name: str, unit: str, value: float, labels: Mapping[str, str], ids: str
    ) -> str:
        return line_form(name, unit, labels, self.hostname, ids).line(at, value)


def _lines(entries: list[Any]) -> str:
    return "".join(make(at, *values) for at, make, *values in entries)
