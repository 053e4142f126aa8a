"""``pyserve check``: tries a model for what would fail once it is served, before it is.

The handler runs in a child process (`pyserve.commands.check_child`): one that crashes or does not end is a finding too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pyserve import launch
from pyserve.commands import check_child as check_run
from pyserve.commands import terminal as console
from pyserve.commands import trial as dry_run
from pyserve.commands.model_arguments import given_in
from pyserve.commands.trial import Input, Subject
from pyserve.errors import JsonObject, ServeError

STARTING = "starting"
# Until the child has imported torch, which no model has a say in.
START_LIMIT_S = 120.0
OUTPUT_LINES_SHOWN = 10
OUTPUT_SIZE_READ = 64 << 10
# For a process that hangs to write down where.
_STACK_WAIT_S = 2.0
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>.+)$', re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """Something that would fail.

    Attributes:
        kind: one word.
        what: in a line.
        where: ``handler.py:41 in preprocess``; may be empty.
        fix: how to fix it; may be empty.
    """

    kind: str
    what: str
    where: str = ""
    fix: str = ""


@dataclass
class Report:
    """What `examine` found.

    Attributes:
        notes: worth knowing, no defects.
        calls: the batch sizes that were tried, with the time each took.
        was_called: whether the handler was called at all.
        output: the last lines that the handler wrote.
    """

    model: str = ""
    version: str = ""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    calls: list[JsonObject] = field(default_factory=list)
    was_called: bool = False
    output: list[str] = field(default_factory=list)


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve check``."""
    dry_run.add_model_arguments(parser)
    dry_run.add_input_arguments(parser)
    parser.add_argument("--timeout", type=float, metavar="S",
                        help="for loading and for each call; default: the model's own limits")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def check_command(parsed: argparse.Namespace) -> int:
    """Prints what would fail. Exit code: 0 nothing, 1 something, 2 the handler was not called for want of an input.

    Raises:
        ServeError, OSError: an input cannot be read, or pip failed.
    """
    inputs = dry_run.read_inputs(parsed)
    try:
        subject = dry_run.open_subject(parsed.archive, ts_config=parsed.ts_config, given=given_in(parsed))
    except ServeError as error:
        report = Report(parsed.archive.name, findings=[Finding("archive", error.message)])
    else:
        if not parsed.json:
            console.warn([*subject.config.warnings, *subject.archive.warnings])
        try:
            report = examine(subject, inputs or dry_run.own_samples(subject), timeout_s=parsed.timeout)
        finally:
            subject.archive.close()
    if parsed.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        _print(report)
    if report.findings:
        return 1
    return 0 if report.was_called else 2


