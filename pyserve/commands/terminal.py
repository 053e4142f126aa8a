"""What a person at a terminal sees: the table of models, progress while they load, and the closing lines.

On a terminal progress is one changing line per model (rich); anywhere else it is plain lines, at most one a
second for each model, so that a log of a deployment stays readable.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from pyserve.errors import JsonObject
from pyserve.visible import visible

if TYPE_CHECKING:
    from rich.status import Status

COLUMNS = ("model", "version", "state", "workers", "device", "batch", "url")
PLAIN_INTERVAL_S = 1.0
READY_LINE = "Model server started."

_STATE_COLORS = {"READY": "32", "FAILED": "31"}
_STATE_COLOR_OTHER = "33"


class _Escaping:
    """A stream that writes control characters as `visible` has them."""

    def __init__(self, stream: TextIO):
        self.unescaped = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)

    def write(self, text: str) -> int:
        self.unescaped.write(visible(text.replace("\r\n", "\n")))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Meanwhile what is printed cannot control the terminal: most of it is, in part, what others have written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_escaping, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def unescaped_output() -> Iterator[None]:
    """Meanwhile what is printed goes out as it is: a handler's own progress bars, in its author's terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(unescaped, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _escaping(stream: Any) -> Any:
    return None if stream is None else _Escaping(stream)  # a process may have been started without


def unescaped(stream: TextIO) -> TextIO:
    """The stream itself, for what we have escaped and coloured."""
    return stream.unescaped if isinstance(stream, _Escaping) else stream


def table_lines(rows: Sequence[JsonObject], *, colored: bool = False) -> list[str]:
    """MODEL VERSION STATE WORKERS DEVICE BATCH URL, one line a row, failures with their reason beneath."""
    rows = [{**row, "version": row.get("shown") or row.get("version")} for row in rows]
    cells = [[name.upper() for name in COLUMNS]] + [[_cell(row.get(name)) for name in COLUMNS] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    lines = []
    for number, line in enumerate(cells):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        if colored and number:
            color = _STATE_COLORS.get(line[2], _STATE_COLOR_OTHER)
            padded[2] = f"\x1b[{color}m{padded[2]}\x1b[0m"
        lines.append("  ".join(padded).rstrip())
        if number and rows[number - 1].get("error"):
            lines += [f"    {visible(part)}" for part in str(rows[number - 1]["error"]).split("\n")]
    return lines


def _cell(value: object) -> str:
    text = "-" if value is None or value == "" else str(value)
    # Names come from archives: a terminal must not take them for escape sequences.
    return "".join(char if char.isprintable() else "?" for char in text)


def ready_lines(event: JsonObject, *, colored: bool = False) -> list[str]:
    """All that ``pyserve start`` prints once the server answers. The last line is a command to copy, if any."""
    rows = event.get("models", [])
    lines = table_lines(rows, colored=colored) if rows else ["no model is loaded"]
    not_loaded = event.get("not_loaded", [])
    if not_loaded:
        first = _cell(not_loaded[0])
        names = ", ".join(map(_cell, not_loaded))
        lines.append(
            f"found in model store, not loaded: {names} (start with --models {first} or POST /models?url={first})"
        )
    if event.get("grpc"):
        lines.append("gRPC: " + ", ".join(f"{name.removeprefix('grpc_')} {at}" for name, at in event["grpc"].items()))
    lines.append(READY_LINE)
    if event.get("sample"):
        lines.append(visible(str(event["sample"])))
    return lines


def print_ready(event: JsonObject, stream: TextIO | None = None) -> None:
    """Print ``ready_lines`` to ``stream``, stdout by default."""
    stream = unescaped(sys.stdout if stream is None else stream)
    stream.write("\n".join(ready_lines(event, colored=stream.isatty())) + "\n")
    stream.flush()


def program() -> str:
    """What the command is called that runs: ``torchserve`` in TorchServe's place, else ``pyserve``."""
    return "torchserve" if Path(sys.argv[0]).stem == "torchserve" else "pyserve"


def warn(lines: Iterable[str], kind: str = "warning") -> None:
    """Print each line to stderr as ``pyserve: <kind>: <line>``."""
    for line in lines:
        print(f"{program()}: {kind}: {line}", file=sys.stderr)


class Progress:
    """Shows what the models are doing while they load. A context; ``update`` within it."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._stream = unescaped(sys.stderr if stream is None else stream)  # rich moves the cursor
        self._clock = clock
        self._texts: dict[str, str] = {}
        self._printed_at: dict[str, float] = {}
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            # Imported here: rich takes longer to import than all the rest of the command line.
            from rich.console import Console

            self._status = Console(file=self._stream).status("starting")
            self._status.start()
        return self

    def update(self, model: str, text: str) -> None:
        """Show ``text`` as what ``model`` is doing now."""
        if self._texts.get(model) == text:
            return
        self._texts[model] = text
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text("\n  ".join(f"{_cell(name)}: {_cell(t)}" for name, t in self._texts.items())))
            return
        now = self._clock()
        if now - self._printed_at.get(model, now - PLAIN_INTERVAL_S) >= PLAIN_INTERVAL_S:
            self._printed_at[model] = now
            print(f"{_cell(model)}: {_cell(text)}", file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
