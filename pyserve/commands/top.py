"""``pyserve top``: the models of the running server as they work: rates, queues, batches and latencies, live.

The figures are of the last seconds, from the server's own metrics; states are from its management address. Where the
output is no terminal, or with ``--once``, it is one table.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from pyserve.commands.client import Connection, local_address, management_key
from pyserve.commands.escaping import unescaped
from pyserve.commands.live_figures import NAMES, Figures, Reading, Version, figures, read_totals, total_of
from pyserve.commands.model_arguments import UsageError
from pyserve.commands.model_table import state_color
from pyserve.commands.status import row_of
from pyserve.commands.tables import Column, Row, cell, console_on, has_color, is_dumb, print_table, table_text
from pyserve.config.address import Address
from pyserve.errors import ConfigError, JsonObject
from pyserve.server import pid_file
from pyserve.visible import visible

INTERVAL_DEFAULT_S = 2.0
INTERVAL_MIN_S, INTERVAL_MAX_S = 0.2, 3600.0
# The figures are of this time, or of one interval if that is longer.
WINDOW_S = 10.0
ONCE_S = 1.0
# The longest answer that is read: that of some thousand models.
METRICS_SIZE_MAX = 64 << 20
# Above the table, with its own title, and below.
_HEAD_LINES = 6
SORTS = {"r": "req/s", "e": "err/s", "w": "queue", "l": "p99", "n": "name"}

COLUMNS = (
    Column("MODEL"), Column("VERSION", importance=3), Column("STATE", importance=4),
    Column("WORKERS", is_number=True, importance=2), Column("REQ/S", is_number=True),
    Column("ERR/S", is_number=True, importance=7), Column("QUEUE", is_number=True, importance=8),
    Column("BATCH", is_number=True, importance=6), Column("P50", is_number=True, importance=9),
    Column("P90", is_number=True, importance=1), Column("P99", is_number=True, importance=10),
    Column("BUSY", is_number=True, importance=5),
)  # fmt: skip
_STATE, _ERRORS = 2, 5


def add_top_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="only this one")
    add("--once", action="store_true", help="one table, and end; as where the output is no terminal")
    add(
        "--interval",
        type=float,
        metavar="S",
        default=INTERVAL_DEFAULT_S,
        help="between two looks (default %(default)g)",
    )
    add("--url", metavar="URL", help="of a server's metrics, such as http://host:8082; default: of the one that the "
        "pid file names, whose states are shown too")  # fmt: skip


def top_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Shows the table until q or Ctrl-C. Exit code 0.

    Raises:
        UsageError: a flag's value.
        ConfigError, TopError: there is no server, or it does not answer.
    """
    if not INTERVAL_MIN_S <= parsed.interval <= INTERVAL_MAX_S:
        raise UsageError(f"--interval must be from {INTERVAL_MIN_S:g} to {INTERVAL_MAX_S:g} s, not {parsed.interval:g}")
    watched = Watched(pid_path, parsed.url, parsed.model)
    if parsed.once or not unescaped(sys.stdout).isatty() or is_dumb():
        return _once(watched)
    try:
        _live(watched, parsed.interval)
    except KeyboardInterrupt:
        pass  # the usual way to end it
    return 0


