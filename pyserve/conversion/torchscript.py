"""Turns an eager model (model file and state dict), or an exported program, into TorchScript, in a process of its own.

A process of its own because the model file is somebody's code: it may import its neighbours under names another
archive uses too, change globals or crash; and reading an exported program may run what is in it. What comes out is
data, kept in the archive's cache, so that the second start does not trace again.

The parent side needs no torch, so that a server can begin tracing before it imports torch itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.drafts import remove_left_drafts, write_whole
from pyserve.archive.manifest import handler_file, split_handler
from pyserve.child_reports import report_lines, report_of
from pyserve.conversion.record import (
    Conversion,
    NeedsPythonError,
    conversion_of,
    is_converted,
    is_frozen,
    python_reason,
    traced_file,
    untraceable_note,
)
from pyserve.errors import ModelLoadError
from pyserve.handler import BUILT_IN
from pyserve.launch import ROOT_DIR, child_folder, stderr_file

__all__ = [
    "Conversion", "NeedsPythonError", "Progress", "Tracing", "check_packed", "conversion_of", "is_converted",
    "native_example", "needs_tracing", "python_reason", "runs_in_python", "traced_file", "untraceable_note",
]  # fmt: skip

Progress = Callable[[str], None]


class Tracing:
    """A running conversion. `wait` or `stop` must be called.

    The child reports through a pipe of its own, so that what the model file prints is nobody's business.
    """

    def __init__(self, archive: Archive):
        self._archive = archive
        folder = ROOT_DIR
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        freezes = "frozen" if is_frozen(archive) else "unfrozen"
        self._stderr = stderr_file()  # a pipe would have to be read too
        self._reports, for_child = os.pipe()
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pyserve.conversion.child",
                    str(archive.path),
                    str(traced_file(archive)),
                    freezes,
                    archive.manifest.handler,
                    str(for_child),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(for_child,),
                cwd=child_folder(),
                env={**os.environ, "PYTHONPATH": path},
            )
        except BaseException:
            os.close(self._reports)
            self._stderr.close()
            raise
        finally:
            os.close(for_child)
        self._is_over = False

    def wait(self, progress: Progress, timeout_s: float, is_over: Callable[[], bool] = lambda: False) -> Path:
        """The TorchScript file.

        Args:
            is_over: nobody wants it any more; asked some times a second.

        Raises:
            NeedsPythonError: it works, but cannot be converted.
            ModelLoadError: the model cannot be built, or does not fit its weights.
        """
        deadline = time.monotonic() + timeout_s
        problem: str | None = None
        works = False
        try:
            for line in report_lines(self._reports, deadline, lambda: self._process.poll() is not None or is_over()):
                report = report_of(line, self._archive.name)
                problem = report.get("error", problem)
                works = report.get("works", works)
                if "progress" in report:
                    progress(report["progress"])
            if is_over():
                raise ModelLoadError(f"converting {self._archive.name} was ended: the model is not wanted any more")
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
            last = self._last_error_line()
        except subprocess.TimeoutExpired:
            raise ModelLoadError(
                f"tracing {self._archive.name} took longer than startup_timeout={timeout_s} s; raise startupTimeout in "
                "its model-config.yaml"
            ) from None
        finally:
            self.stop()
        if status == 0:
            return traced_file(self._archive)
        if works and problem:
            with contextlib.suppress(OSError):  # the next start finds out again
                note = untraceable_note(self._archive)
                write_whole(note, lambda path: Path(path).write_text(problem))
            raise NeedsPythonError(problem)
        raise ModelLoadError(problem or f"tracing {self._archive.name} failed: {_ending(status)}{last}")

    def _last_error_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def stop(self) -> None:
        """Ends the child, if it still runs, and lets go of it."""
        if self._is_over:
            return
        self._is_over = True
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            remove_left_drafts(traced_file(self._archive).parent)
        os.close(self._reports)
        self._stderr.close()


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def needs_tracing(archive: Archive) -> bool:
    """Whether there is a model file or an exported program that can be converted, a handler that runs in the native
    lane, and no conversion kept."""  # fmt: skip
    if archive.needed or archive.config.needed or runs_in_python(archive) or not is_converted(archive):
        return False
    return not traced_file(archive).exists() and not python_reason(archive)


def runs_in_python(archive: Archive) -> bool:
    """Whether the archive's handler, as far as can be seen without torch, is one for worker processes."""
    handler = archive.manifest.handler
    if not handler:
        return False  # nothing runs it
    module, function = split_handler(handler)
    brings_code = handler_file(handler, archive.files.__contains__) and archive.config.raw.get("isolation") != "thread"
    built_in = BUILT_IN.get(module.removesuffix(".py"))
    return bool(function or brings_code or (built_in is not None and built_in.lane == "python"))


def native_example(handler, context):  # type: ignore[no-untyped-def]  # the parent side has no torch
    """One item as the handler's `preprocess` makes it: a tuple of tensors [1, ...], one per input of the model.

    Raises:
        NeedsPythonError: nobody says what it looks like, so nothing can be traced or warmed up with it.
    """
    try:
        example = handler.example_input(context)
        return example if isinstance(example, tuple) else (example,)
    except ModelLoadError as error:
        raise NeedsPythonError(error.message) from error


def check_packed(path: Path, progress: Progress, timeout_s: float = 600.0) -> str:
    """Traces a freshly packed eager archive: it is shown to load, and its first start here finds the work done.

    Does nothing for other archives, and where torch is not installed.

    Returns:
        Why it will run in worker processes although its handler would not need them; or ``""``.

    Raises:
        ModelLoadError: it cannot be served as it was packed.
    """
    if importlib.util.find_spec("torch") is None:
        return ""
    with open_archive(path) as archive:
        if archive.config.conversion == "python" and is_converted(archive):
            return python_reason(archive)
        if needs_tracing(archive):
            try:
                Tracing(archive).wait(progress, timeout_s)
            except NeedsPythonError as error:
                return error.message
    return ""
