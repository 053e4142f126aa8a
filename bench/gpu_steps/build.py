"""Builds the native engine in place, for this Python and this torch: the first proof that csrc compiles here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu_steps.settings import Emit, Settings

ROOT = Path(__file__).resolve().parents[2]


def run(settings: Settings, emit: Emit) -> None:
    """A row with the seconds; tiny sizes take the engine as it is."""
    began = time.monotonic()
    # ninja builds what has changed.
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not settings.tiny:
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "MAX_JOBS": jobs})
    # In a process of its own: a new one shall be loaded, and a loader's error be this step's.
    code = "import torch, pyserve._core as core; print(core.torch_version)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    emit({"seconds": round(time.monotonic() - began, 1), "built": not settings.tiny, "torch": found.stdout.strip()})
