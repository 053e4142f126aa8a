"""NVIDIA's compute-sanitizer over a short run of the engine: memory errors and races of kernels and copies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.gpu_steps import device as on_device
from bench.gpu_steps.settings import Emit, Lacks, Settings

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck")


def run(settings: Settings, emit: Emit) -> None:
    """A row per tool with the number of errors."""
    on_device.accelerator()
    if shutil.which("compute-sanitizer") is None:
        raise Lacks("compute-sanitizer")
    for tool in TOOLS:
        small = Settings(True, settings.folder / tool, settings.ends_at)
        small.folder.mkdir()
        command = [
            "compute-sanitizer", "--tool", tool, "--target-processes", "all",
            sys.executable, "-m", "bench.gpu_steps", "sanitized", small.as_json(),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
        found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.stdout)
        if not found:
            emit({"tool": tool, "failed": (done.stdout.strip().splitlines() or ["it printed nothing"])[-1][:200]})
            continue
        errors = sum(int(a or b) for a, b in found)
        emit({"tool": tool, "errors": errors, **({"failed": f"{errors} errors; see the log"} if errors else {})})
