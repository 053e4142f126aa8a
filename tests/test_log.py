"""Log records: one line each, and no harm from a stream that cannot be written."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyserve import log

logger = logging.getLogger("pyserve.server")


@pytest.fixture(autouse=True)
def untouched_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def handler_for(stream: io.TextIOBase, now: list[float]) -> log.LossyHandler:
    log.configure(logging.INFO, stream)  # type: ignore[arg-type]
    handler = logging.getLogger().handlers[-1]
    assert isinstance(handler, log.LossyHandler)
    handler.clock = lambda: now[0]
    return handler


def test_record_is_one_line_in_the_known_form() -> None:
    stream = io.StringIO()
    log.configure(logging.INFO, stream)
    logger.info("ready after %d s", 3)
    logger.warning("careful")
    logger.debug("unseen")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3} \[INFO \] pyserve\.server - ready after 3 s", first)
    assert "[WARN ] pyserve.server - careful" in second


def test_traceback_belongs_to_its_record() -> None:
    stream = io.StringIO()
    log.configure(logging.INFO, stream)
    try:
        raise ValueError("forged\n2026-01-01T00:00:00,000 [INFO ] x - y")
    except ValueError:
        logger.exception("failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("[ERROR] pyserve.server - failed")
    assert rest and all(line.startswith("    ") for line in rest)


def test_control_characters_do_not_reach_the_stream() -> None:
    stream = io.StringIO()
    log.configure(logging.INFO, stream)
    logger.info("%s", "a\x1b[2Jb\rc\0d\ne")
    assert stream.getvalue().endswith("a\\x1b[2Jb\\x0dc\\x00d\n    e\n")


def test_record_that_cannot_be_formatted_is_logged_all_the_same() -> None:
    stream = io.StringIO()
    log.configure(logging.INFO, stream)
    logger.info("%d items", "many")
    assert "'%d items' cannot be formatted" in stream.getvalue()


def test_closed_stream_is_no_error() -> None:
    stream = io.StringIO()
    handler = handler_for(stream, [0.0])
    stream.close()
    logger.info("lost")
    assert handler.lost_count == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_no_error() -> None:
    with open("/dev/full", "w") as stream:
        handler = handler_for(stream, [0.0])
        logger.info("lost")
        assert handler.lost_count == 1


def test_pipe_that_nobody_reads_never_blocks_and_the_loss_is_told_afterwards() -> None:
    read_fd, write_fd = os.pipe()
    now = [1000.0]
    with open(read_fd, "rb", buffering=0) as reader, open(write_fd, "w") as stream:
        handler = handler_for(stream, now)
        for number in range(2000):
            logger.info("%d %s", number, "x" * 200)
        lost_count = handler.lost_count
        assert lost_count > 0
        assert b"\n" in reader.read(1 << 20)
        logger.info("again")
        assert f"{lost_count} log records were lost: nobody reads the log" in reader.read(1 << 20).decode()
        assert handler.lost_count == 0


def test_losses_are_told_once_a_minute() -> None:
    class Moody(io.StringIO):
        broken = False

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(28, "No space left on device")
            return super().write(text)

    stream, now = Moody(), [1000.0]
    handler = handler_for(stream, now)
    for after_s, reports in ((0, 1), (59, 1), (1, 2)):
        now[0] += after_s
        stream.broken = True
        logger.info("lost")
        stream.broken = False
        logger.info("kept")
        assert stream.getvalue().count("log records were lost: No space left on device") == reports
    assert handler.lost_count == 0


def test_lines_of_others_are_never_torn(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as read, open(writer, "w") as stream:
        handler = log.configure(logging.INFO, stream)
        lines = [f"{number:04d} " + "x" * 90 + "\n" for number in range(100)] + ["long " + "y" * 5000 + "\n", "last\n"]
        handler.write_lines("".join(lines))
        assert handler.lost_count == 0
        assert read.read(sum(map(len, lines))).decode() == "".join(lines)
        os.set_blocking(writer, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writer, b"z" * 4096)
        handler.write_lines("one\ntwo\n")
        assert handler.lost_count == 2
