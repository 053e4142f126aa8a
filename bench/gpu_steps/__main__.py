"""Runs one step in this process: ``python -m bench.gpu_steps NAME SETTINGS``."""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys

from bench.gpu_steps.settings import Lacks, Row, Settings

PR_SET_PDEATHSIG = 1


def main() -> None:
    """A raise is a failure; its last line is what the table shows."""
    name, text = sys.argv[1:]
    settings = Settings.of_json(text)
    if sys.platform == "linux":  # a step outlives nothing that wanted it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("its time was over"))
    with open(settings.rows_path, "a") as file:

        def emit(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()  # what is measured is kept even if the step is ended

        try:
            importlib.import_module(f"bench.gpu_steps.{name}").run(settings, emit)
        except Lacks as lack:
            emit({"lacks": str(lack)})


if __name__ == "__main__":
    main()
