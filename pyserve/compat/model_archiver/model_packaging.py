"""The console script of torch-model-archiver, and its function."""

from __future__ import annotations

import enum
import os
import shutil
import sys
from dataclasses import fields, replace

from model_archiver.arg_parser import ArgParser
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_archiver_error import MissingFileError, ModelArchiverError
from model_archiver.model_packaging_utils import ModelExportUtils
from pyserve.archive.packing import write_archive
from pyserve.commands.torch_model_archiver import main
from pyserve.errors import ServeError

__all__ = [
    "ArgParser", "ModelArchiverConfig", "ModelArchiverError", "ModelExportUtils", "generate_model_archive",
    "package_model",
]  # fmt: skip


def generate_model_archive(config: ModelArchiverConfig | None = None) -> None:
    """Packs what ``config`` says; without one, what the command line says.

    Raises:
        ModelArchiverError: it cannot be packed; the text says why. A FileNotFoundError too, if a file is not there.
    """
    if config is None:
        sys.exit(main())
    try:
        write_archive(replace(config, **{each.name: _plain(getattr(config, each.name)) for each in fields(config)}))
    except (ServeError, OSError) as error:
        is_missing = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError)
        raise (MissingFileError if is_missing else ModelArchiverError)(str(error)) from error


def package_model(config: ModelArchiverConfig, manifest: str) -> None:
    """Packs what ``config`` says under a manifest of one's own.

    Args:
        config: what to pack.
        manifest: text of MANIFEST.json.

    Raises:
        ModelArchiverError: it cannot be packed; the text says why. A FileNotFoundError too, if a file is not there.
    """
    folder = config.export_path or os.getcwd()
    ModelExportUtils.validate_inputs(config.model_name, folder)
    ModelExportUtils.check_mar_already_exists(config.model_name, folder, config.force, config.archive_format)
    path = ModelExportUtils.copy_artifacts(
        config.model_name, config.runtime, serialized_file=config.serialized_file, model_file=config.model_file,
        handler=config.handler, extra_files=config.extra_files, requirements_file=config.requirements_file,
        config_file=config.config_file,
    )  # fmt: skip
    try:
        ModelExportUtils.archive(folder, config.model_name, path, manifest, config.archive_format)
    finally:
        shutil.rmtree(path)


def _plain(value: object) -> object:
    """Paths and runtimes as their text, which is what scripts give in their place."""
    if isinstance(value, enum.Enum):
        return value.value
    return os.fspath(value) if isinstance(value, os.PathLike) else value


if __name__ == "__main__":
    generate_model_archive()
