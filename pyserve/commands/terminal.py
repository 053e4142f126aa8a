"""What a person at a terminal sees while models load, and the notes and warnings of commands.

On a terminal progress is one changing line per model (rich); anywhere else it is plain lines, at most one a
second for each model, so that a log of a deployment stays readable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from pyserve.commands.escaping import unescaped
from pyserve.commands.tables import cell, console_on

if TYPE_CHECKING:
    from rich.status import Status

PLAIN_INTERVAL_S = 1.0


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
            self._status = console_on(self._stream).status("starting")
            self._status.start()
        return self

    def update(self, model: str, text: str) -> None:
        """Show ``text`` as what ``model`` is doing now."""
        if self._texts.get(model) == text:
            return
        self._texts[model] = text
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text("\n  ".join(f"{cell(name)}: {cell(t)}" for name, t in self._texts.items())))
            return
        now = self._clock()
        if now - self._printed_at.get(model, now - PLAIN_INTERVAL_S) >= PLAIN_INTERVAL_S:
            self._printed_at[model] = now
            print(f"{cell(model)}: {cell(text)}", file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
