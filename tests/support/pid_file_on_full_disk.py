"""Writes pid files to a small disk that it fills: ``python -m tests.support.pid_file_on_full_disk DISK``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from pyserve.server import pid_file

if __name__ == "__main__":
    disk = Path(sys.argv[1])
    os.environ["TMPDIR"] = str(disk)
    paths = [pid_file.default_path()]
    with contextlib.suppress(OSError), open(disk / "full", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    paths.append(pid_file.default_path())
    files = pid_file.PidFiles(disk / "pid", None)
    notes = files.write(pid_file.RunningServer(os.getpid(), pid_file.start_time(os.getpid()) or 0))
    files.look()
    while_full = os.listdir(disk)
    (disk / "full").unlink()
    files.look()
    places = [str(path.relative_to(disk)) for path in paths]
    print(json.dumps({"notes": notes, "while full": while_full, "after": os.listdir(disk), "default": places}))
