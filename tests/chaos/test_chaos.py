"""A short campaign: what kills, what floods and what changes, a few of each; `make chaos` has the long one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import SEED
from tests.support.serving import ROOT

LIMIT_S = 850  # below pytest's own limit of one test
# Classes that take no restart of the server: those cost many seconds each.
QUICK = (
    "announced-bodies", "clock-jump", "deploy", "full-disk", "half-open", "kill-worker", "kill-workers", "lost-folder",
    "poison", "register-again", "register-broken", "reset-flood", "scale", "slow-readers", "slow-writers",
    "stop-supervisor", "stop-worker", "stop-zygote",
)  # fmt: skip


def play(*arguments: str, summary: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.chaos.run", "--summary", str(summary), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.server
@pytest.mark.slow
def test_a_short_campaign_leaves_no_trace(tmp_path: Path) -> None:
    only = [word for name in QUICK for word in ("--only", name)]
    # A short warm-up has not touched all that stays resident; the long campaign judges memory.
    short = ["--requests", "3000", "--faults", str(len(QUICK)), "--warm-up", "500", "--memory-growth", "0.3"]
    played = play("--seed", str(SEED), *short, *only, summary=tmp_path / "summary.txt")
    assert played.returncode == 0, played.stdout + played.stderr
    left_out = played.stdout.count("left out: ")
    assert f"{len(QUICK)} faults, 0 violations" in played.stdout, played.stdout
    assert left_out < len(QUICK) // 2, played.stdout
    sent, right = map(int, re.findall(r"sent (\d+), answered right (\d+)", played.stdout)[0])
    assert sent >= right > 3000


def test_a_class_that_is_none_is_refused(tmp_path: Path) -> None:
    played = play("--only", "earthquake", "--no-namespaces", summary=tmp_path / "summary.txt")
    assert played.returncode == 2 and "earthquake" in played.stderr
