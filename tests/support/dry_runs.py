"""Commands that call a handler, run as a user runs them, in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120.0


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For a command in ``folder``, whose cache is there too."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYSERVE_CACHE": str(folder / "cache"), **more}
    variables.pop("TS_CONFIG_FILE", None)
    return variables


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``pyserve`` with ``arguments``, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "pyserve", *map(str, arguments)], cwd=folder, env=environment(folder),
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