class TopError(ConfigError):
    """The server gives no figures."""


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """The server, found anew for each look: one that was started again has another pid, and may have other ports."""

    pid_path: Path
    url: str | None
    model: str | None
    states: dict[Version, JsonObject] = field(default_factory=dict)

    def address(self) -> tuple[Address, pid_file.RunningServer | None]:
        """Of its metrics.

        Raises:
            ConfigError: there is none.
        """
        if self.url:
            try:
                return Address.parse(self.url, 8082), None
            except ValueError as error:
                raise UsageError(f"--url {self.url!r}: {error}") from None
        running = pid_file.read(self.pid_path)
        if running is None:
            raise ConfigError("no server is running here; start one with `pyserve start`, or name another with --url")
        if "metrics" not in running.addresses:
            raise ConfigError(f"the server (pid {running.pid}) has no metrics yet; it is starting")
        return local_address(running.addresses["metrics"]), running

    def look(self) -> Reading:
        """The totals now.

        Raises:
            ConfigError: there is no server, or it gives none.
        """
        address, _ = self.address()
        query = urlencode([("name[]", name) for name in NAMES])
        with contextlib.closing(Connection(address, checks_certificate=bool(self.url))) as connection:
            try:
                answer = connection.ask("GET", f"/metrics?{query}", size_max=METRICS_SIZE_MAX)
            except (OSError, http.client.HTTPException) as error:
                raise TopError(f"{address.client_url} does not answer: {_reason(error)}") from None
        if answer.status != 200:
            raise TopError(f"{address.client_url}/metrics answers {answer.text}; is that the metrics address?")
        try:
            versions = read_totals(answer.body.decode("utf-8", "replace"))
        except ValueError as error:
            raise TopError(f"{address.client_url}/metrics gives no metrics: {error}") from None
        if self.model is not None:
            versions = {key: totals for key, totals in versions.items() if key[0] == self.model}
        return Reading(time.monotonic(), versions)

    def look_at_states(self, names: list[str]) -> str:
        """Asks for the states of these models; why that could not be, or ``""``."""
        running = None if self.url else pid_file.read(self.pid_path)
        if running is None:
            return ""
        try:
            key = management_key(running.key_file)
            address = local_address(running.addresses["management"])
            with contextlib.closing(Connection(address, key)) as connection:
                for name in names:
                    answer = connection.ask("GET", f"/models/{quote(name, safe='')}/all")
                    if answer.status == 200:
                        self.states |= {(name, str(each.get("modelVersion"))): row_of(each, "") for each in answer.json}
                    elif answer.status != 404:  # it has just gone
                        return f"no states: {answer.text}"
        except (
            ConfigError,
            OSError,
            http.client.HTTPException,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            return f"no states: {_reason(error)}"
        return ""


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


# --- one table --------------------------------------------------------------------------------------------------------


def _once(watched: Watched) -> int:
    before = watched.look()
    _check_model(before, watched.model)
    time.sleep(ONCE_S)
    now = watched.look()
    trouble = watched.look_at_states(sorted({name for name, _ in now.versions}))
    passed_s = now.at - before.at
    found = {key: figures(before.versions.get(key), totals, passed_s) for key, totals in now.versions.items()}
    for key, totals in now.versions.items():
        if not found[key].requests:  # nothing came just now: of all its life, but for the rates
            ever = figures(None, totals, 0.0)
            found[key] = Figures(**{**vars(ever), "rate": 0.0, "error_rate": 0.0})
    print_table(COLUMNS, [_row(key, found[key], watched.states.get(key)) for key in _sorted(found, "n")])
    print(f"rates: of {passed_s:.1f} s; batches and latencies: of that time, or since the model was loaded where "
          "nothing came", file=sys.stderr)  # fmt: skip
    if trouble:
        print(f"pyserve: note: {trouble}", file=sys.stderr)
    return 0


def _check_model(reading: Reading, model: str | None) -> None:
    if model is not None and not reading.versions:
        raise ConfigError(f"no model called {model} is loaded; `pyserve status` lists them")


def _sorted(found: dict[Version, Figures], key: str) -> list[Version]:
    orders: dict[str, Callable[[Version], Any]] = {
        "r": lambda version: -found[version].rate,
        "e": lambda version: -found[version].error_rate,
        "w": lambda version: -found[version].now.queue,
        "l": lambda version: -(found[version].p99 or 0.0),
        "n": lambda version: 0,
    }
    return sorted(found, key=lambda version: (orders[key](version), version))


def _row(key: Version, each: Figures, described: JsonObject | None) -> Row:
    state = str((described or {}).get("state") or "-")
    workers = str((described or {}).get("workers") or each.now.workers)
    busy = "-" if each.now.utilization is None else f"{each.now.utilization:.0%}"
    cells = [cell(key[0]), cell(key[1]), cell(state), workers, _rate(each.rate), _rate(each.error_rate),
             str(each.now.queue), "-" if each.batch is None else f"{each.batch:.1f}", duration(each.p50),
             duration(each.p90), duration(each.p99), busy]  # fmt: skip
    return Row(cells, {_STATE: state_color(state)} | ({_ERRORS: "red"} if each.error_rate else {}))


def _rate(per_s: float) -> str:
    return f"{per_s:.1f}" if 0 < per_s < 99.95 else f"{per_s:.0f}"


def duration(seconds: float | None) -> str:
    """With its unit, in three digits."""
    if seconds is None:
        return "-"
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            value = seconds * scale
            return (
                f"{value:.0f} {unit}"
                if value >= 99.5
                else f"{value:.1f} {unit}"
                if value >= 9.95
                else f"{value:.2f} {unit}"
            )
    return f"{seconds * 1e6:.0f} us"


# --- live -------------------------------------------------------------------------------------------------------------


def _live(watched: Watched, interval_s: float) -> None:
    from rich.live import Live
    from rich.text import Text

    _check_model(watched.look(), watched.model)
    console = console_on(sys.stdout)
    view = View(watched)
    # A second screen, as less and htop have it: what stood in the terminal is there again afterwards.
    with _keys() as next_key, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic()
        while view.is_open:
            if time.monotonic() >= due:
                due = time.monotonic() + interval_s
                if not view.is_paused:
                    view.look(console.height)
            live.update(Text.from_ansi("\n".join(view.lines(console.width, console.height))), refresh=True)
            view.press(next_key(max(0.0, due - time.monotonic())))


class View:
    """What is on the screen.

    Attributes:
        is_open: until q is pressed.
    """

    def __init__(self, watched: Watched):
        self.is_open = True
        self.is_paused = False
        self._watched = watched
        self._readings: deque[Reading] = deque()
        self._found: dict[Version, Figures] = {}
        self._sort = "r"
        self._trouble = ""

    def look(self, height: int) -> None:
        """Asks the server. One that does not answer is asked again next time, and the last figures stay."""
        try:
            self._readings.append(self._watched.look())
        except ConfigError as error:
            self._trouble = str(error)
            return
        while len(self._readings) > 2 and self._readings[-1].at - self._readings[1].at >= WINDOW_S:
            self._readings.popleft()
        first, last = self._readings[0], self._readings[-1]
        self._found = {
            key: figures(first.versions.get(key), totals, last.at - first.at) if first is not last
            else figures(totals, totals, 0.0)
            for key, totals in last.versions.items()
        }  # fmt: skip
        self._trouble = self._watched.look_at_states(list(dict.fromkeys(name for name, _ in self._shown(height))))

    def press(self, key: str) -> None:
        """A key was pressed; ``""`` for none."""
        if key in ("q", "\x1b", "\x04"):
            self.is_open = False
        elif key in SORTS:
            self._sort = key
        elif key in ("p", " "):
            self.is_paused = not self.is_paused

    def lines(self, width: int, height: int) -> list[str]:
        """All of the screen; with escape sequences of colours alone."""
        keys = self._shown(height)
        rows = [_row(key, self._found[key], self._watched.states.get(key)) for key in keys]
        lines = [
            *self._head(),
            "",
            *table_text(COLUMNS, rows, width=width, colored=has_color(unescaped(sys.stdout))).split("\n"),
        ]
        if len(self._found) > len(keys):
            lines.append(f"and {len(self._found) - len(keys)} more")
        if not self._found and self._readings:
            lines.append("no model is loaded")
        return lines

    def _shown(self, height: int) -> list[Version]:
        return _sorted(self._found, self._sort)[: max(1, height - _HEAD_LINES)]

    def _head(self) -> list[str]:
        rate, error_rate, queue, in_flight = total_of(list(self._found.values()))
        passed_s = self._readings[-1].at - self._readings[0].at if self._readings else 0.0
        when = "paused" if self.is_paused else f"last {passed_s:.0f} s"
        sorts = "  ".join(f"[{key}] {name}" if key == self._sort else f"{key} {name}" for key, name in SORTS.items())
        return [
            f"{when}: {_rate(rate)} req/s, {_rate(error_rate)} err/s, {queue} waiting, {in_flight} in flight",
            f"q quit  p pause  sort: {sorts}",
            visible(" ".join(self._trouble.split())),
        ]


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits for a key, for so many seconds at most; ``""`` if none came. Keys are not shown."""
    if not sys.stdin.isatty():

        def no_key(timeout_s: float) -> str:
            time.sleep(timeout_s)
            return ""

        yield no_key
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def next_key(timeout_s: float) -> str:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        if not ready:
            return ""
        pressed = os.read(fd, 16)
        return pressed.decode("ascii", "replace") if pressed else "q"  # the terminal has gone

    try:
        tty.setcbreak(fd)  # Ctrl-C stays what it is
        yield next_key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
