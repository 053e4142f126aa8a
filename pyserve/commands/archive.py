"""`pyserve archive` and `torch-model-archiver`: their flags, and packing as they ask for it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import fields
from pathlib import Path

from pyserve.archive.archive import open_archive
from pyserve.archive.manifest import RUNTIMES
from pyserve.archive.packing import FORMATS, ArchiverConfig, write_archive
from pyserve.backends.making import Making, why_not_made
from pyserve.backends.table import BACKENDS
from pyserve.commands.inspect_archive import readable_size, report_failure, size_on_disk
from pyserve.conversion.torchscript import check_packed
from pyserve.errors import ModelLoadError, ServeError

# Seconds that `--compile` takes at most.
COMPILE_MAX_S = 3600.0


def add_archiver_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``torch-model-archiver``."""
    add = parser.add_argument
    add("--model-name", required=True, help="name of the model and of the archive: letters, digits, '_', '-', '.'")
    add("--handler", required=True, help="built-in handler (image_classifier, tensor, ...), or a file[.py][:function]")
    # Not "version": that is the command line's own flag, which prints and exits.
    add("-v", "--version", required=True, dest="model_version", metavar="VERSION", help="such as 1.0")
    add("--serialized-file", help="weights: .pt, .pth, .safetensors, .pt2, .onnx, .so; stored uncompressed")
    add("--model-file", help="Python file with the one model class, for weights saved as a state dict")
    add("--extra-files", help="comma-separated files, wildcards and folders (their content goes to the root)")
    add("--calibration", metavar="DIR", help="folder of pictures, JSON bodies, .npy or .pt files that are like the "
        "requests to come, for precision: int8; it is packed as calibration/")  # fmt: skip
    add("--warmup", metavar="DIR", help="folder of request bodies (.json, .jpg, .png, .txt, .bin, .pt) that the model "
        "is run with before it is ready; it is packed as warmup/")  # fmt: skip
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
    add("--compile", action="store_true", help="make the model for the other backends of this machine (OpenVINO, "
        "AOTInductor) now, into its cache, so that the first start does not; takes minutes")  # fmt: skip
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


def _compile(path: Path) -> None:
    """Makes the model for all backends that are here, and prints a line for each. What cannot be made is no failure of
    the archive: it is served by the next best one.

    Raises:
        ServeError: the archive cannot be opened.
    """
    with open_archive(path) as archive:
        reason = why_not_made(archive)
        if reason:
            print(f"nothing is compiled: {' '.join(reason.split())}")
            return
        config = archive.config
        makers = [name for name, row in BACKENDS.items() if row.maker]
        making = Making(archive, makers, config.precision or "fp32", config.batch_size or 1, nice=0)
        with contextlib.closing(_Progress()) as progress:
            try:
                found = making.wait(progress.show, COMPILE_MAX_S)
            finally:
                making.stop()
    for made in found:
        label = BACKENDS[made.backend].label
        if made.error:
            print(f"{label}: not made: {' '.join(made.error.split())}")
        else:
            print(f"{label}: made in {made.seconds:.0f} s, {readable_size(made.size)}, largest difference to the model "
                  f"{made.difference:.0e}")  # fmt: skip


class _Progress:
    """Steps as they come: one line that changes on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        if self._is_shown:
            print(f"\r\x1b[K{text} ...", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def archive_command(args: argparse.Namespace) -> int:
    """Writes the archive, checks it and prints its path and size. Exit code: 0, or 1 with the reason on stderr."""
    try:
        given = {field.name: getattr(args, field.name) for field in fields(ArchiverConfig) if field.name != "version"}
        path = write_archive(ArchiverConfig(**given, version=args.model_version))
        note = "" if args.no_check else _check(path)
        print(f"{path} ({readable_size(size_on_disk(path))})", flush=True)
        if note:
            print(f"note: it runs in worker processes, each with a copy of the model: {' '.join(note.split())}")
        if args.compile:
            _compile(path)
    except (ServeError, OSError) as error:
        return report_failure(error)
    return 0
