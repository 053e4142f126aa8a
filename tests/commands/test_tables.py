"""Tables at every width: words stay whole, nothing is lost, and outside of a window a row is a line."""

from __future__ import annotations

import io
import os
import pty

import pytest
from rich.cells import cell_len

from pyserve.commands import model_table
from pyserve.commands.tables import Column, Row, cell, has_color, table_text, window_width

ROWS = [
    {"model": "densenet161", "version": "1.0", "state": "READY", "workers": 1, "device": "cpu", "batch": 1,
     "url": "http://127.0.0.1:8080/predictions/densenet161"},
    {"model": "模型-with-a-long-name-that-goes-on-and-on", "version": "1.0", "state": "FAILED", "workers": 0,
     "error": "No module named 'torchvision'; pip install torchvision where pyserve runs, or pack a requirements.txt"},
]  # fmt: skip


@pytest.mark.parametrize("width", [200, 100, 80, 60, 40, 20])
def test_no_line_but_a_url_is_wider_than_the_window(width: int) -> None:
    lines = model_table.table_lines(ROWS, width=width)
    assert all(cell_len(line) <= width for line in lines if "http://" not in line), lines
    joined = "".join("".join(line.split()) for line in lines)
    assert "http://127.0.0.1:8080/predictions/densenet161" in joined
    assert "packarequirements.txt" in joined and "goes-on" in joined.replace("FAILED", "")


def test_words_of_a_reason_stay_whole() -> None:
    words = {word for line in model_table.table_lines(ROWS, width=60) for word in line.split()}
    assert set(str(ROWS[1]["error"]).split()) <= words


def test_a_url_that_does_not_fit_stands_on_a_line_of_its_own() -> None:
    title, first, url, *_ = model_table.table_lines(ROWS[:1], width=80)
    assert title.split() == ["MODEL", "VERSION", "STATE", "WORKERS", "DEVICE", "BATCH"]
    assert first.split()[:3] == ["densenet161", "1.0", "READY"] and url == f"    {ROWS[0]['url']}"


def test_outside_of_a_window_a_row_is_a_line() -> None:
    lines = model_table.table_lines([{**ROWS[0], "model": "m" * 500}])
    assert len(lines) == 2 and lines[1].split()[-1] == ROWS[0]["url"]


def test_the_least_important_columns_go_first() -> None:
    columns = [Column("A"), Column("B", importance=1), Column("C", importance=2)]
    rows = [Row(["a" * 10, "b" * 10, "c" * 10])]
    titles = [table_text(columns, rows, width=width).split("\n")[0].split() for width in (40, 30, 20)]
    assert titles == [["A", "B", "C"], ["A", "C"], ["A"]]


def test_a_cell_is_one_line_without_control_characters() -> None:
    assert cell("a\x1b[31m\nb") == "a?[31m?b" and cell(None) == cell("") == "-" and cell(0) == "0"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colors_are_what_the_terminal_and_no_color_allow(
    variables: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, open(ours, "rb"):
        assert has_color(terminal) is wanted
        model_table.print_models(ROWS[:1], terminal)
        assert (b"\x1b[" in os.read(ours, 10_000)) is wanted
    assert not has_color(io.StringIO())


def test_the_width_is_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, open(ours, "rb"):
        assert window_width(terminal) == 80  # it says 0
        monkeypatch.setenv("COLUMNS", "50")
        assert window_width(terminal) == 50
    assert window_width(io.StringIO()) is None
