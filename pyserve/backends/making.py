"""The process that makes an archive's model for other backends, seen from outside.

A process of its own because the model file is somebody's code, because compilers crash and take memory, and because it
can be ended at any time. It runs at a low priority, so that requests come first. What it makes is data, kept in
the archive's cache. This side needs no torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from pyserve.archive.archive import Archive
from pyserve.archive.drafts import draft_folder, remove_left_drafts
from pyserve.backends.kept import Made, forget_damaged, read_made
from pyserve.backends.precision import why_not
from pyserve.backends.table import BACKENDS
from pyserve.child_reports import report_lines, report_of
from pyserve.conversion.record import TORCHSCRIPT_SUFFIXES
from pyserve.conversion.torchscript import python_reason, runs_in_python
from pyserve.launch import ROOT_DIR, SAFE_PATH, child_environment, child_folder, describe_exit, stderr_file

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

# Suffixes of weights that others can be made of, without a model file.
MADE_FROM = (*TORCHSCRIPT_SUFFIXES, ".pt2")

STOPPED = "it was stopped"
# What to do about one that took too long, where `startupTimeout` was the limit.
WHILE_STARTING = (
    "raise startupTimeout in model-config.yaml, or have it made when the archive is packed: pyserve archive --compile"
)
# For a child that has said everything, or closed its end, to end by itself.
_LEAVING_S = 2.0
_LOOK_S = 0.02
# Its priority where nobody waits for it. Beside requests that take all of the CPUs it gets about a tenth of one; at the
# lowest priority it would never come to its end.
GIVING_WAY = 10


def why_not_made(archive: Archive) -> str:
    """Why nothing is to be made of this archive, as far as can be seen without torch; ``""`` if it may be tried."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed here"
    if archive.needed or archive.config.needed:
        return (*archive.needed, *archive.config.needed)[0]
    if runs_in_python(archive):
        return f"its handler {archive.manifest.handler} runs in worker processes, which have the model itself"
    weights = archive.weights
    if archive.manifest.model_file is None and (weights is None or weights.suffix not in MADE_FROM):
        return f"{'there is no model in it' if weights is None else weights.name + ' is run by a library of its own'}"
    return python_reason(archive)


