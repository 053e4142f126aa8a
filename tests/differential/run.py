"""Records TorchServe's answers and compares pyserve's with them.

    python -m tests.differential.run record [PART ...]     TorchServe, into tests/golden/torchserve
    python -m tests.differential.run compare [PART ...]    pyserve in both modes, beside what is recorded
    python -m tests.differential.run show CASE             one case on all three, side by side

A PART is a part of the cases' names. TorchServe's environment is $TORCHSERVE_VENV, or is made in build/torchserve.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.differential import golden
from tests.differential.case import FIELD, MODES, Case, all_cases
from tests.differential.compare import differences
from tests.differential.play import clean, keep_logs, play
from tests.differential.servers import ROOT, Running, running

PACKAGES = ["torchserve==0.12.0", "torch-model-archiver==0.12.0", "torch-workflow-archiver==0.2.15", "setuptools<81",
            "captum", "psutil", "pyyaml", "numpy", "pillow"]  # fmt: skip
TORCH = os.environ.get("TORCH", "torch==2.13.0")


class Servers:
    """The server of one name for the setting asked last; a context."""

    def __init__(self, name: str, bin_folder: Path | None = None):
        self.name = name
        self._bin_folder = bin_folder
        self._stack = ExitStack()
        self._server: Running | None = None

    def play(self, case: Case) -> list[dict[str, Any]]:
        """As `play.play`, on a server of the case's setting that serves nothing yet.

        A server that does not start answers no call; why is printed.
        """
        if self._server is None or self._server.setting != case.setting:
            self.close()
            try:
                self._server = self._stack.enter_context(running(self.name, case.setting, self._bin_folder))
            except RuntimeError as error:
                print(f"{case.name} [{self.name}] does not start: {str(error)[-2000:]}", file=sys.stderr)
                return [{"call": call.title, "status": "the server does not start"} for call in case.calls]
        try:
            seen = play(case, self._server)
        except BaseException:
            print(keep_logs(self._server), file=sys.stderr)
            self.close()
            raise
        if case.setting.archives or not clean(self._server):
            self.close()
        return seen

    def close(self) -> None:
        self._stack.close()
        self._server = None

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def torchserve_environment() -> Path:
    """``bin`` of an environment that has TorchServe, made if it is not there. Needs Java 11 or later."""
    folder = Path(os.environ.get("TORCHSERVE_VENV", ROOT / "build/torchserve"))
    if not (folder / "bin/torchserve").exists():
        print(f"installing TorchServe into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/pip"), "install", "--quiet"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, *PACKAGES], check=True)
    return folder / "bin"


def chosen(parts: list[str]) -> list[Case]:
    cases = [*all_cases(), *all_cases(FIELD)]
    return [case for case in cases if not parts or any(part in case.name for part in parts)]


def record(cases: list[Case]) -> int:
    """Prints what changed."""
    everything = {case.name for case in chosen([])}
    changed = 0
    with Servers("torchserve", torchserve_environment()) as servers:
        for case in cases:
            seen = servers.play(case)
            before = golden.read(case.name)
            if before is not None and before != seen:
                changed += 1
                print(f"CHANGED {case.name}")
            golden.write({case.name: seen}, everything)
    print(f"{len(cases)} cases recorded, {changed} changed")
    return 0


def compare(cases: list[Case]) -> int:
    """Prints every difference that no row of DEVIATIONS.md explains."""
    count = calls = 0
    for mode in MODES:
        with Servers(mode) as servers:
            for case in cases:
                recorded = golden.read(case.name)
                if recorded is None:
                    print(f"{case.name}: nothing is recorded of TorchServe")
                    count += 1
                    continue
                calls += len(case.calls)
                try:
                    found = differences(case, recorded, servers.play(case), mode)
                except (AssertionError, RuntimeError) as error:
                    found = [f"{case.name} [{mode}] {error}"]
                count += len(found)
                print(*found, sep="\n", end="\n" if found else "", flush=True)
    print(f"{len(cases)} cases, {calls} calls in {len(MODES)} modes, {count} differences")
    return 1 if count else 0


def show(cases: list[Case]) -> int:
    for name in ("torchserve", *MODES):
        with Servers(name, torchserve_environment() if name == "torchserve" else None) as servers:
            for case in cases:
                print(f"--- {name}: {case.name}")
                for answer in servers.play(case):
                    print(json.dumps(answer, indent=1, ensure_ascii=False))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare", "show"))
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--new", action="store_true", help="only cases of which nothing is recorded yet")
    arguments = parser.parse_intermixed_args()
    actions: dict[str, Callable[[list[Case]], int]] = {"record": record, "compare": compare, "show": show}
    cases = chosen(arguments.parts)
    if arguments.new:
        cases = [case for case in cases if golden.read(case.name) is None]
    return actions[arguments.action](cases)


if __name__ == "__main__":
    sys.exit(main())
