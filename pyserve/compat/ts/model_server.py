"""The command ``torchserve``, as `python -m ts.model_server` and as a function."""

from __future__ import annotations

import sys

from pyserve.commands.torchserve import main
from ts.arg_parser import ArgParser
from ts.version import __version__

TS_NAMESPACE = "org.pytorch.serve.ModelServer"

__all__ = ["TS_NAMESPACE", "ArgParser", "__version__", "load_properties", "start"]


def start() -> None:
    """Runs the command line and ends the process with its exit code, if that is not 0."""
    code = main()
    if code:
        sys.exit(code)


def load_properties(file_path: str) -> dict[str, str]:
    """The lines ``key=value`` of a file; neither continued lines nor escapes are read, as the server does read them."""
    properties = {}
    with open(file_path) as file:
        for line in file:
            key, equals, value = line.strip().partition("=")
            if equals and not key.startswith("#"):
                properties[key.strip()] = value.strip()
    return properties


if __name__ == "__main__":
    start()
