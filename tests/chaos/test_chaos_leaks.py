"""Each check for something left behind finds what is planted, and nothing where nothing was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.chaos.standing import ProcessStanding, Standing, differences, files_in, shared_memory

# Does what each line says, and answers with a line.
_PLANTER = """
import os, sys, threading, subprocess, time
kept = []
for line in sys.stdin:
    what = line.strip()
    if what == "descriptor":
        kept.append(os.open("/dev/null", os.O_RDONLY))
    elif what == "memfd":
        kept.append(os.memfd_create("planted"))
    elif what == "thread":
        kept.append(threading.Thread(target=time.sleep, args=(1000,), daemon=True)); kept[-1].start()
    elif what == "child":
        kept.append(subprocess.Popen(["sleep", "1000"]))
    elif what == "memory":
        kept.append(os.urandom(1 << 20) * 16)
    elif what == "end":
        [each.kill() for each in kept if isinstance(each, subprocess.Popen)]
        os._exit(0)
    print("done", flush=True)
"""


class Planted:
    """A process that leaks what it is told to."""

    def __init__(self, popen: subprocess.Popen[str], folder: Path):
        self._popen = popen
        self._folder = folder

    def plant(self, what: str) -> None:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        print(what, file=self._popen.stdin, flush=True)
        assert self._popen.stdout.readline() == "done\n"

    def standing(self) -> Standing:
        process = ProcessStanding.of(psutil.Process(self._popen.pid))
        return Standing({"server": process}, files_in([self._folder]), shared_memory())


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Planted]:
    command = [sys.executable, "-c", _PLANTER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        made = Planted(popen, tmp_path)
        made.plant("nothing")
        try:
            yield made
        finally:
            print("end", file=popen.stdin, flush=True)


def test_nothing_is_found_where_nothing_was_left(planted: Planted) -> None:
    before = planted.standing()
    planted.plant("nothing")
    assert differences(before, planted.standing()) == []


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("descriptor", "server: descriptor /dev/null: 0 before, 1 after"),
        ("memfd", "server: descriptor /memfd:planted: 0 before, 1 after"),
        ("thread", "server: thread python: 1 before, 2 after"),
        ("child", "server: 0 children before, 1 after"),
        ("memory", "MB resident before"),
    ],
)
def test_a_planted_leak_of_a_process_is_found(planted: Planted, what: str, named: str) -> None:
    before = planted.standing()
    planted.plant(what)
    assert any(named in line for line in differences(before, planted.standing()))


def test_a_planted_file_is_found_and_its_name_says_where(planted: Planted, tmp_path: Path) -> None:
    before = planted.standing()
    (tmp_path / "left").write_text("")
    (tmp_path / "pyserve-server-4bfs1_zx").mkdir()
    found = differences(before, planted.standing())
    assert [line.partition("/")[2] for line in found] == [
        "left: 0 before, 1 after",
        "pyserve-server-*: 0 before, 1 after",
    ]


def test_planted_shared_memory_and_a_process_are_found() -> None:
    before = Standing()
    after = Standing()
    after.shared_memory["psm_planted"] += 1
    after.others["sleep 1000"] += 1
    assert differences(before, after) == [
        "shared memory psm_planted: 0 before, 1 after",
        "process sleep 1000: 0 before, 1 after",
    ]


def test_shared_memory_of_the_machine_is_seen() -> None:
    name = f"/dev/shm/pyserve-chaos-test-{psutil.Process().pid}"
    before = shared_memory()
    Path(name).write_text("")
    try:
        assert (shared_memory() - before)[Path(name).name] == 1
    finally:
        Path(name).unlink()


def test_names_that_are_drawn_anew_are_no_difference(tmp_path: Path) -> None:
    counts = []
    for name in ("pyserve-server-4bfs1_zx", "pyserve-server-abcdefgh"):
        made = tmp_path / name
        made.mkdir()
        counts.append(files_in([tmp_path]))
        made.rmdir()
    assert counts[0] == counts[1]
