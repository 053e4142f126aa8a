"""The command ``torch-model-archiver``: packs, as TorchServe's does, without trying whether the model can be served."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pyserve.commands.archive import add_archiver_arguments, archive_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Write an archive and return the exit code: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="torch-model-archiver", description="Packs a model into an archive.")
    add_archiver_arguments(parser)
    parser.set_defaults(no_check=True)
    return archive_command(parser.parse_args(list(sys.argv[1:] if arguments is None else arguments)))


if __name__ == "__main__":
    sys.exit(main())
