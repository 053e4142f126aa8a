"""Servers that have the simulated accelerator, and faults in them while they run."""

from __future__ import annotations

import os
import time

from tests.simdev import build
from tests.support.serving import LIMIT_S, Server


def give_device(server: Server, *, devices: int = 2, at_start: str = "") -> None:
    """Before it is started. ``at_start``: faults of all of its processes, as in tests/simdev/README.md."""
    server.environment |= {
        "PYTHONPATH": os.pathsep.join([server.environment["PYTHONPATH"], str(build.built())]),
        "SIMDEV": "1",
        "SIMDEV_DEVICES": str(devices),
        "SIMDEV_START": at_start,
        "SIMDEV_FAULTS": str(server.folder / "faults"),
    }


def fault(server: Server, *lines: str, pid: int | None = None) -> None:
    """Returns once the process has it: the server's own if no ``pid`` is given. It must be using the device."""
    pid = server.process.pid if pid is None else pid
    path = server.folder / "faults"
    taken = server.folder / "faults.taken"
    taken.unlink(missing_ok=True)
    written = server.folder / "faults.new"
    written.write_text("".join(f"{line} pid={pid}\n" for line in lines))
    written.rename(path)
    deadline = time.monotonic() + LIMIT_S
    while not taken.exists():
        assert time.monotonic() < deadline, f"process {pid} does not use the device"
        time.sleep(0.005)
