"""A device that breaks under a lane: who is answered what, and that nothing of it is touched any more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.simdev import build
from tests.simdev.lost_device_case import REQUESTS
from tests.support.serving import LIMIT_S, ROOT

pytestmark = pytest.mark.accelerator


def lose(*faults: str) -> dict[str, Any]:
    """What is seen of a lane in whose process these faults happen."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.simdev.lost_device_case", *faults], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **build.environment()}, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("at", [1, 7, 24, 60])
@pytest.mark.parametrize("frees", ["", "strict_free on=1"], ids=["frees", "raises when memory is let go"])
def test_whoever_waits_for_a_lost_device_is_told_so_and_nobody_is_run_again(at: int, frees: str) -> None:
    found = lose(*filter(None, [frees, "delay kind=op us=200", f"break at={at} device=0"]))
    codes = found["codes"]
    assert set(codes) <= {"ok", "device_lost"} and codes["device_lost"] > 0 and not found["wrong"]
    assert sum(codes.values()) + found["waiting"] == REQUESTS, "one answer each, or still in the queue"
    assert found["retried"] == 0
    assert [device for device, _ in found["lost"]] == ["simdev:0"] and found["other"] == "well"
    assert all("device-side assert" in text for text in [found["lost"][0][1], *found["messages"]])
