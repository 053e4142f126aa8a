"""A wall clock that can be shifted, for the server alone: a small library, compiled and loaded before all others."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.chaos.site import Site

_VARIABLE = "PYSERVE_CHAOS_CLOCK"
_SOURCE = Path(__file__).with_name("clock_library.c")


def load(site: Site) -> None:
    """Has the server started with it, where there is a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return
    library, file = site.folder / "clock.so", site.folder / "clock.shift"
    command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(library), "-ldl"]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        file.write_bytes(struct.pack("d", 0.0))
        site.environment |= {_VARIABLE: str(file), "LD_PRELOAD": str(library)}


def is_loaded(site: Site) -> bool:
    return _VARIABLE in site.environment


def shift(site: Site, seconds: float) -> None:
    """From now on the server's wall clock is so many seconds ahead."""
    with open(site.environment[_VARIABLE], "r+b") as file:
        file.write(struct.pack("d", seconds))
