"""Control characters of texts from outside are shown, not obeyed."""

from __future__ import annotations

import io
import logging
import unicodedata

import pytest

from pyserve import log
from pyserve.visible import visible
from tests.support.control_characters import HOSTILE, SHOWN


def test_what_a_terminal_obeys_is_shown_and_all_else_is_kept() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("two\nlines\tand a tab") == "two\nlines\tand a tab"
    for code in range(0x110000):
        kept = visible(chr(code)) == chr(code)
        category = unicodedata.category(chr(code))
        assert kept == (category not in ("Cc", "Zl", "Zp") or chr(code) in "\n\t") or unicodedata.bidirectional(
            chr(code)
        ) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"), hex(code)


@pytest.mark.parametrize("formatter", [log.LineFormatter(), log.ServerLogFormatter()])
def test_no_part_of_a_record_controls_the_terminal(formatter: logging.Formatter) -> None:
    record = logging.LogRecord(f"pyserve.model.{HOSTILE}", logging.INFO, "", 0, "%s\n%s", (HOSTILE, HOSTILE), None)
    record.worker = f"W-9000-{HOSTILE}\nforged"
    record.exc_text = HOSTILE
    first, *rest = formatter.format(record).split("\n")
    assert SHOWN in first and rest == [f"    {SHOWN}", f"    {SHOWN}"]


def test_what_a_worker_printed_does_not_either() -> None:
    record = logging.LogRecord("pyserve.model.m", logging.INFO, "", 0, "%s", (HOSTILE,), None)
    record.worker, record.stream = f"W-9000-{HOSTILE}", "stdout"
    line = log.LineFormatter().format(record)
    assert line.count(SHOWN) == 2 and "\x1b" not in line


def test_nor_a_record_that_cannot_be_formatted() -> None:
    stream = io.StringIO()
    handler = log.LossyHandler(stream)
    handler.setFormatter(log.LineFormatter())
    handler.emit(logging.LogRecord(f"a{HOSTILE}\nb", logging.INFO, "", 0, "%d", ("x",), None))
    assert stream.getvalue().count("\n") == 1 and SHOWN in stream.getvalue()
