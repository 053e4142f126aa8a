"""The process that makes one archive's model for other backends, compares what it made with the model, and keeps it.

What becomes of it goes to the parent (pyserve/backends/making.py) as JSON lines:

    {"progress": text}
    {"backend": name}       the one that is made from here on
    {"made": text}          a `kept.Made` as JSON: what became of it
    {"error": text, "lasts": bool}   of the model, before any backend
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.drafts import check_writable
from pyserve.backends.kept import Made, digests_of, draft, keep, size_of
from pyserve.backends.table import AGREEMENT, BACKENDS
from pyserve.conversion.child import weights_size
from pyserve.cpu_budget import cpu_budget
from pyserve.errors import ModelLoadError, ServeError
from pyserve.os_errors import cause_of as os_cause_of
from pyserve.torch_error import cause_of

# Probes are run for no longer than this, seconds, but so many of them. Requests come first, so that these are slow.
PROBING_S = 20.0
PROBES_MIN = 8
# What is written beside the weights, and times they are: compilers keep a copy while they work, and loaders unpack one.
CODE_SIZE = 16 << 20
COPIES = 4

# Words of errors that are the machine's, not the model's: another try may do better.
_OF_THE_MACHINE = ("no space", "memory", "killed", "compileerror", "compiler", "timeout", "timed out", "permission")

Report = Callable[..., None]


def main(descriptor: int, task: dict[str, Any]) -> int:
    """Writes JSON lines to ``descriptor``. Returns the exit code."""
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with_reader, args=(descriptor,), daemon=True).start()
    _give_way(task["nice"])
    # Where torch would keep what it compiles; each package has a folder of its own.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

    def report(**fields: str | bool) -> None:
        line = memoryview(json.dumps(fields).encode() + b"\n")
        while line:
            line = line[os.write(descriptor, line) :]

    try:
        with open_archive(task["archive"], cache_dir=task["cache"]) as archive:
            if archive.sha256 != task["sha256"]:
                report(error=f"{archive.name} is another file by now; register the model again", lasts=False)
                return 1
            archive.use_handler(task["handler"])
            _make_all(archive, task["backends"], task["precision"], task["batch_size_max"], report)
    except Exception as error:
        report(**failure_of(error))
        return 1
    return 0


def _end_with_reader(descriptor: int) -> None:
    """Ends this process and what it started once nobody reads its reports."""
    poll = select.poll()
    poll.register(descriptor, 0)
    poll.poll()
    os.killpg(0, signal.SIGKILL)


def _give_way(nice: int) -> None:
    """Has requests come first. The nice value alone counts among the processes of a session only, where the kernel
    groups processes by sessions; then the session has one too."""  # fmt: skip
    os.nice(nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def failure_of(error: Exception) -> dict[str, Any]:
    """What `kept.Made` says of an error: ``error`` and ``lasts``."""
    from pyserve.backends.sources import UnsuitableError
    from pyserve.conversion.record import NeedsPythonError

    if isinstance(error, _DisagreesError):
        return {each: getattr(error.made, each) for each in ("error", "difference", "probes", "size", "note")}
    if isinstance(error, ServeError):
        return {"error": error.message, "lasts": isinstance(error, (UnsuitableError, NeedsPythonError))}
    if isinstance(error, OSError):
        return {"error": f"what is made cannot be kept: {os_cause_of(error)}; free space, or set PYSERVE_CACHE to a "
                         "folder on a larger disk", "lasts": False}  # fmt: skip
    if isinstance(error, MemoryError):
        return {"error": "there is not enough memory to make it", "lasts": False}
    text = f"{type(error).__name__}: {error}".lower()
    cause = cause_of(str(error))
    return {"error": f"{type(error).__name__}{': ' if cause else ''}{cause}"[:500],
            "lasts": not any(word in text for word in _OF_THE_MACHINE)}  # fmt: skip


def _make_all(archive: Archive, backends: Sequence[str], precision: str, batch_size_max: int, report: Report) -> None:
    import torch

    from pyserve.backends.sources import narrow, open_source

    torch.set_num_threads(cpu_budget())
    torch._C._jit_set_profiling_mode(False)

    def progress(text: str) -> None:
        report(progress=text)

    with torch.inference_mode(False):
        try:
            source = open_source(archive, progress)
            progress("exporting it")
            source.program()
            ranges = narrow(source)
            source.calibrate(precision)
            probes = source.probes(batch_size_max)
        except Exception as error:
            failure = failure_of(error)
            for name in backends:
                _keep_failure(archive, Made(name, precision, **failure), report)
            return
        sizes = tuple(domain.sizes for domain in source.domains)
        expected: dict[int, Any] = {}
        for name in backends:
            report(backend=name)
            progress(f"making it for {BACKENDS[name].label}")
            blank = Made(name, precision, ranges=tuple(ranges), sizes=sizes)
            started_at = time.monotonic()
            try:
                report(made=_make(source, blank, probes, expected, progress).to_json())
            except Exception as error:
                seconds = time.monotonic() - started_at
                _keep_failure(archive, replace(blank, seconds=seconds, **failure_of(error)), report)


def _make(
    source: Any, blank: Made, probes: Sequence[Any], expected: dict[int, Any], progress: Callable[[str], None]
) -> Made:
    """Makes one, compares it and keeps it.

    Raises:
        Exception: of any kind; nothing is kept.
    """
    from pyserve.backends.precision import measure_agreement
    from pyserve.backends.sources import LOWER
    from pyserve.proof.agreement import Precisions, agreement

    row = BACKENDS[blank.backend]
    source.notes.clear()  # of one before that was not made
    started_at = time.monotonic()
    with draft(source.archive, blank.backend, blank.precision) as folder:
        size = weights_size(source.model)
        check_room(folder, size)
        try:
            run = importlib.import_module(row.maker).make(source, folder, blank.precision)
        except Exception:
            check_room(folder, size)  # if it is for the disk, that is what is to be said
            raise
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        progress(f"comparing {row.label} with the model")
        compared_at = time.monotonic()

        def is_enough(count: int) -> bool:
            return count >= PROBES_MIN and time.monotonic() - compared_at > PROBING_S

        lower = LOWER.get(blank.precision)
        found = agreement(
            source.run, run, probes, AGREEMENT[blank.precision], is_enough=is_enough, expected=expected,
            precisions=None if lower is None else Precisions(source.run, partial(source.run_at, lower)),
            exact=source.run_exactly() if blank.precision == "fp32" else None,
        )  # fmt: skip
        made = replace(
            blank, seconds=time.monotonic() - started_at, difference=found.difference, probes=found.probes,
            error=found.objection, note="; ".join(source.notes), size=size_of(folder),
        )  # fmt: skip
        if found.objection:
            raise _DisagreesError(made)
        if source.items:
            progress(f"comparing {blank.precision} with fp32 on {len(source.items)} calibration items")
            made = replace(made, agreement=measure_agreement(source.run, run, source.items).to_json())
        made = replace(made, digests=digests_of(folder))
        keep(source.archive, made, folder)
    return made


class _DisagreesError(Exception):
    """What was made gives other answers than the model.

    Attributes:
        made: with the objection.
    """

    def __init__(self, made: Made):
        super().__init__(made.error)
        self.made = made


def _keep_failure(archive: Archive, made: Made, report: Report) -> None:
    """Reports it, and keeps it where another try would end alike."""
    if made.lasts:
        with contextlib.suppress(OSError), draft(archive, made.backend, made.precision) as folder:
            keep(archive, made, folder)
    report(made=made.to_json())


def check_room(folder: Path, size: int) -> None:
    """That weights of ``size`` bytes can be written to ``folder``, with what compilers write beside them: they and
    torch end the process on a full disk, and others tell of it in words of nobody's.

    Raises:
        ModelLoadError: the disk has no room for them.
        OSError: a quota or a limit has not.
    """
    needed = COPIES * size + CODE_SIZE
    room = shutil.disk_usage(folder).free
    if room < needed:
        raise ModelLoadError(
            f"what is made of it, about {needed} bytes with the compiler's copies, cannot be kept: the disk of the "
            f"cache folder is full ({room} bytes are free); free space, or set PYSERVE_CACHE to a folder on a larger "
            "disk"
        )
    check_writable(folder / "room", size)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2])))
