"""`pyserve archive` and `torch-model-archiver`: their flags, and packing as they ask for it."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from pyserve.archive.manifest import RUNTIMES
from pyserve.archive.packing import FORMATS, ArchiverConfig, write_archive
from pyserve.commands.inspect_archive import readable_size, report_failure, size_on_disk
from pyserve.conversion.torchscript import check_packed
from pyserve.errors import ModelLoadError, ServeError


def add_archiver_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``torch-model-archiver``."""
    add = parser.add_argument
    add("--model-name", required=True, help="name of the model and of the archive: letters, digits, '_', '-', '.'")
    add("--handler", required=True, help="built-in handler (image_classifier, tensor, ...), or a file[.py][:function]")
    # Not "version": that is the command line's own flag, which prints and exits.
    add("-v", "--version", required=True, dest="model_version", metavar="VERSION", help="such as 1.0")
    add("--serialized-file", help="weights: .pt, .pth, .pt2, .onnx, .so; stored uncompressed")
    add("--model-file", help="Python file with the one model class, for weights saved as a state dict")
    add("--extra-files", help="comma-separated files, wildcards and folders (their content goes to the root)")
    add("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help="default: %(default)s")
    add("--export-path", default="", metavar="DIR", help="where to write; default: the current folder")
    add(
        "--archive-format",
        choices=FORMATS,
        default=FORMATS[0],
        help="default: .mar, code deflated, weights stored; zip-store: .mar, all stored; tgz: .tar.gz; "
        "no-archive: a folder",
    )
    add("-f", "--force", action="store_true", help="replace an archive that exists")
    add("-r", "--requirements-file", help="requirements.txt of the handler")
    add("-c", "--config-file", help="model-config.yaml")
    add("--no-check", action="store_true", help="do not try whether an eager model loads and can be traced")


def _check(path: Path) -> str:
    """Why a model that could share its weights between all requests will run in worker processes; or ``""``.

    Raises:
        ModelLoadError: it cannot be served.
    """
    try:
        return check_packed(path, lambda text: None)
    except ServeError as error:
        raise ModelLoadError(f"{path} is packed, but cannot be served: {error.message}") from error


def archive_command(args: argparse.Namespace) -> int:
    """Writes the archive, checks it and prints its path and size. Exit code: 0, or 1 with the reason on stderr."""
    try:
        given = {field.name: getattr(args, field.name) for field in fields(ArchiverConfig) if field.name != "version"}
        path = write_archive(ArchiverConfig(**given, version=args.model_version))
        note = "" if args.no_check else _check(path)
    except (ServeError, OSError) as error:
        return report_failure(error)
    print(f"{path} ({readable_size(size_on_disk(path))})")
    if note:
        print(f"note: it runs in worker processes, each with a copy of the model: {' '.join(note.split())}")
    return 0
