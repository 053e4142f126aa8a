"""``pyserve inspect``: what is in an archive, without unpacking it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pyserve.archive.archive import Survey, has_manifest, is_unpacked, open_archive, survey
from pyserve.archive.entries import Entry
from pyserve.archive.limits import configured_limits
from pyserve.archive.program_inputs import inputs_in
from pyserve.archive.weights import Weights
from pyserve.commands.backend_lines import archive_lines
from pyserve.commands.model_arguments import MODEL_HELP, add_given_arguments, given_in, prepare
from pyserve.conversion.record import conversion_of, is_converted, python_reason
from pyserve.conversion.torchscript import runs_in_python
from pyserve.errors import ServeError


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", metavar="MODEL", help=MODEL_HELP)
    add_given_arguments(parser)


def inspect_command(args: argparse.Namespace) -> int:
    """Prints what is in an archive without unpacking it. Exit code: 0, or 1 with the reason on stderr."""
    path = Path(args.archive)
    try:
        notes = [] if path.is_dir() and not has_manifest(path) else prepare(path, given_in(args), needs_input=False)
        for note in notes:
            print(note)
        with survey(path) as found:
            _print_survey(path, found)
    except (ServeError, OSError) as error:
        return report_failure(error)
    return 0


def _print_survey(path: Path, found: Survey) -> None:
    manifest = found.manifest
    print(
        f"{path.name}: {found.kind}, {readable_size(size_on_disk(path))}, "
        f"{sum(not entry.is_folder for entry in found.entries)} files"
    )
    print("\nMANIFEST")
    print("(none)" if manifest.raw is None else json.dumps(manifest.raw, indent=2))
    print(f"\nCONFIG {manifest.config_file or '(none)'}")
    if found.config.has_file:
        print(found.config.text.rstrip())
    print(f"\nENTRIES\n{'size':>14} {'packed':>14}  how       name")
    for entry in found.entries:
        if not entry.is_folder:
            print(f"{entry.size:>14} {entry.packed_size:>14}  {_how(found.kind, entry):<8}  {entry.name}")
    print(f"\n{_weights_line(found)}")
    line = _input_line(path, found)
    if line:
        print(f"input: {line}")
    line = _conversion_line(path, found)
    if line:
        print(f"conversion: {line}")
    _print_backends(path)
    for text in dict.fromkeys([*found.warnings, *found.needed]):
        print(f"warning: {text}")


def _how(kind: str, entry: Entry) -> str:
    if kind == "zip":
        return "stored" if entry.is_stored else "deflated"
    return "tar" if kind.startswith("tar") else "file"


def _weights_line(found: Survey) -> str:
    weights = found.weights
    if weights is None:
        return "weights: none"
    size = readable_size(weights.size)
    if found.kind == "folder":
        return f"weights: {weights.name}, {size}, used where it lies"
    if found.is_mapped:
        return f"weights: {weights.name}, {size}, mapped from the archive at byte {weights.offset}, not unpacked"
    return (
        f"weights: {weights.name}, {size}, unpacked once into the cache; "
        "pack with `pyserve archive` to have it mapped instead"
    )


def _input_line(path: Path, survey: Survey) -> str:
    """What a model's file by itself says that it takes; ``""`` if it does not, or where model-config.yaml does."""
    weights = survey.weights
    is_bare = path.is_file() and survey.kind not in ("zip", "tar", "tar.gz")
    if not is_bare or weights is None or survey.manifest.model_file or survey.config.raw.get("input") is not None:
        return ""
    held = Weights(weights.name, path, 0, path.stat().st_size)
    found = inputs_in(held, path.name, configured_limits())
    return f"{json.dumps(found[0])}, read from {found[1]}" if found else ""


def _conversion_line(path: Path, survey: Survey) -> str:
    """How a model file's model, or an exported program, got to the native lane, or why it did not, as far as this
    machine knows; ``""`` for others."""
    is_eager = survey.manifest.model_file is not None
    if not is_eager and (survey.weights is None or not survey.weights.name.lower().endswith(".pt2")):
        return ""
    if is_unpacked(path):
        with open_archive(path) as archive:
            if not is_converted(archive):
                return ""
            found, reason = conversion_of(archive), python_reason(archive)
        if reason:
            return f"none, it runs in worker processes: {reason}"
        if found is not None:
            model = "eager model" if is_eager else "exported program"
            said = ", as model-config.yaml says though it is not proven" if found.override else ""
            return (f"{found.how}{said}; {found.reason}; largest difference to the {model} {found.difference:.1e} "
                    f"(relative) on {found.probes} inputs")  # fmt: skip
    if not is_eager:
        return ""  # it may be compiled
    return "none kept on this machine; packing or starting it here makes one if its handler runs in the native lane"


def _print_backends(path: Path) -> None:
    """What is known of them, of an archive that runs in the native lane and was unpacked on this machine."""
    if not is_unpacked(path):
        return
    with open_archive(path) as archive:
        if not (archive.manifest.handler and archive.weights is not None) or runs_in_python(archive):
            return
        for line in archive_lines(archive):
            print(f"backend: {line}")


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_dir():
        return sum(os.path.getsize(file) for file in path.rglob("*") if os.path.isfile(file))
    return path.stat().st_size


def readable_size(size: int) -> str:
    """``"57.1 MiB"``."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def report_failure(error: Exception) -> int:
    """Prints one line on stderr and returns the exit code. That our output is not read any more is no failure."""
    if isinstance(error, BrokenPipeError):
        raise error
    text = str(error).splitlines()
    print(f"error: {text[0] if text else type(error).__name__}", file=sys.stderr)
    return 1
