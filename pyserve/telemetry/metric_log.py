"""Metrics as lines of log files, as TorchServe writes them with ``metrics_mode=log``.

    2026-11-23T01:57:16,182 - CPUUtilization.Percent:100.0|#Level:Host|#hostname:vm,timestamp:1795399036

Noting a value costs a tuple; lines are made by the thread that writes them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyserve.log import time_text
from pyserve.telemetry.exposition import number_text
from pyserve.telemetry.log_files import LogWriter

TS_FILE = "ts_metrics.log"
MODEL_FILE = "model_metrics.log"
_HOST_NAMES = ("Hostname", "hostname")  # it stands at the end of a line


class MetricLog:
    """The two files. Loop thread only.

    Args:
        folder: of the files.
        is_on: whether anything is written; else the files are made, and stay empty.
    """

    def __init__(self, writer: LogWriter, folder: Path, hostname: str, *, is_on: bool):
        self.is_on = is_on
        self._hostname = hostname
        self._ts = writer.open(folder / TS_FILE, self._lines)
        self._model = writer.open(folder / MODEL_FILE, self._lines)

    def note(self, name: str, unit: str, value: float, labels: Mapping[str, str]) -> None:
        """A value of a metric of the server."""
        if self.is_on:
            self._ts.put((time.time(), name, unit, value, labels, ""))

    def note_model(self, name: str, unit: str, value: float, labels: Mapping[str, str], request_ids: str = "") -> None:
        """A value of a model's metric, emitted for these requests, joined by commas."""
        if self.is_on:
            self._model.put((time.time(), name, unit, value, labels, request_ids))

    def _lines(self, entries: list[Any]) -> str:
        lines = []
        for at, name, unit, value, labels, request_ids in entries:
            dimensions = ",".join(f"{key}:{text}" for key, text in labels.items() if key not in _HOST_NAMES)
            ids = f"requestID:{request_ids}," if request_ids else ""
            line = (
                f"{time_text(at)} - {name}.{unit}:{number_text(value)}|#{dimensions}|"
                f"#hostname:{self._hostname},{ids}timestamp:{int(at)}"
            )
            lines.append("".join(each if each.isprintable() else "?" for each in line) + "\n")
        return "".join(lines)
