"""Files that are made again when somebody removes them, by a thread that outlives what fails."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from pyserve.server.console_file import ConsoleFile
from pyserve.server.housekeeping import Housekeeping
from tests.support.serving import LIMIT_S


def test_a_task_that_fails_is_asked_again_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    asked, enough = [0, 0], threading.Event()

    def full() -> None:
        asked[0] += 1
        raise OSError(28, os.strerror(28))

    def wrong() -> None:
        asked[1] += 1
        if asked[1] == 3:
            enough.set()
        raise ValueError

    housekeeping = Housekeeping([full, wrong], interval_s=0.0)
    housekeeping.start()
    assert enough.wait(LIMIT_S)
    housekeeping.stop()
    count = list(asked)
    assert count[0] >= 3
    assert len([record for record in caplog.records if record.exc_info]) == count[1], "a full disk is no error of ours"
    assert asked == count, "nothing is asked after the end"
    idle = Housekeeping([])
    idle.start()
    idle.stop()


@pytest.mark.parametrize("taken", ["removed", "moved", "folder"])
def test_what_is_printed_goes_to_a_new_file_where_the_old_one_was_taken(tmp_path: Path, taken: str) -> None:
    path = tmp_path / "logs" / "pyserve.log"
    path.parent.mkdir()
    output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    console = ConsoleFile(path, (output,))
    os.write(output, b"first\n")
    console.look()
    assert path.read_bytes() == b"first\n"
    if taken == "removed":
        path.unlink()
    elif taken == "moved":
        path.rename(tmp_path / "old")
    else:
        path.parent.rename(tmp_path / "old")
    before = len(os.listdir("/proc/self/fd"))
    console.look()
    os.write(output, b"second\n")
    assert path.read_bytes() == b"second\n"
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(output)
