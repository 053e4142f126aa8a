"""Lines of a child are read until it is gone, whoever else holds the pipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest

from pyserve.child_reports import report_lines, report_of


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for each in ends:
        os.close(each)


def test_what_was_written_before_the_end_is_read_though_the_pipe_stays_open(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"one\ntwo\nhalf")
    assert list(report_lines(pipe[0], math.inf, lambda: True)) == [b"one", b"two"]


def test_a_line_in_parts_is_one(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"o")
    looks = iter([b"n", b"e\n", b""])

    def is_over() -> bool:
        part = next(looks)
        os.write(pipe[1], part)
        return not part

    assert list(report_lines(pipe[0], math.inf, is_over)) == [b"one"]


def test_the_deadline_ends_it(pipe: tuple[int, int]) -> None:
    assert list(report_lines(pipe[0], 0.0, lambda: False)) == []


@pytest.mark.parametrize("line", [b"", b"hello", b"7", b"[1]", b"null", b'{"a"', b"\xff", b"[" * 100_000])
def test_a_line_that_is_no_report_is_left_out_and_logged(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert report_of(line, "m.mar") == {}
    assert "m.mar: a line from its child process is no report" in caplog.text and len(caplog.text) < 1000
    assert report_of(b'{"progress": "tracing"}', "m.mar") == {"progress": "tracing"}
