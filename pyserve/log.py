"""Logging: one record is one line, and a log that cannot be written never hurts serving.

Records are ``2026-11-23T01:57:15,723 [INFO ] pyserve.server - text`` in local time. Line breaks inside a
record, a traceback's included, become indented continuation lines, so that no text from outside can pass for
a record of its own. A stream that is full, closed or not being read loses records instead of blocking; how
many were lost is logged at most once a minute, as soon as something can be written again. With ``log_format=json`` a
record is one JSON object on one line.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TextIO

from pyserve.errors import repr_of
from pyserve.visible import visible

LOSS_REPORT_INTERVAL_S = 60.0
_PIPE_ATOMIC_SIZE = 4096  # PIPE_BUF: what poll(2) promises to take without blocking
# What a record may say of itself beside its text, see `about`.
_FIELDS = ("model", "version", "worker", "request_id")


def about(*, request_id: str = "", model: str = "", version: str = "", worker: str = "") -> dict[str, str]:
    """What a record is about, to be given as ``extra``; ``worker`` is a name such as ``W-9000-m_1.0``."""
    return {
        name: value
        for name, value in (("request_id", request_id), ("model", model), ("version", version), ("worker", worker))
        if value
    }


@lru_cache(64)
def _second_text(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(second))


def time_text(at: float) -> str:
    """``2026-11-23T01:57:15,723``, local time."""
    second = int(at)
    return f"{_second_text(second)},{int((at - second) * 1000):03d}"


@lru_cache(64)
def _zone_text(second: int) -> str:
    return time.strftime("%z", time.localtime(second))


def clock_text(at: float) -> str:
    """``2026-11-23T01:57:15.723+01:00``, as RFC 3339 has it."""
    zone = _zone_text(int(at))
    return f"{time_text(at).replace(',', '.')}{zone[:3]}:{zone[3:]}"


class LineFormatter(logging.Formatter):
    """Formats a record as one line plus indented continuation lines."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            text = f"{text}\n{record.exc_text}"
        if record.stack_info:
            text = f"{text}\n{record.stack_info}"
        text = text.rstrip("\n").replace("\n", "\n    ")
        source = self.source(record).replace("\n", " ")
        return visible(f"{time_text(record.created)} [{record.levelname:<5}] {source} - {text}")

    def source(self, record: logging.LogRecord) -> str:
        """Who says it; of what workers print, as TorchServe has it."""
        if is_model_output(record):
            return f"{getattr(record, 'worker', '')}-{getattr(record, 'stream', '')} MODEL_LOG"
        return record.name


class ServerLogFormatter(LineFormatter):
    """The lines of ``ts_log.log``: with the thread, or the worker that a record is about, before the logger."""

    def source(self, record: logging.LogRecord) -> str:
        return f"{getattr(record, 'worker', '') or record.threadName} {record.name}"


class JsonFormatter(logging.Formatter):
    """One JSON object per record and line: time, level, logger, message, and what `about` says."""

    def format(self, record: logging.LogRecord) -> str:
        members: dict[str, str] = {
            "time": clock_text(record.created),
            "level": "WARN" if record.levelname == "WARNING" else record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        members |= {name: str(value) for name in _FIELDS if (value := getattr(record, name, ""))}
        if is_model_output(record):
            members["stream"] = str(getattr(record, "stream", ""))
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            members["traceback"] = record.exc_text
        if record.stack_info:
            members["stack"] = record.stack_info
        return json.dumps(members)


def is_model_output(record: logging.LogRecord) -> bool:
    """Whether a worker has printed it."""
    return bool(getattr(record, "stream", ""))


class LossyHandler(logging.Handler):
    """Writes to a stream without ever raising or waiting. Any thread."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self.stream = stream
        self.clock = clock
        self.lost_count = 0
        self._lost_reason = ""
        self._reported_at = -LOSS_REPORT_INTERVAL_S
        self._fd = _descriptor(stream)
        self._may_block = self._fd is not None and not stat.S_ISREG(os.fstat(self._fd).st_mode)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception as error:  # a record whose arguments do not fit its text is the caller's mistake
            line = f"{record.name}: log record {repr_of(record.msg)} cannot be formatted: {repr_of(error)}"
            line = visible(line.replace("\n", " ")) + "\n"
        reports_loss = self.lost_count > 0 and self.clock() - self._reported_at >= LOSS_REPORT_INTERVAL_S
        if reports_loss:
            line = f"{self._loss_report()}\n{line}"
        try:
            self._write(line)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost_count += 1
            self._lost_reason = getattr(error, "strerror", None) or str(error)
            return
        if reports_loss:
            self.lost_count = 0
            self._reported_at = self.clock()

    def write_lines(self, text: str) -> None:
        """Complete lines that were made elsewhere."""
        self.acquire()
        try:
            while text:
                end = len(text)
                if end > _PIPE_ATOMIC_SIZE:  # where another process writes to the same pipe, no line is torn
                    end = text.rfind("\n", 0, _PIPE_ATOMIC_SIZE) + 1 or text.find("\n") + 1 or end
                try:
                    self._write(text[:end])
                except (OSError, ValueError) as error:
                    self.lost_count += text.count("\n", 0, end)
                    self._lost_reason = getattr(error, "strerror", None) or str(error)
                text = text[end:]
        finally:
            self.release()

    def _loss_report(self) -> str:
        report = logging.LogRecord(
            "pyserve.log",
            logging.WARNING,
            "",
            0,
            "%d log records were lost: %s",
            (self.lost_count, self._lost_reason),
            None,
        )
        return self.format(report)

    def _write(self, line: str) -> None:
        if self._fd is None:
            self.stream.write(line)
            self.stream.flush()
            return
        rest = memoryview(line.encode("utf-8", "backslashreplace"))
        while rest:
            if self._may_block and not _is_writable(self._fd):
                raise BlockingIOError(errno.EAGAIN, "nobody reads the log")
            rest = rest[os.write(self._fd, rest[:_PIPE_ATOMIC_SIZE] if self._may_block else rest) :]


def configure(
    level: int | str = logging.INFO, stream: TextIO | None = None, *, as_json: bool = False
) -> LossyHandler:  # fmt: skip
    """Send all records from ``level`` up to ``stream`` (stderr by default), replacing what was configured.

    ``as_json``: as one JSON object per line. Returns what writes them.
    """
    handler = LossyHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.addLevelName(logging.WARNING, "WARN")
    logging.captureWarnings(True)
    return handler


def print_lines_at_once() -> None:
    """What this process prints is written line by line, as to a terminal.

    Into a pipe Python writes 8 KB at a time: a handler's ``print`` would be in the log long after its request, and
    never if the process is killed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # there may be none
        sys.stdout.reconfigure(line_buffering=True)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _is_writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
