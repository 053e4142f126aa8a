"""What commands say about backends: of this machine, and of an archive on it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pyserve.archive.archive import Archive
from pyserve.backends.kept import Made, read_choice, read_made
from pyserve.backends.shown import availability
from pyserve.backends.table import BACKENDS, TORCHSCRIPT
from pyserve.commands.doctor_check import NOTE, PASS, Check
from pyserve.cpu_budget import cpu_budget


def backend_checks() -> Iterator[Check]:
    """A line of ``pyserve doctor`` for each backend of this installation."""
    for name, version, missing in availability():
        label = BACKENDS[name].label
        yield Check(NOTE if missing else PASS, "backend", missing or f"{label} ({name}), version {version}")


def archive_lines(archive: Archive) -> Iterator[str]:
    """What is known on this machine of the backends of an archive whose handler runs in the native lane, a line each:
    what was chosen with the settings that it has by itself, and what became of making it for each.
    """
    config = archive.config
    precision, batch_size, cpus = config.precision or "fp32", config.batch_size or 1, cpu_budget()
    wanted = config.backend
    choice = read_choice(archive, precision, batch_size, cpus) if wanted in (None, "auto") else None
    if choice is not None:
        so_far = "" if choice.is_final else " so far, and others are still to be tried"
        yield f"{choice.backend} was chosen{so_far} (batch size {batch_size}, {cpus} CPUs): {choice.reason}"
    elif wanted == "auto":
        yield "auto: none was chosen on this machine yet; a server tries them behind its first requests"
    elif wanted is None:
        yield "model-config.yaml names none: TorchScript, unless default_backend in config.properties says otherwise"
    else:
        yield f"model-config.yaml says 'backend: {wanted}'"
    for name, row in BACKENDS.items():
        if name == TORCHSCRIPT:
            continue
        made = read_made(archive, name, precision)
        if made is not None or wanted in ("auto", name):
            yield f"{name}: {_of(made, row.missing())}"


def _of(made: Made | None, missing: str) -> str:
    if missing:
        return missing
    if made is None:
        return "not made on this machine yet"
    if made.error:
        return f"it cannot be made: {made.error}"
    note = f"; {made.note}" if made.note else ""
    return (f"made in {made.seconds:.1f} s, {made.size / 1e6:.1f} MB; largest difference to the model "
            f"{made.difference:.1e} (relative) on {made.probes} inputs{note}")  # fmt: skip
