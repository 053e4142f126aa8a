"""The tests of the engine on this device. A figure of an engine that answers wrongly is worth nothing."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from bench.gpu_steps.settings import Emit, Lacks, Settings

ROOT = Path(__file__).resolve().parents[2]
FULL = ["tests/test_engine.py", "-k", "accelerator"]
TINY = ["tests/test_engine.py", "-k", "accelerator and mixed_shapes"]


def run(settings: Settings, emit: Emit) -> None:
    """A row with the counts, and one for each test that failed."""
    report = settings.folder / "junit.xml"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
        *(TINY if settings.tiny else FULL),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.exists():
        raise Lacks(f"pytest and what the tests import (exit status {done.returncode}; see the log)")
    [suite] = ET.parse(report).getroot().iter("testsuite")
    emit({name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")})
    for case in suite.iter("testcase"):
        for problem in [*case.iter("failure"), *case.iter("error")]:
            emit(
                {"test": f"{case.get('classname')}.{case.get('name')}", "failed": (problem.get("message") or "")[:200]}
            )
