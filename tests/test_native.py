"""Builds and runs the native tests of the ring, the batcher, the completions and the lane of worker processes.

Each program of ``tests/native`` runs three times: plain, under ThreadSanitizer and under AddressSanitizer with
UndefinedBehaviorSanitizer. The builds go to ``build/native`` and are kept. A failing random test names its seed;
``PYSERVE_TEST_SEED`` replays it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "tests" / "native"
PROGRAMS = sorted(path.stem for path in NATIVE.glob("*_test.cpp"))
BUILDS = ("plain", "thread", "address")
HANG_S = 300  # far above what any program takes: each has a watchdog of its own

SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1 second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("make") is None, reason="the native tests need g++ and make"
)


def check(command: list[str]) -> None:
    """Runs a command and fails with all it wrote if it fails."""
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


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> Path:
    """The folder of one build's programs, built if they are older than their sources."""
    name: str = request.param
    jobs = os.cpu_count() or 1
    check(["make", "--no-print-directory", f"-j{jobs}", "-C", str(NATIVE), f"BUILD={name}"])
    return ROOT / "build" / "native" / name


@pytest.mark.parametrize("program", PROGRAMS)
def test_native_program_passes(build: Path, program: str) -> None:
    check([str(build / program)])


def test_there_is_a_program_for_each_part() -> None:
    parts = {
        "ring", "waiter", "completion", "batcher", "batcher_threads", "stall", "simulation", "schedule", "stats",
        "frame", "process_lane", "process_memory", "hostile_peer",
    }  # fmt: skip
    assert {program.removesuffix("_test") for program in PROGRAMS} == parts
