"""Processes are found by their mark, however they were started, and only they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from pyserve.worker.descendants import MARK, end_marked, mark_of, new_token, take_mark

LIMIT_S = 60
SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(1000)"]
# As the zygote forks a worker: it takes a mark of its own, and then starts something; says when it has.
FORKS = f"""
import os, sys, time
from pyserve.worker.descendants import take_mark
if os.fork() == 0:
    take_mark(sys.argv[1])
    os.setsid()
    if os.fork() == 0:  # without an exec
        print("up", flush=True)
        time.sleep(1000)
    os._exit(0)
os.wait()
print(os.environ["{MARK}"], flush=True)
time.sleep(1000)
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
        started.append(popen)
        return popen

    yield begin
    for popen in started:
        popen.kill()
        popen.wait()
        assert popen.stdout is not None
        popen.stdout.close()


def marked(mark: str) -> dict[str, str]:
    return {**os.environ, MARK: mark}


def read(popen: subprocess.Popen[str]) -> str:
    assert popen.stdout is not None
    return popen.stdout.readline().strip()


def test_what_has_the_mark_is_ended_and_nothing_else(start: Start) -> None:
    token = new_token()
    mine, other = start(SLEEP, marked(mark_of(token, 1))), start(SLEEP, marked(mark_of(token, 2)))
    foreign, unmarked = start(SLEEP, marked(mark_of(new_token(), 1))), start(SLEEP, dict(os.environ))
    assert [read(each) for each in (mine, other, foreign, unmarked)] == ["up"] * 4
    assert end_marked(mark_of(token, 1)) == 1
    assert mine.wait(LIMIT_S) == -signal.SIGKILL
    assert [each.poll() for each in (other, foreign, unmarked)] == [None] * 3
    assert end_marked(token) == 1  # all of a zygote's
    assert other.wait(LIMIT_S) == -signal.SIGKILL
    assert [each.poll() for each in (foreign, unmarked)] == [None] * 2


def test_a_process_that_was_forked_and_not_executed_has_the_mark_of_its_parent(start: Start) -> None:
    token = new_token()
    zygote = start([sys.executable, "-c", FORKS, mark_of(token, 7)], marked(mark_of(token)))
    assert {read(zygote), read(zygote)} == {"up", mark_of(token)}  # its own mark is as it was
    assert end_marked(mark_of(token, 7)) == 1
    assert zygote.poll() is None
    assert end_marked(mark_of(token, 7)) == 0


def test_no_mark_is_nobodys(start: Start) -> None:
    process = start(SLEEP, marked(mark_of(new_token(), 1)))
    assert read(process) == "up"
    assert end_marked("") == 0
    assert process.poll() is None


def test_a_mark_is_passed_on_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "")
    mark = mark_of(new_token(), 3)
    take_mark(mark)
    assert os.environ[MARK] == mark
