"""Everything that has to be measured on an accelerator, in one command of nine minutes: `bench/README.md` has the aims.

    python bench/gpu.py --out bench/out/gpu          # on a machine with one, from the root of the source
    python bench/gpu.py --tiny                       # the same steps in tiny sizes: that they run, no figures

Each step is a process of its own with a time limit. A step that fails, hangs or prints rubbish does not stop the
others; what no longer fits into the budget is skipped, by name. The ratios come last. Imports no torch: what a step
leaves behind in a device or in a process ends with it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_steps.ratios import table
from bench.gpu_steps.settings import Row, Settings

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 540.0
RESERVE_S = 10.0  # for ending a step that hangs, and for the table
GRACE_S = 4.0  # between asking a step to end and ending it
ROWS_SIZE_MAX = 4 << 20  # bytes that are read of what a step writes
NOTE_SIZE_MAX = 300


@dataclass(frozen=True, slots=True)
class Step:
    """One step: a process that is given its settings as its last argument and writes rows.

    Attributes:
        usual_s: what it takes if all goes well. With less time left it is skipped.
        limit_s: after this it is ended; what it has written counts.
        needs_device: makes no sense without an accelerator.
        after: a step without whose success this one cannot work.
        command: what is run instead of the module of that name.
    """

    name: str
    usual_s: float
    limit_s: float
    needs_device: bool = True
    after: str = ""
    command: tuple[str, ...] = ()

    def argv(self) -> tuple[str, ...]:
        """The command without its last argument."""
        return self.command or (sys.executable, "-m", "bench.gpu_steps", self.name)


# What can be spared comes last: it is what is skipped if the others take longer than usual.
STEPS = (
    Step("env", 8, 30, needs_device=False),
    Step("build", 50, 150, needs_device=False),
    Step("copies", 12, 30),
    Step("engine_tests", 25, 60, after="build"),
    Step("direct", 105, 140),
    Step("engine", 105, 140, after="build"),
    Step("stalls", 15, 30, after="build"),
    Step("trace", 20, 40, after="build"),
    Step("over_http", 65, 90, after="build"),
    Step("memory", 25, 40, after="build"),
    Step("faults", 55, 80, after="build"),
    Step("jpeg", 12, 25),
    Step("sanitizer", 25, 45, after="build"),
)


@dataclass(slots=True)
class Outcome:
    """How a step ended.

    Attributes:
        status: ``ok``, ``lacks`` (something is not on this machine), ``failed``, ``timeout`` or ``skipped``.
        note: why, in a sentence; empty for ``ok``.
    """

    step: str
    status: str
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)

    def line(self) -> dict[str, Any]:
        """The step as one JSON line, without its rows."""
        return {**asdict(self), "seconds": round(self.seconds, 1), "rows": len(self.rows)}


class Run:
    """One run of all steps; ``outcomes`` grows as they end."""

    def __init__(self, out: Path, *, tiny: bool, budget_s: float):
        self.outcomes: list[Outcome] = []
        self._out = out
        self._tiny = tiny
        self._ends_at = time.monotonic() + budget_s
        self._scratch = tempfile.TemporaryDirectory(prefix="gpu-")
        out.mkdir(parents=True, exist_ok=True)
        for name in ("rows.jsonl", "log.txt"):
            (out / name).write_bytes(b"")

    def carry_out(self, steps: Sequence[Step]) -> None:
        """Runs the steps one after the other, whatever becomes of each."""
        with self._scratch:
            for step in steps:
                reason, status = self._reason_to_skip(step)
                outcome = Outcome(step.name, status, note=reason) if reason else self._run(step)
                self.outcomes.append(outcome)
                print(json.dumps(outcome.line()), flush=True)
                with open(self._out / "rows.jsonl", "a") as file:
                    for row in outcome.rows:
                        file.write(json.dumps({"step": step.name, **row}) + "\n")

    def _reason_to_skip(self, step: Step) -> tuple[str, str]:
        """(why, status), or two empty texts."""
        left = self._ends_at - time.monotonic() - RESERVE_S
        ended = {outcome.step: outcome for outcome in self.outcomes}
        env = ended.get("env")
        if step.needs_device and env is not None and env.status == "ok" and not any(r.get("device") for r in env.rows):
            return "an accelerator: torch finds none on this machine", "lacks"
        if step.after in ended and ended[step.after].status != "ok":
            return f"{step.after} did not succeed", "skipped"
        if left < step.usual_s:
            return f"takes {step.usual_s:g} s, and {max(left, 0):.0f} s of the budget are left", "skipped"
        return "", ""

    def _run(self, step: Step) -> Outcome:
        began = time.monotonic()
        limit_s = min(step.limit_s, self._ends_at - began - RESERVE_S)
        folder = Path(self._scratch.name) / step.name
        folder.mkdir()
        settings = Settings(self._tiny, folder, began + limit_s)
        log_path = folder / "log.txt"
        with open(log_path, "wb") as log:
            try:
                process = subprocess.Popen(
                    [*step.argv(), settings.as_json()], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, env=_environment(), **_own_group(),
                )  # fmt: skip
            except OSError as error:
                return Outcome(step.name, "failed", note=f"could not be started: {error}")
            ended_in_time = _wait(process, limit_s)
        _end_group(process)
        rows, rubbish = read_rows(settings.rows_path)
        lacking = [str(row["lacks"]) for row in rows if row.keys() == {"lacks"}]
        outcome = Outcome(step.name, "ok", time.monotonic() - began, rows=[r for r in rows if r.keys() != {"lacks"}])
        if not ended_in_time:
            outcome.status, outcome.note = "timeout", f"ended after {limit_s:.0f} s; the rows until then count"
        elif process.returncode != 0:
            outcome.status, outcome.note = "failed", _last_line(log_path) or f"exit status {process.returncode}"
        elif lacking:
            outcome.status, outcome.note = "lacks", "; ".join(lacking)
        elif failed := sum("failed" in row for row in rows):
            outcome.status, outcome.note = "failed", f"{failed} of {len(rows)} rows failed"
        if rubbish:
            outcome.note = f"{outcome.note}; {rubbish} lines were no rows".lstrip("; ")
        outcome.note = outcome.note[:NOTE_SIZE_MAX]
        self._keep_log(step.name, log_path)
        return outcome

    def _keep_log(self, name: str, path: Path) -> None:
        with open(self._out / "log.txt", "ab") as log:
            log.write(f"\n===== {name}\n".encode() + path.read_bytes()[-200_000:])


def _environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _own_group() -> dict[str, Any]:
    """Arguments of Popen that make it possible to end a step with all that it has started."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it ended by itself; otherwise it was asked to, so that servers are stopped in order."""
    try:
        process.wait(max(limit_s, 0))
        return True
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    return False


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Nothing of a step is left to disturb the next one."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows that a step has written, and how many lines are none: torn by its end, or rubbish."""
    rows: list[Row] = []
    rubbish = 0
    try:
        text = path.read_bytes()[:ROWS_SIZE_MAX].decode(errors="replace")
    except OSError:
        return [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            row = json.loads(line, parse_constant=lambda _: None)  # NaN is no JSON
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            rubbish += 1
    return rows, rubbish


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "gpu", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs, no figures")
    parser.add_argument("--steps", default="", metavar="A,B", help="only these; default: all, in this order")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for everything (default: %(default)g)"
    )
    return parser


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """0 when no step failed or was skipped, and not all lack something; else 1, with the reasons in the table."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    wanted = [name for name in parsed.steps.split(",") if name]
    if unknown := set(wanted) - {step.name for step in steps}:
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
    run = Run(parsed.out, tiny=parsed.tiny, budget_s=parsed.budget)
    run.carry_out([step for step in steps if not wanted or step.name in wanted])
    lines = [outcome.line() for outcome in run.outcomes]
    rows = {outcome.step: outcome.rows for outcome in run.outcomes}
    text, aims = table(lines, rows, is_tiny=parsed.tiny)
    (parsed.out / "summary.json").write_text(
        json.dumps({"tiny": parsed.tiny, "steps": lines, "aims": aims, "rows": rows}, indent=1) + "\n"
    )
    (parsed.out / "table.md").write_text(text)
    print(text, end="", flush=True)
    statuses = {outcome.status for outcome in run.outcomes if outcome.step not in ("env", "build")}
    return 0 if statuses <= {"ok", "lacks"} and statuses != {"lacks"} else 1


if __name__ == "__main__":
    sys.exit(main())