class Making:
    """A running making. `wait`, `each` or `stop` must be called.

    What is kept already is not made again: with nothing to make, no process is started.

    Attributes:
        is_late: it was given up when its time was over; or continues, see `each`.
    """

    def __init__(
        self,
        archive: Archive,
        backends: Sequence[str],
        precision: str = "fp32",
        batch_size_max: int = 1,
        *,
        nice: int = GIVING_WAY,
        is_over: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
            backends: names of `table.BACKENDS`; made in this order.
            batch_size_max: answers are compared up to this many rows.
            nice: priority of the process; 0 if somebody waits for it.
            is_over: whether it is to be stopped; called some times a second while it is waited for.
        """
        self._archive = archive
        self._backends = list(backends)
        self._precision = precision
        self._batch_size_max = batch_size_max
        self._nice = nice
        self._is_over = is_over
        self.is_late = False
        self._found: dict[str, Made] = {}
        self._given: set[str] = set()  # by `each`
        self._running = ""  # the one that the child has begun
        self._is_stopped = False
        self._lock = threading.Lock()  # of the four below
        self._scratch: ExitStack | None = None  # removes its temporary files
        self._process: subprocess.Popen[bytes] | None = None
        self._reports: BinaryIO | None = None
        self._stderr: BinaryIO | None = None
        for name in self._backends:
            if not BACKENDS[name].maker:
                self._found[name] = Made(name, precision)
            elif precision not in BACKENDS[name].precisions:
                self._found[name] = self._failed(name, f"{BACKENDS[name].label} does not run at {precision}")
            elif reason := BACKENDS[name].missing() or why_not(name, precision):
                self._found[name] = self._failed(name, reason)
            elif kept := read_made(archive, name, precision):
                self._found[name] = kept
        self._start()

    @property
    def left(self) -> list[str]:
        """Names of those of which nothing is known yet."""
        return [name for name in self._backends if name not in self._found]

    def wait(self, progress: Progress, timeout_s: float, *, advice: str = WHILE_STARTING) -> list[Made]:
        """What became of each backend, in the order they were asked for. Any thread, once.

        One that failed, could not be made in ``timeout_s`` seconds or was stopped has an ``error``; nothing is raised
        for these.

        Args:
            progress: called with a line of text at each step.
            advice: what to do about one that takes longer.
        """
        found = {made.backend: made for made in self.each(progress, timeout_s, advice=advice)}
        return [found[name] for name in self._backends]

    def give_way(self) -> None:
        """Nobody waits for it any more: requests come first from here on."""
        with self._lock:
            if self._process is not None:
                _give_way(self._process.pid)

    def each(
        self, progress: Progress, timeout_s: float, *, advice: str = WHILE_STARTING, continues: bool = False
    ) -> Iterator[Made]:
        """As `wait`, each as soon as it is known, while the next one is being made. To be iterated to its end.

        Args:
            advice: what to do about one that takes longer than ``timeout_s`` seconds.
            continues: it does not end then, and is to be asked again.
        """
        deadline = time.monotonic() + timeout_s
        self.is_late = False
        self._forget_damaged()
        try:
            yield from self._news()
            while self.left and not self._is_stopped:
                for line in self._lines(deadline):
                    self._note(line, progress)
                    yield from self._news()
                    if not self.left:
                        break
                if not self.left or self._is_stopped:
                    break
                if time.monotonic() >= deadline:
                    self.is_late = True
                    if continues:
                        return
                    self._give_up(f"making it took longer than {timeout_s:.0f} s; {advice}")
                    break
                self._note_crash()
                yield from self._news()
                self._end()
                self._start()
            if self._process is not None and not self.left and not self._is_stopped:
                _let_end(self._process)
        finally:
            if not (continues and self.is_late):
                self._end()
        self._give_up(STOPPED)
        yield from self._news()

    def _forget_damaged(self) -> None:
        """Has made again what was kept but is not whole. Here, since reading it takes its time."""
        kept = [name for name, made in self._found.items() if name not in self._given and BACKENDS[name].maker]
        damaged = forget_damaged(self._archive, kept, self._precision)
        if damaged:
            for name in damaged:
                del self._found[name]
            self._end()  # it has hardly begun
            self._start()

    def _news(self) -> Iterator[Made]:
        """What became known since it was called last."""
        for name in self._backends:
            if name in self._found and name not in self._given:
                self._given.add(name)
                yield self._found[name]

    def stop(self) -> None:
        """Ends the child and what it has started, if it still runs; `wait` returns at once. Any thread, any number of
        times."""  # fmt: skip
        self._is_stopped = True
        with self._lock:
            if self._process is not None:
                _kill(self._process)
        # `wait` sees the end of the reports, and lets go of the rest; without one the pipe goes with this object.

    def _start(self) -> None:
        if not self.left:
            return
        with self._lock:
            if self._is_stopped:
                return
            try:
                self._launch()
            except OSError as error:
                self._note_all(f"its process cannot be started: {error.strerror or type(error).__name__}")

    def _launch(self) -> None:
        """Raises OSError; `_end` lets go of what there is by then. REQUIRES: the lock is held."""
        kept = self._archive.cache_file("made").parent
        self._stderr = stderr_file()
        # Compilers and loaders of packages leave their files behind when they are killed.
        self._scratch = ExitStack()
        scratch = self._scratch.enter_context(draft_folder(kept / "scratch"))
        reports, for_child = os.pipe()
        self._reports = open(reports, "rb", buffering=0)  # noqa: SIM115  # `_end` closes it
        task = {
            "archive": str(self._archive.path), "sha256": self._archive.sha256,
            "handler": self._archive.manifest.handler, "cache": str(kept.parents[2]), "backends": self.left,
            "precision": self._precision, "batch_size_max": self._batch_size_max, "nice": self._nice,
        }  # fmt: skip
        environment = {**child_environment(), "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT_DIR), os.environ.get("PYTHONPATH", "")])
        )}  # fmt: skip
        try:
            self._process = subprocess.Popen(
                [sys.executable, *SAFE_PATH, "-m", "pyserve.backends.child", str(for_child), json.dumps(task)],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,  # compilers print
                stderr=self._stderr,
                pass_fds=(for_child,),
                cwd=child_folder(),
                env=environment,
                start_new_session=True,  # what it starts ends with it
            )
        finally:
            os.close(for_child)

    def _note(self, line: bytes, progress: Progress) -> None:
        """Takes one of the child's reports."""
        report = report_of(line, self._archive.name)
        if "progress" in report:
            progress(str(report["progress"]))
        if report.get("backend") in self._backends:
            self._running = report["backend"]
        if "made" in report:
            self._note_made(report["made"])
        if "error" in report:  # of the model, before any backend
            self._note_all(str(report["error"]), lasts=bool(report.get("lasts", False)))

    def _note_made(self, text: Any) -> None:
        made = None
        with contextlib.suppress(ValueError):
            made = Made.from_json(text)
        if made is None or made.backend not in self._backends:
            log.warning("%s: what its child process says of a backend cannot be read, and is left out: %.200r",
                        self._archive.name, text)  # fmt: skip
            return
        self._found[made.backend] = made
        self._running = ""

    def _lines(self, deadline: float) -> Iterator[bytes]:
        reports = self._reports
        if reports is None:
            return
        yield from report_lines(reports.fileno(), deadline, self._is_gone)

    def _is_gone(self) -> bool:
        if self._is_over():
            self.stop()
        process = self._process
        return self._is_stopped or process is None or _has_ended(process)

    def _note_crash(self) -> None:
        """The child is gone without a word about the backend it was at, or about any."""
        process, stderr = self._process, self._stderr
        assert process is not None and stderr is not None
        _let_end(process)
        if self._is_stopped:
            return
        _kill(process)  # one that has closed its end and stays, and the compilers that it had started
        with self._lock:  # `stop` is not to signal a number that may be another's then
            ended = describe_exit(process.wait())
        stderr.seek(0)
        lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
        text = f"the process that made it {ended}{f': {lines[-1][:300]}' if lines else ''}"
        if self._running:
            self._found[self._running] = self._failed(self._running, text)
            self._running = ""
        else:
            self._note_all(text)

    def _note_all(self, error: str, *, lasts: bool = False) -> None:
        for name in self.left:
            self._found[name] = self._failed(name, error, lasts=lasts)

    _give_up = _note_all

    def _failed(self, name: str, error: str, *, lasts: bool = False) -> Made:
        return Made(name, self._precision, error=error, lasts=lasts)

    def _end(self) -> None:
        with self._lock:
            process, files, scratch = self._process, (self._reports, self._stderr), self._scratch
            self._process = self._reports = self._stderr = None
            self._scratch = None
        # Without the lock: `stop` is called by the event loop, and files of this size take their time.
        if process is not None:
            _kill(process)
            process.wait()
            remove_left_drafts(self._archive.cache_file("made").parent)
        if scratch is not None:
            scratch.close()
        for file in files:
            if file is not None:
                file.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends it and what it has started; does not wait for that."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _give_way(pid: int) -> None:
    """As the child does itself where nobody waits for it, see `child._give_way`: it, and what it has started."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PGRP, pid, GIVING_WAY)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(GIVING_WAY))


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Does not reap it: its group is still its own then, and can be ended."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _let_end(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LEAVING_S
    while not _has_ended(process) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
