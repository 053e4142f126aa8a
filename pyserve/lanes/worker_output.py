"""What a worker process prints becomes records of the log: a line each, a traceback in one, and never too much.

`OutputReader` takes bytes as they come from a pipe; whoever owns the pipe feeds it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from pyserve.errors import JsonObject

READ_SIZE = 1 << 16
LINE_SIZE_MAX = 16 << 10
# In one second; the rest of it is counted and dropped.
LINES_MAX = 1000
BYTES_MAX = 1 << 20
TRACEBACK_START = "Traceback (most recent call last):"
TRACEBACK_LINES_MAX = 500

# [METRICS]name.Unit:value|#key:value,...|#type:GAUGE|#hostname:h,time[,request ids]
_METRIC = re.compile(
    r"\[METRICS\](?P<name>.+)\.(?P<unit>[^.:|]*):(?P<value>[-+0-9.eE]+)\|#(?P<dimensions>[^|]*)\|#type:(?P<type>[A-Z]+)"
    r"\|#hostname:(?P<rest>.*)"
)


class OutputReader:
    """One stream of one worker.

    Args:
        log: where lines go.
        level: of lines; tracebacks are errors.
        on_metric: told of ``[METRICS]`` lines.
        about: what its records are about, see `log.about`.
        clock: seconds, monotonic.
    """

    def __init__(
        self, log: logging.Logger, level: int, on_metric: Callable[[JsonObject], None],
        clock: Callable[[], float] = time.monotonic, about: dict[str, str] | None = None,
    ):  # fmt: skip
        self._about = about or {}
        self._log = log
        self._level = level
        self._on_metric = on_metric
        self._clock = clock
        self._rest = b""
        self._is_cut = False  # the rest of the line is being thrown away
        self._traceback: list[str] = []
        self._second = -1.0
        self._lines = self._bytes = self._dropped = 0

    def feed(self, chunk: bytes) -> None:
        """Bytes that were printed."""
        self._count(chunk)
        if self._bytes > BYTES_MAX:
            self._drop(chunk)
            return
        *lines, rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if self._is_cut:
                self._is_cut = False
                continue
            self._take(line)
        if len(rest) > LINE_SIZE_MAX:
            if not self._is_cut:
                self._take(rest)
            self._is_cut = True
            rest = b""
        self._rest = b"" if self._is_cut else rest

    def close(self) -> None:
        """The stream has ended."""
        if self._rest:
            self._take(self._rest)
            self._rest = b""
        self._end_traceback()
        self._tell_dropped()

    def _count(self, chunk: bytes) -> None:
        second = self._clock() // 1
        if second != self._second:
            self._second = second
            self._tell_dropped()
            self._lines = self._bytes = 0
        self._bytes += len(chunk)

    def _drop(self, chunk: bytes) -> None:
        self._dropped += chunk.count(b"\n") or 1
        self._is_cut = not chunk.endswith(b"\n")
        self._rest = b""

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._log.warning("%d lines of its output were dropped: more than %d lines or %d bytes in a second",
                              self._dropped, LINES_MAX, BYTES_MAX, extra=self._about)  # fmt: skip
            self._dropped = 0

    def _take(self, raw: bytes) -> None:
        cut = len(raw) > LINE_SIZE_MAX
        line = raw[:LINE_SIZE_MAX].decode("utf-8", "backslashreplace").rstrip("\r")
        if cut:
            line += f" ... (cut at {LINE_SIZE_MAX} bytes)"
        if self._traceback:
            self._traceback.append(line)
            if (line and not line[0].isspace()) or len(self._traceback) >= TRACEBACK_LINES_MAX:
                self._end_traceback()
            return
        if line.startswith(TRACEBACK_START):
            self._traceback.append(line)
            return
        metric = parse_metric(line) if line.startswith("[METRICS]") else None
        if metric is not None:
            self._on_metric(metric)
        elif line.strip():
            self._say(self._level, line)

    def _end_traceback(self) -> None:
        lines, self._traceback = self._traceback, []
        if lines:
            self._say(logging.ERROR, "\n".join(lines))

    def _say(self, level: int, text: str) -> None:
        self._lines += 1
        if self._lines > LINES_MAX:
            self._dropped += 1
        else:
            self._log.log(level, "%s", text, extra=self._about)


def parse_metric(line: str) -> JsonObject | None:
    """A ``[METRICS]`` line as a value of a metrics report; None if it is none."""
    match = _METRIC.fullmatch(line.strip())
    if match is None:
        return None
    try:
        value = float(match["value"])
    except ValueError:
        return None
    pairs = (pair.partition(":") for pair in match["dimensions"].split(",") if pair)
    return {
        "name": match["name"],
        "unit": match["unit"],
        "value": value,
        "type": match["type"],
        "dimensions": {key: text for key, _, text in pairs},
        "request_id": None,
    }
