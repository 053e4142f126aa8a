"""What became of an eager archive's model: where its TorchScript is kept, how it was made, and why it was believed.

Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from pyserve.archive.archive import Archive
from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import ModelLoadError
from pyserve.handlers.compile_arguments import compile_arguments

# Of weights that are TorchScript already.
TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")
# Part of the kept files' names: what an earlier proof accepted is proven again.
PROOF = 3

# Models are frozen when they are converted, where it is done once, if nothing has to be changed in them afterwards.
_FROZEN_AS = ("fp32", "contiguous")


class NeedsPythonError(ModelLoadError):
    """The archive is fine, but the native lane cannot run it: it has to run in a worker process."""


@dataclass(frozen=True)
class Conversion:
    """How a TorchScript came about.

    Attributes:
        how: ``traced``, ``scripted`` or ``exported`` (by torch.export, here or before, its graph made TorchScript).
        reason: why it is believed, or what is against it; one line.
        probes: how many inputs it was compared with the eager model on.
        difference: the largest one, relative.
        override: it was taken though it could not be proven, because model-config.yaml says so.
        reads: what the model's code does to look at the numbers of a whole batch, such as ``__bool__``; ``""`` if it
            does not. What it does with one item may then depend on the others.
        run_s: how long one run of the model for one item took, seconds.
    """

    how: str
    reason: str
    probes: int
    difference: float
    override: bool = False
    reads: str = ""
    run_s: float = 0.0


def is_exported(archive: Archive) -> bool:
    """Whether its weights are a program of torch.export (``.pt2``) that was not compiled; False for a damaged one."""
    weights = archive.weights
    if weights is None or archive.manifest.model_file is not None or weights.suffix != ".pt2":
        return False
    try:
        with weights.open() as file, zipfile.ZipFile(file) as members:
            return not any("/aotinductor/" in name for name in members.namelist())
    except DAMAGED_ZIP:
        return False


def is_converted(archive: Archive) -> bool:
    """Whether TorchScript has to be made of what is in it: it has a model file, or an exported program."""
    return archive.manifest.model_file is not None or is_exported(archive)


def is_frozen(archive: Archive) -> bool:
    """Whether the kept TorchScript is frozen already."""
    config = archive.config
    precision = config.precision if config.precision != "int8" else None  # which is made of the model in fp32
    return (precision or "fp32", config.memory_format or "contiguous") == _FROZEN_AS


def traced_file(archive: Archive) -> Path:
    """Where the TorchScript made from this archive by this torch, as its model-config.yaml wants it, is kept."""
    kind = "traced" if is_frozen(archive) else "traced-unfrozen"
    return archive.cache_file(f"{_named(archive, kind)}.pt")


def untraceable_note(archive: Archive) -> Path:
    """Where it is kept why this torch cannot make TorchScript of this archive, so that it is tried only once."""
    return archive.cache_file(f"{_named(archive, 'untraceable')}.txt")


def conversion_file(traced: Path) -> Path:
    """What is kept beside a TorchScript file: how it was made."""
    return traced.with_suffix(".json")


def _named(archive: Archive, kind: str) -> str:
    # Its handler says what its inputs look like.
    by = f"-by-{hashlib.sha256(archive.given_handler.encode()).hexdigest()[:8]}" if archive.given_handler else ""
    return f"{kind}-proof-{PROOF}-{archive.config.conversion or 'auto'}{by}-torch-{version('torch')}"


def python_reason(archive: Archive) -> str:
    """Why the archive's model file runs in worker processes, as far as is known; ``""`` if nothing says so."""
    if archive.config.conversion == "python":
        return "model-config.yaml says 'conversion: python'"
    compiled = compile_reason(archive)
    if compiled and archive.manifest.model_file is not None and archive.config.backend is None:
        return f"{compiled}; 'backend: aotinductor' in its place has it compiled for the native lane"
    try:
        return untraceable_note(archive).read_text()
    except FileNotFoundError:
        return ""


def compile_reason(archive: Archive) -> str:
    """What ``pt2`` in model-config.yaml asks for that is done in worker processes; ``""`` if it asks for nothing.

    What cannot be understood is left to the worker, which refuses it with the reason.
    """
    try:
        arguments = compile_arguments(archive.config.raw)
    except ModelLoadError as error:
        return error.message
    if arguments is None:
        return ""
    return f"'pt2' in model-config.yaml asks for torch.compile ({arguments.get('backend', 'inductor')})"


def conversion_of(archive: Archive) -> Conversion | None:
    """How the kept TorchScript of this archive was made; None if there is none."""
    try:
        found = json.loads(conversion_file(traced_file(archive)).read_text())
        return Conversion(**found)
    except (OSError, ValueError, TypeError):
        return None


def conversion_text(conversion: Conversion) -> str:
    """As JSON, the infinite difference as a text that JSON can hold."""
    return json.dumps({**asdict(conversion), "difference": min(conversion.difference, 1e300)})
