"""Notes which functions of pyserve a process enters while a file exists. Imported by Python itself from PYTHONPATH.

``PYSERVE_ENTERED`` names a folder: while ``on`` is in it, calls are noted; when it has gone, each process writes what
it noted to ``PID.NUMBER``, one ``file:function`` a line.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType
from typing import Any

FOLDER = os.environ.get("PYSERVE_ENTERED", "")
POLL_S = 0.01


class Recorder:
    def __init__(self) -> None:
        self._entered: set[Any] = set()
        self._is_on = False
        self._count = 0

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        if self._is_on and event == "call":
            self._entered.add(frame.f_code)

    def watch(self) -> None:
        """Begins to look for the file; after a fork again, as the child has no such thread."""
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        sys.setprofile(None)  # this thread's own calls are nobody's
        switch = os.path.join(FOLDER, "on")
        while True:
            time.sleep(POLL_S)
            is_on = os.path.exists(switch)
            if self._is_on and not is_on:
                self._is_on = False
                self._write()
            self._is_on = is_on

    def _write(self) -> None:
        lines = {f"{code.co_filename}:{code.co_qualname if sys.version_info >= (3, 11) else code.co_name}"
                 for code in self._entered}  # fmt: skip
        self._entered = set()
        self._count += 1
        with open(os.path.join(FOLDER, f"{os.getpid()}.{self._count}"), "w") as file:
            file.write("\n".join(sorted(lines)))


if FOLDER:
    recorder = Recorder()
    threading.setprofile(recorder.note)
    sys.setprofile(recorder.note)
    recorder.watch()
    os.register_at_fork(after_in_child=recorder.watch)
