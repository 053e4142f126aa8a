"""Tables that fit their window: what is too wide goes onto lines of its own, words stay whole, and nothing is cut off.

Anywhere but on a terminal a row is one line, however long, so that ``grep`` and ``awk`` find it whole. Colours are what
``NO_COLOR`` and ``TERM`` allow.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from pyserve.commands.escaping import unescaped
from pyserve.visible import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

WIDTH_MIN = 20
WIDTH_DEFAULT = 80
# Of a column that is narrowed; and up to which long names are folded before a column is left out.
COLUMN_WIDTH_MIN = 8
FOLDED_WIDTH = 24
GAP = 2
# Anywhere but on a terminal: wider than any row.
_UNLIMITED = 1 << 20


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: in the first line.
        is_number: to the right.
        importance: where there is no room, those with the lowest go first; 0 is never left out but put onto a line of
            its own below, if it is the last, or narrowed.
    """

    title: str
    is_number: bool = False
    importance: int = 0


@dataclass(frozen=True)
class Row:
    """Cells, with a style of rich for some of them by number, and texts to stand below."""

    cells: Sequence[str]
    styles: dict[int, str] | None = None
    below: Sequence[str] = ()


def has_color(stream: TextIO) -> bool:
    """Whether colours may be written: on a terminal that knows them, unless ``NO_COLOR`` is set."""
    return stream.isatty() and not is_dumb() and not os.environ.get("NO_COLOR")


def is_dumb() -> bool:
    """Whether the terminal moves no cursor and has no colours."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def console_on(stream: TextIO, width: int | None = None) -> Console:
    """What writes texts of ours to ``stream``. What they contain has to be escaped before."""
    from rich.console import Console

    plain = unescaped(stream)
    if width is None and not plain.isatty():
        width = _UNLIMITED
    return Console(file=plain, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def as_markup(text: str) -> str:
    """``text`` where rich takes markup: brackets in it are its own."""
    from rich.markup import escape

    return escape(text)


def cell(value: object) -> str:
    """A value in a cell; ``-`` for none. Control characters and line ends in it do not reach the terminal."""
    text = "-" if value is None or value == "" else str(value)
    return "".join(char if char.isprintable() else "?" for char in text)


def table_text(
    columns: Sequence[Column], rows: Sequence[Row], *, width: int | None = None, colored: bool = False
) -> str:
    """The table, without the last line's end.

    Args:
        width: of the window, in cells; None outside of one.
    """
    from rich.console import Console

    file = io.StringIO()
    console = Console(
        file=file, width=max(width or _UNLIMITED, WIDTH_MIN), highlight=False, markup=False, emoji=False,
        force_terminal=colored, color_system="standard" if colored else None, no_color=not colored,
        legacy_windows=False,
    )  # fmt: skip
    _write(console, columns, rows)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip("\n").split("\n"))


def print_table(columns: Sequence[Column], rows: Sequence[Row], stream: TextIO | None = None) -> None:
    """Prints the table to ``stream``, standard output by default."""
    out = unescaped(sys.stdout if stream is None else stream)
    out.write(table_text(columns, rows, width=window_width(out), colored=has_color(out)) + "\n")
    out.flush()


def window_width(stream: TextIO) -> int | None:
    """Of the terminal that ``stream`` is, in cells; None if it is none."""
    if not stream.isatty():
        return None
    try:
        columns = int(os.environ.get("COLUMNS", "") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):
        columns = 0
    return columns if columns > 0 else WIDTH_DEFAULT  # a terminal that does not say how wide it is


def _write(console: Console, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    shown, below = _chosen(columns, rows, console.width)
    widths = _widths([columns[number] for number in shown], [[row.cells[number] for number in shown] for row in rows],
                     console.width)  # fmt: skip
    title = Row([column.title for column in columns])
    for row in (title, *rows) if any(title.cells) else rows:
        console.print(_line(columns, row, shown, widths))
        if row is title:
            continue
        for number in below:
            if row.cells[number] not in ("", "-"):
                # It wraps as the window does, so that a URL is copied in one piece.
                console.print(f"    {row.cells[number]}", soft_wrap=True)
        for text in row.below:
            for part in visible(text).split("\n"):
                console.print(_indented(part))


def _chosen(columns: Sequence[Column], rows: Sequence[Row], width: int) -> tuple[list[int], list[int]]:
    """Numbers of the columns that the table has, and of those below."""
    shown, below = list(range(len(columns))), []

    def needed() -> int:
        widths = [_width(columns[number], [row.cells[number] for row in rows]) for number in shown]
        return sum(min(width, FOLDED_WIDTH) + GAP for width in widths) - GAP

    full = sum(_width(column, [row.cells[number] for row in rows]) + GAP for number, column in enumerate(columns)) - GAP
    if full > width and len(shown) > 1 and not columns[-1].importance:
        below.append(shown.pop())
    while needed() > width:
        least = min((number for number in shown if columns[number].importance),
                    key=lambda number: (columns[number].importance, -number), default=None)  # fmt: skip
        if least is None:
            break
        shown.remove(least)
    return shown, below


def _width(column: Column, cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, [column.title, *cells]))


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Of the columns; the widest ones are narrowed until all fit."""
    widths = [_width(column, [row[number] for row in cells]) for number, column in enumerate(columns)]
    while sum(widths) + GAP * (len(widths) - 1) > width and max(widths) > COLUMN_WIDTH_MIN:
        widths[widths.index(max(widths))] -= 1
    return widths


def _line(columns: Sequence[Column], row: Row, shown: Sequence[int], widths: Sequence[int]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    for number, width in zip(shown, widths, strict=True):
        grid.add_column(width=width, overflow="fold", justify="right" if columns[number].is_number else "left")
    styles = row.styles or {}
    grid.add_row(*(Text(row.cells[number], style=styles.get(number, "")) for number in shown))
    return grid


def _indented(text: str) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(text, overflow="fold"), (0, 0, 0, 4))
