"""The command ``torchserve``, as `python -m ts.model_server` and as a function."""

from __future__ import annotations

import sys

from pyserve.commands.torchserve import main


def start() -> None:
    """Runs the command line and ends the process with its exit code, if that is not 0."""
    code = main()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    start()
