"""Builds the native tests, if their sources have changed: python -m tests.native.build

``make test`` does so beside lint, which is one process at a time.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

NATIVE = Path(__file__).parent
FOLDER = NATIVE.parents[1] / "build" / "native"
BUILDS = ("thread", "address", "plain")
HANG_S = 800  # not a measure of anything


def built(name: str) -> Path:
    """The folder of one build's programs. Processes that ask meanwhile wait.

    Raises:
        subprocess.CalledProcessError: with what the compiler wrote in ``stdout``.
    """
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    command = ["make", "--no-print-directory", f"-j{os.cpu_count() or 1}", "-C", str(NATIVE), f"BUILD={name}"]
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=HANG_S, check=True
        )  # fmt: skip
    return folder


if __name__ == "__main__":
    for each in BUILDS:
        print(built(each))
