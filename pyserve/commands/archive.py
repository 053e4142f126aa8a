"""`pyserve archive` and `torch-model-archiver`: their flags, and packing as they ask for it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive, open_archive, survey
from pyserve.archive.bare_file import CONFIG_NAME
from pyserve.archive.entries import MANIFEST_NAME
from pyserve.archive.given import given_for
from pyserve.archive.manifest import DEFAULT_VERSION, RUNTIMES
from pyserve.archive.packing import FORMATS, ArchiverConfig, write_archive
from pyserve.backends.making import Making, why_not_made
from pyserve.backends.table import BACKENDS
from pyserve.commands.inspect_archive import readable_size, report_failure, size_on_disk
from pyserve.commands.model_arguments import UsageError, given_in, prepare
from pyserve.conversion.torchscript import check_packed, needs_tracing
from pyserve.errors import ModelLoadError, ServeError
from pyserve.handler import BUILT_IN
from pyserve.torch_error import cause_of

# Findings of `pyserve check` with which a model cannot be served at all; others depend on what is sent.
_FATAL = ("archive", "load", "import", "syntax", "crash", "timeout")
_TEXT_SIZE_MAX = 400
# Seconds that `--compile` takes at most.
COMPILE_MAX_S = 3600.0


def add_archiver_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of ``torch-model-archiver``."""
    add = parser.add_argument
    is_ours = parser.prog.startswith("pyserve")
    if is_ours:
        add("model", nargs="?", metavar="MODEL", help="a model's file, or a folder without a manifest: named after it, "
            "version 1.0, and no other flag is needed")  # fmt: skip
        add("--input", action="append", default=[], metavar="DTYPE:SHAPE", help="with MODEL: one item of an input, "
            "without the batch: float32:3,224,224; of several inputs each with a name: ids=int64:2..64")  # fmt: skip
        add("--labels", metavar="FILE", help="with MODEL: index_to_name.json of image_classifier")
    add("--model-name", required=not is_ours,
        help="name of the model and of the archive: letters, digits, '_', '-', '.'")  # fmt: skip
    add("--handler", required=not is_ours,
        help="built-in handler (image_classifier, tensor, ...), or a file[.py][:function]")  # fmt: skip
    # Not "version": that is the command line's own flag, which prints and exits.
    add("-v", "--version", required=not is_ours, dest="model_version", metavar="VERSION", help="such as 1.0")
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
    add("--no-check", action="store_true", help="do not try whether the model loads, in a process of its own")


def _check(path: Path) -> str:
    """Why a model that could share its weights between all requests will run in worker processes; or ``""``.

    Raises:
        ModelLoadError: it cannot be served.
    """
    try:
        with open_archive(path) as archive:
            is_traced = needs_tracing(archive)
            is_built_in = archive.manifest.handler in BUILT_IN
        note = check_packed(path, lambda text: None)
        if is_built_in and not is_traced and importlib.util.find_spec("torch") is not None:
            _try_handler(path)
        return note
    except ServeError as error:
        raise ModelLoadError(f"{path} is packed, but cannot be served: {error.message}") from error


def _try_handler(path: Path) -> None:
    """Loads the model as a built-in handler does, and sends it the archive's samples, or what is made up for it.

    What then fails is printed.

    Raises:
        ServeError: it cannot be loaded.
    """
    from pyserve.commands import check, trial

    subject = trial.open_subject(path)
    try:
        findings = check.examine(subject, trial.own_samples(subject)).findings
    finally:
        subject.archive.close()
    for each in findings:
        step, _, said = each.what.partition(": ")
        what = each.what if each.kind in _FATAL else f"{step}: {cause_of(said)}"
        text = " ".join(f"{what}; {each.fix}".rstrip("; ").split())
        if each.kind in _FATAL:
            raise ModelLoadError(text)
        print(f"warning: {text if len(text) < _TEXT_SIZE_MAX else text[:_TEXT_SIZE_MAX] + ' ...'} (`pyserve check "
              f"{path}` says more)", file=sys.stderr)  # fmt: skip


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
                found = making.wait(progress.show, COMPILE_MAX_S, advice="this command gives it no more")
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


