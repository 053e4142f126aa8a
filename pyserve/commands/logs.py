"""``pyserve logs``: the log of the running server, or of the last one, as it grows if that is asked for."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyserve.commands.start import LOG_FILE
from pyserve.errors import ConfigError, shown
from pyserve.server import pid_file

LINES_DEFAULT = 50
POLL_S = 0.25
# Of a server in the foreground, which has no file for what it prints.
_OTHERS = ("ts_log.log", "model_log.log")
_RECORD = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d|\{"
)  # the rest of a record, such as a traceback, begins otherwise
_READ_SIZE_MAX = 16 << 20


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="only records that name it")
    add("-f", "--follow", action="store_true", help="print what comes, until Ctrl-C")
    add("-n", "--lines", type=_count, default=LINES_DEFAULT, metavar="N", help="from the end (default %(default)s)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


def logs_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Prints the end of the log. Exit code 0.

    Raises:
        ConfigError: there is none.
    """
    path = _log_file(pid_path)
    wanted = _Wanted(parsed.model)
    lines = deque(filter(wanted, _last_lines(path)), maxlen=parsed.lines)
    for line in lines:
        print(line)
    if parsed.model and not lines and parsed.lines:
        print(f"pyserve: note: nothing in {path} is of a model called {shown(parsed.model)}", file=sys.stderr)
    if parsed.follow:
        for line in filter(wanted, _following(path)):
            print(line, flush=True)
    return 0


def _log_file(pid_path: Path) -> Path:
    running = pid_file.read(pid_path)
    if running is not None and running.log_file:
        return Path(running.log_file)
    folder = Path(os.environ.get("LOG_LOCATION") or "logs")
    found = [folder / name for name in (LOG_FILE, *_OTHERS) if (folder / name).is_file()]
    if running is not None:  # in the foreground
        found = [path for path in found if path.name != LOG_FILE] or found
    if not found:
        raise ConfigError(f"there is no log: no server is running, and {folder.absolute()} has none; one that runs in "
                          "the foreground logs to its terminal")  # fmt: skip
    return found[0]


class _Wanted:
    """Whether a line belongs to a record that names the model; the lines after a record's first follow it."""

    def __init__(self, model: str | None):
        self._name = re.compile(rf"(?<![\w.]){re.escape(model)}(?![\w])|-{re.escape(model)}_") if model else None
        self._is_in = False

    def __call__(self, line: str) -> bool:
        if self._name is None:
            return True
        if _RECORD.match(line):
            self._is_in = self._name.search(line) is not None
        return self._is_in


def _last_lines(path: Path) -> Iterable[str]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _READ_SIZE_MAX))
        lines = file.read(_READ_SIZE_MAX).decode(errors="replace").splitlines()
    return lines[1:] if size > _READ_SIZE_MAX else lines  # the first one is cut


def _following(path: Path) -> Iterator[str]:
    """Lines that are added from now on, also to a file that takes this one's place."""
    file = open(path, "rb")  # noqa: SIM115
    file.seek(0, os.SEEK_END)
    rest = b""
    try:
        while True:
            rest += file.read(_READ_SIZE_MAX)
            *whole, rest = rest.split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
            if whole:
                continue
            time.sleep(POLL_S)
            try:
                is_other = os.stat(path).st_ino != os.fstat(file.fileno()).st_ino
                if is_other or os.stat(path).st_size < file.tell():
                    file.close()
                    file, rest = open(path, "rb"), b""  # noqa: SIM115
            except FileNotFoundError:
                pass  # about to be made again
    finally:
        file.close()
