"""Runs a test module's ``main`` with a small disk of its own, in a namespace of users and mounts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
_MOUNT = 'mount -t tmpfs -o size={size},mode=0700 none "$1" && shift && exec "$@"'


def mounted(command: list[str], disk: Path, size: str = "64k") -> list[str]:
    """``command`` with a disk of ``size`` at ``disk`` that only it and its children see. Skips where that cannot be."""
    disk.mkdir(exist_ok=True)
    prefix = ["unshare", "-rm", "sh", "-c", _MOUNT.format(size=size), "sh", str(disk)]
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1)")
    if tried.returncode != 0:
        pytest.skip(f"the kernel lets nobody mount a disk here: {tried.stderr.strip()}")
    return [*prefix, *command]


def in_full_disk(module: str, tmp_path: Path, size: str = "64k") -> dict[str, Any]:
    """What ``python -m module DISK`` prints as JSON in its last line."""
    disk = tmp_path / "disk"
    command = mounted([sys.executable, "-m", module, str(disk)], disk, size)
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told
