"""The table of models, as ``pyserve start`` and ``pyserve status`` print it, and what stands below it after a start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from pyserve.commands.escaping import unescaped
from pyserve.commands.tables import Column, Row, cell, has_color, table_text, window_width
from pyserve.errors import JsonObject
from pyserve.visible import visible

COLUMNS = (
    Column("MODEL"), Column("VERSION", importance=3), Column("STATE"), Column("WORKERS", importance=4),
    Column("DEVICE", importance=1), Column("BATCH", importance=2), Column("URL"),
)  # fmt: skip
READY_LINE = "Model server started."

_STATE = [column.title for column in COLUMNS].index("STATE")
_STATE_COLORS = {"READY": "green", "FAILED": "red"}


def state_color(state: str) -> str:
    """The style of rich for a model's state."""
    return _STATE_COLORS.get(state, "yellow")


def table_lines(rows: Sequence[JsonObject], *, colored: bool = False, width: int | None = None) -> list[str]:
    """MODEL VERSION STATE WORKERS DEVICE BATCH URL, one line a row, failures with their reason beneath.

    Args:
        width: of the window; None outside of one.
    """
    lines = []
    for row in rows:
        shown = {**row, "version": row.get("shown") or row.get("version")}
        cells = [cell(shown.get(column.title.lower())) for column in COLUMNS]
        below = [str(row[name]) for name in ("error", "note") if row.get(name)]
        lines.append(Row(cells, {_STATE: state_color(cells[_STATE])}, below))
    return table_text(COLUMNS, lines, width=width, colored=colored).split("\n")


def print_models(rows: Sequence[JsonObject], stream: TextIO | None = None) -> None:
    """Print ``table_lines`` as wide and as colourful as ``stream`` is, stdout by default."""
    out = unescaped(sys.stdout if stream is None else stream)
    out.write("\n".join(table_lines(rows, colored=has_color(out), width=window_width(out))) + "\n")
    out.flush()


def ready_lines(event: JsonObject, *, colored: bool = False, width: int | None = None) -> list[str]:
    """All that ``pyserve start`` prints once the server answers. The last line is a command to copy, if any."""
    rows = event.get("models", [])
    lines = table_lines(rows, colored=colored, width=width) if rows else ["no model is loaded"]
    not_loaded = event.get("not_loaded", [])
    if not_loaded:
        first = cell(not_loaded[0])
        names = ", ".join(map(cell, not_loaded))
        lines.append(
            f"found in model store, not loaded: {names} (start with --models {first} or POST /models?url={first})"
        )
    if event.get("grpc"):
        lines.append("gRPC: " + ", ".join(f"{name.removeprefix('grpc_')} {at}" for name, at in event["grpc"].items()))
    if event.get("console"):
        lines.append(f"console: {visible(str(event['console']))}")
    lines.append(READY_LINE)
    if event.get("sample"):
        lines.append(visible(str(event["sample"])))
    return lines


def print_ready(event: JsonObject, stream: TextIO | None = None) -> None:
    """Print ``ready_lines`` to ``stream``, stdout by default."""
    out = unescaped(sys.stdout if stream is None else stream)
    out.write("\n".join(ready_lines(event, colored=has_color(out), width=window_width(out))) + "\n")
    out.flush()
