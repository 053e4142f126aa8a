"""The log files of a server process, in ``$LOG_LOCATION`` (``./logs``), named and written as TorchServe's are.

    ts_log.log        records of the server
    model_log.log     what workers print
    access_log.log    answers
    ts_metrics.log    metrics, with metrics_mode=log; in ``$METRICS_LOCATION`` (``./logs``)
    model_metrics.log those of handlers; there too

A folder that cannot be written costs the files, and nothing else.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pyserve.config.config import Config
from pyserve.log import JsonFormatter, LineFormatter, ServerLogFormatter, is_model_output
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.log_files import FileHandler, LogWriter
from pyserve.telemetry.metric_log import MetricLog
from pyserve.telemetry.recent import RecentLog
from pyserve.telemetry.request_log import AnswerLog, NoLog, RequestLog

SERVER_FILE = "ts_log.log"
MODEL_FILE = "model_log.log"
FOLDER_DEFAULT = "logs"


class Logs(Protocol):
    """Where a server notes answers and metrics."""

    @property
    def access(self) -> Any:
        """Notes answers, by the methods of `AccessLog`."""

    @property
    def metrics(self) -> MetricLog | None:
        """Notes metrics; None for nowhere."""

    @property
    def recent(self) -> RecentLog | None:
        """Keeps the last records for the console, if there is one."""


class ServerLogs:
    """Opens the files, and has the log's records written there from now on.

    Args:
        console: told the lines of the access log, too, on another thread.

    Attributes:
        access: notes answers, wherever that is wanted.
        metrics: notes metrics, if the configuration wants that.
        recent: keeps the last records for the console, if there is one.
    """

    def __init__(
        self, config: Config, environ: Mapping[str, str] = os.environ, *, console: Callable[[str], None] | None = None
    ):
        as_json = config.log_format == "json"
        folder = Path(environ.get("LOG_LOCATION") or FOLDER_DEFAULT).absolute()
        metrics_folder = Path(environ.get("METRICS_LOCATION") or FOLDER_DEFAULT).absolute()
        self._writer = LogWriter()
        self._handlers: list[logging.Handler] = []
        self._add_handler(folder / SERVER_FILE, JsonFormatter() if as_json else ServerLogFormatter(), is_server_record)
        self._add_handler(folder / MODEL_FILE, JsonFormatter() if as_json else LineFormatter(), is_model_output)
        self.access: AnswerLog = NoLog()
        if config.access_log:
            self.access = AccessLog(self._writer, folder, as_json=as_json, console=console)
        if config.request_log:
            self.access = RequestLog(self.access)
        self.metrics = MetricLog(self._writer, metrics_folder, socket.gethostname(), is_on=writes_metrics(config),
                                 has_counters=metrics_mode(config) != "legacy")  # fmt: skip
        self.recent: RecentLog | None = None
        if config.has_console:
            self.recent = RecentLog()
            logging.getLogger().addHandler(self.recent)
            self._handlers.append(self.recent)
        self._writer.tell_unwritable()

    def _add_handler(self, path: Path, formatter: logging.Formatter, wanted: logging._FilterType) -> None:
        handler = FileHandler(self._writer.open(path), self._writer)
        handler.setFormatter(formatter)
        handler.addFilter(wanted)
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def close(self) -> None:
        """Writes what is left. Not on the event loop."""
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
        self._writer.close()


def is_server_record(record: logging.LogRecord) -> bool:
    """Whether it is none of a worker's."""
    return not is_model_output(record)


def metrics_mode(config: Config) -> str:
    """``prometheus``, ``log`` or ``legacy``."""
    return config.metrics_mode or ("log" if config.compat == "strict" else "prometheus")


def writes_metrics(config: Config) -> bool:
    """Whether metrics go to files too."""
    return metrics_mode(config) != "prometheus"
