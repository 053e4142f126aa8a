"""The console script of torch-model-archiver, and its function."""

from __future__ import annotations

import enum
import os
import sys
from dataclasses import fields, replace

from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_archiver_error import ModelArchiverError
from pyserve.archive.packing import write_archive
from pyserve.commands.torch_model_archiver import main
from pyserve.errors import ServeError


def generate_model_archive(config: ModelArchiverConfig | None = None) -> None:
    """Packs what ``config`` says; without one, what the command line says.

    Raises:
        ModelArchiverError: it cannot be packed; the text says why.
    """
    if config is None:
        sys.exit(main())
    try:
        write_archive(replace(config, **{each.name: _plain(getattr(config, each.name)) for each in fields(config)}))
    except (ServeError, OSError) as error:
        raise ModelArchiverError(str(error)) from error


def _plain(value: object) -> object:
    """Paths and runtimes as their text, which is what scripts give in their place."""
    if isinstance(value, enum.Enum):
        return value.value
    return os.fspath(value) if isinstance(value, os.PathLike) else value


if __name__ == "__main__":
    generate_model_archive()
