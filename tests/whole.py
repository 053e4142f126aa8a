"""Runs all tests side by side, and those that failed there once more, alone: ``python -m tests.whole --jobs 3``.

Thousands of tests with servers, deadlines and child processes, three at once on two cores: now and then one of them is
too late on a machine that does something else for ten seconds. It runs again in a process of its own, and if it passes
there, the run does, and names it at its very end. That is what CPython's ``regrtest --rerun`` does, and for the same
reason; each name is still a test that believes in time, or a race, and is to be looked at.

Nothing hides behind it: more than a few failures, a process that died, what a sanitizer or the native tests found, and
a test that fails again, are failures as they were.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

# More than so many are no accident.
AGAIN_MAX = 5
# A race that ThreadSanitizer saw once is a race, and so is what a server under faults lost once.
FINAL = ("tests/native/", "tests/test_native.py", "tests/chaos/", "tests/sanitize/")


class Failures:
    """What failed, by the test's id, in the order in which it was reported."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.final: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.final.append(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        is_crash = report.when not in ("setup", "call", "teardown")  # of the process that ran it, as xdist tells it
        if is_crash or report.nodeid.startswith(FINAL):
            self.final.append(report.nodeid)
        elif report.nodeid not in self.ids:
            self.ids.append(report.nodeid)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of pytest, 0 also if the few that failed passed alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes that run tests side by side")
    parser.add_argument("paths", nargs="*", help="files and folders of tests; default: all")
    options = parser.parse_args(arguments)
    failures = Failures()
    side_by_side = ("-q", "-n", str(options.jobs), "--dist", "worksteal", "--durations=25")
    status = int(pytest.main([*side_by_side, *options.paths], plugins=[failures]))
    if status != pytest.ExitCode.TESTS_FAILED or failures.final or not 0 < len(failures.ids) <= AGAIN_MAX:
        return status
    print(f"\n{len(failures.ids)} failed; once more, alone:", flush=True)
    status = subprocess.run([sys.executable, "-m", "pytest", "-v", *failures.ids], check=False).returncode
    if status == 0:
        print("\nFAILED BESIDE THE OTHERS, AND PASSED ALONE (a belief in time, or a race):", *failures.ids, sep="\n  ")
    return status


if __name__ == "__main__":
    sys.exit(main())