def _packed(args: argparse.Namespace) -> Path:
    """The archive, written.

    Raises:
        InvalidModelError: something is missing or cannot be packed.
        OSError: the disk is full or the like.
    """
    model = getattr(args, "model", None)
    given = {field.name: getattr(args, field.name) for field in fields(ArchiverConfig) if field.name != "version"}
    if model is not None:
        return _packed_from(Path(model), args, given)
    missing = [flag for flag, value in (("--model-name", args.model_name), ("--handler", args.handler),
                                        ("-v/--version", args.model_version)) if not value]  # fmt: skip
    if missing:
        raise UsageError(
            f"the following arguments are required: {', '.join(missing)}; or give the model's file alone, as in "
            "`pyserve archive net.pt`"
        )
    return write_archive(ArchiverConfig(**given, version=args.model_version))


def _packed_from(model: Path, args: argparse.Namespace, given: dict[str, Any]) -> Path:
    """The archive of a model's file, or of a folder without a manifest."""
    if args.serialized_file:
        raise UsageError(f"{model} and --serialized-file both name the model's file; leave one out")
    said = given_in(args)
    for note in prepare(model, said):
        print(f"note: {note}", file=sys.stderr)
    with open_archive(model) as archive, tempfile.TemporaryDirectory() as temporary:
        manifest, folder = archive.manifest, Path(temporary)
        if not archive.bare and not given_for(model).manifest:
            raise UsageError(f"{model} has a manifest already: it is an archive, or a folder that is served as it is")
        named: dict[str, Any] = {
            "model_name": args.model_name or manifest.model_name,
            "handler": manifest.handler if manifest.handler in BUILT_IN else str(archive.model_dir / manifest.handler),
            "model_file": _path_in(archive, manifest.model_file),
            "requirements_file": args.requirements_file or _path_in(archive, manifest.requirements_file),
        }
        if archive.weights is not None:
            weights = folder / archive.weights.name
            weights.symlink_to(archive.weights.path.absolute())
            named["serialized_file"] = str(weights)
        if archive.config.has_file or archive.inputs_from:
            config = folder / CONFIG_NAME
            config.write_text(archive.config.text)
            named["config_file"] = str(config)
        taken = {manifest.serialized_file, manifest.model_file, manifest.config_file, manifest.requirements_file,
                 manifest.handler.partition(":")[0], MANIFEST_NAME}  # fmt: skip
        others = folder / "others"  # one folder: names may have commas and wildcards, and those below it keep theirs
        for name in archive.files:
            if name not in taken:
                (others / name).parent.mkdir(parents=True, exist_ok=True)
                (others / name).symlink_to((archive.model_dir / name).absolute())
        extra = [args.extra_files, str(others) if others.exists() else None]
        named["extra_files"] = ",".join(filter(None, extra)) or None
        return write_archive(ArchiverConfig(**{**given, **named}, version=args.model_version or DEFAULT_VERSION))


def _path_in(archive: Archive, name: str | None) -> str | None:
    return str(archive.model_dir / name) if name else None


def archive_command(args: argparse.Namespace) -> int:
    """Writes the archive, checks it and prints its path and size. Exit code: 0, or 1 with the reason on stderr."""
    try:
        path = _packed(args)
        with survey(path) as found:
            for warning in found.config.warnings:
                print(f"warning: {warning}", file=sys.stderr)
        note = "" if args.no_check else _check(path)
        print(f"{path} ({readable_size(size_on_disk(path))})", flush=True)
        if note:
            print(f"note: it runs in worker processes, each with a copy of the model: {' '.join(note.split())}")
        if args.compile:
            _compile(path)
    except UsageError:
        raise
    except (ServeError, OSError) as error:
        return report_failure(error)
    return 0
