"""Builds and runs the native tests of the ring, the batcher, the completions and the lane of worker processes.

Each file of ``tests/native`` runs three times, in a process of its own: plain, under ThreadSanitizer and under
AddressSanitizer with UndefinedBehaviorSanitizer. The builds go to ``build/native`` and are kept. A failing random test
names its seed; ``PYSERVE_TEST_SEED`` replays it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.build import BUILDS, HANG_S, NATIVE, built

PROGRAMS = sorted(path.stem for path in NATIVE.glob("*_test.cpp"))
ALONE = ("process_memory_test",)  # as in the Makefile, which says why

SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(
        shutil.which("g++") is None or shutil.which("make") is None, reason="the native tests need g++ and make"
    ),
]


def check(command: list[str]) -> str:
    """Runs a program, gives what it wrote, and fails with that if it fails.

    A watchdog within finds what has stalled (watchdog.h).
    """
    outcome = subprocess.run(
        command,
        env={**os.environ, **SANITIZER_OPTIONS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    if outcome.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {outcome.returncode}:\n{outcome.stdout}", pytrace=False)
    return outcome.stdout


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> Path:
    """The folder of one build's programs, built if they are older than their sources."""
    try:
        return built(request.param)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error}:\n{error.stdout}", pytrace=False)


@pytest.mark.parametrize("program", PROGRAMS)
def test_native_program_passes(build: Path, program: str) -> None:
    written = check([str(build / program)] if program in ALONE else [str(build / "all"), program])
    # As many as the file has: a program that finds no test to run, or those of another file, proves nothing.
    count = len(re.findall(r"^TEST\(", (NATIVE / f"{program}.cpp").read_text(), re.MULTILINE))
    assert written.endswith(f"{count} passed, 0 failed\n")


def test_each_test_file_is_a_program_that_runs() -> None:
    # A glob that finds nothing, or a file that lies beside it, would pass without a word. The parts that everything
    # else stands on are named; a list of all would have to be typed again with each new file, and prove no more.
    assert sorted(path.stem for path in NATIVE.parent.rglob("*_test.cpp")) == PROGRAMS
    assert {"ring_test", "waiter_test", "completion_test", "batcher_test"} <= set(PROGRAMS)