def examine(subject: Subject, inputs: list[Input], *, timeout_s: float | None = None, calls: bool = True) -> Report:
    """Has a child process load and call the handler.

    Args:
        timeout_s: in place of the model's own limits.
        calls: load the model and call the handler; else its code is imported only.
    """
    report = Report(subject.spec.name, subject.spec.version, notes=list(subject.notes))
    interpreter = dry_run.interpreter_for(subject, lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory(prefix="pyserve-check-") as temporary:
        folder = Path(temporary)
        with open(folder / "output", "wb") as output:
            child = launch.spawn(
                [interpreter, *launch.SAFE_PATH, "-m", "pyserve.commands.check_child"],
                check_run.VARIABLE,
                check_run.handover(
                    dry_run.on_device(subject) if calls else subject.spec, subject.config, inputs, calls=calls,
                    trace_file=str(folder / "stack"),
                ),
                output_fd=output.fileno(),
            )  # fmt: skip
        try:
            _Watch(subject, report, child, folder / "stack").run(timeout_s)
        finally:
            _end(child)
        report.output = _tail(folder / "output")
    return report


class _Watch:
    """Reads what the child reports, and notices when it dies or does not end."""

    def __init__(self, subject: Subject, report: Report, child: launch.Child, stack: Path):
        self._subject = subject
        self._report = report
        self._child = child
        self._stack = stack
        self._step = STARTING
        self._is_done = False

    def run(self, timeout_s: float | None) -> None:
        """Returns when the child is through, or is of no more use."""
        reader = launch.ReportReader(self._child.reports_fd)
        try:
            deadline = time.monotonic() + self._limit(timeout_s)
            while not reader.at_end:
                ready = select.select([reader.fd], [], [], max(0.0, deadline - time.monotonic()))[0]
                if not ready:
                    self._find_endless(self._limit(timeout_s))
                    return
                for event in reader.read():
                    self._take(event)
                    deadline = time.monotonic() + self._limit(timeout_s)
        finally:
            reader.close()
        if not self._is_done:
            self._find_death(self._child.popen.wait())

    def _limit(self, timeout_s: float | None) -> float:
        if self._step == STARTING:
            return START_LIMIT_S
        if timeout_s is not None:
            return timeout_s
        is_call = bool(self._report.calls) or "request" in self._step or "batch" in self._step
        return self._subject.response_timeout_s if is_call else self._subject.startup_timeout_s

    def _take(self, event: JsonObject) -> None:
        kind = event.pop("event")
        if kind == "step":
            self._step = event["text"]
        elif kind == "finding":
            self._report.findings.append(Finding(**event))
        elif kind == "note":
            self._report.notes.append(event["text"])
        elif kind == "call":
            self._report.calls.append(event)
        elif kind == "done":
            self._is_done = True
            self._report.was_called = event["was_called"]

    def _find_endless(self, limit_s: float) -> None:
        os.killpg(self._child.popen.pid, launch.INTERRUPT)
        deadline = time.monotonic() + _STACK_WAIT_S
        while not self._frame() and time.monotonic() < deadline and self._child.popen.poll() is None:
            time.sleep(0.02)
        self._report.findings.append(
            Finding(
                "timeout", f"{self._step}: not through after {limit_s:g} s", self._frame(),
                "if it is slow and not stuck, raise responseTimeout or startupTimeout in model-config.yaml",
            )
        )  # fmt: skip

    def _find_death(self, code: int) -> None:
        how = launch.describe_exit(code)
        fix = "look at native code that is called there" if code < 0 else "a handler must not end its process"
        if code == -signal.SIGKILL:
            fix = "the kernel kills what takes too much memory: see `dmesg`, or give the model more"
        self._report.findings.append(Finding("crash", f"{self._step}: the process {how}", self._frame(), fix))

    def _frame(self) -> str:
        """The innermost frame of the archive's own code in the stack that the child wrote."""
        try:
            text = self._stack.read_text()
        except OSError:
            return ""
        folder = os.path.realpath(self._subject.spec.model_dir) + os.sep
        for match in _FRAME.finditer(text):
            file = os.path.realpath(match["file"])
            if file.startswith(folder):
                return f"{file[len(folder) :]}:{match['line']} in {match['name']}"
        return ""


def _end(child: launch.Child) -> None:
    """Processes that the handler started end with it."""
    try:
        os.killpg(child.popen.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.popen.wait()


def _tail(path: Path) -> list[str]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - OUTPUT_SIZE_READ))
        return file.read().decode("utf-8", "replace").splitlines()[-OUTPUT_LINES_SHOWN:]


def _print(report: Report) -> None:
    label = f"{report.model} {report.version}".strip()
    for note in report.notes:
        print(f"note: {note}")
    for finding in report.findings:
        print(f"FAIL  {finding.what}")
        if finding.where:
            print(f"      where: {finding.where}")
        if finding.fix:
            print(f"      fix:   {finding.fix}")
    if any(finding.kind in ("crash", "timeout") for finding in report.findings) and report.output:
        print("the last lines that it wrote:")
        print("\n".join(f"    {line}" for line in report.output))
    tried = f"called with batches of {', '.join(str(call['batch']) for call in report.calls)}" if report.calls else ""
    count = len(report.findings)
    if count:
        print(f"{label}: {count} finding{'s' * (count > 1)}" + (f"; {tried}" if tried else ""))
    elif report.was_called:
        print(f"{label}: nothing found; {tried}")
    else:
        print(f"{label}: nothing found, but the handler was not called")
