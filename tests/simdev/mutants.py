"""Plants bugs in csrc/, one at a time, and shows that a test on the simulated accelerator fails for each.

`make mutants`, or:

    python -m tests.simdev.mutants                     all, and the table in docs/mutants.md
    python -m tests.simdev.mutants NAME ...            some; no table

The file with the bug is compiled and linked with the objects of the others. First of all the same tests pass without a
bug. A bug that no test finds, or whose place is no longer in the code, makes the run fail.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import library_paths

from tests.simdev import build
from tests.simdev.planted import BUGS, Bug

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutants"
# Where `python setup.py build_ext` has them, so that nothing is compiled that has been already.
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
TABLE = ROOT / "docs" / "mutants.md"
LIMIT_S = 300  # a bug may make a test hang, which is found too


class Found(NamedTuple):
    """``test``: the first that fails; empty if none does."""

    bug: Bug
    test: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(bug.name for bug in BUGS)}")
    names = parser.parse_args().names
    bugs = [bug for bug in BUGS if not names or bug.name in names]
    if set(names) - {bug.name for bug in bugs}:
        parser.error("there is no such bug")
    commands = _build_without()
    build.built()
    if problem := _first_failure(_plain(), sorted({test for bug in bugs for test in bug.tests})):
        print(f"without a bug fails {problem}")
        return 1
    found = [_try(bug, commands) for bug in bugs]
    missed = [each.bug.name for each in found if not each.test]
    if not names and not missed:
        TABLE.write_text(table(found))
    print(f"not found: {', '.join(missed)}" if missed else f"all {len(found)} found")
    return int(bool(missed))


def table(found: Sequence[Found]) -> str:
    rows = "".join(f"| {each.bug.what} | `csrc/{each.bug.file}` | `{each.test}` |\n" for each in found)
    return f"""# Planted bugs

What runs on accelerators is tested on one made of threads (`tests/simdev/README.md`). To show that those tests can
fail, `make mutants` plants each of these bugs in the engine and runs them. It wrote this page.

| bug | file | test that fails |
|---|---|---|
{rows}"""


def mutated(bug: Bug) -> str:
    """The text of the file with the bug. ValueError if its place is not there, or not alone."""
    text = (ROOT / "csrc" / bug.file).read_text()
    for old, new in bug.edits:
        if text.count(old) != 1:
            raise ValueError(f"{bug.name}: csrc/{bug.file} has {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    return text


def _build_without() -> dict[str, list[str]]:
    """Builds the extension as it is; file of csrc/ -> the command that compiled it."""
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={FOLDER}", f"--build-temp={OBJECTS}"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\nthe extension cannot be built")
    listed = subprocess.run(["ninja", "-C", str(OBJECTS), "-t", "compdb"], capture_output=True, text=True, check=True)
    entries = json.loads(listed.stdout[listed.stdout.index("[") :])
    return {
        Path(entry["file"]).name: shlex.split(entry["command"]) for entry in entries if entry["file"].endswith(".cpp")
    }


def _plain() -> Path:
    return next((FOLDER / "pyserve").glob("_core.*.so"))


def _try(bug: Bug, commands: dict[str, list[str]]) -> Found:
    test = _first_failure(_compile(bug, commands), bug.tests)
    print(f"{bug.name}: {test or 'NOT FOUND'}", flush=True)
    return Found(bug, test)


def _compile(bug: Bug, commands: dict[str, list[str]]) -> Path:
    folder = FOLDER / "bugs" / bug.name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc" / bug.file).write_text(mutated(bug))
    changed = {}
    users = [path.name for path in sorted((ROOT / "csrc").glob("*.cpp")) if bug.users and bug.users in path.read_text()]
    for file in users or [bug.file]:
        target = folder / (Path(file).stem + ".o")
        command = [word.replace(str(ROOT / "csrc"), str(folder / "csrc")) for word in commands[file]]
        command[command.index("-o") + 1] = str(target)
        _run([word for word in command if not word.startswith("-M") and not word.endswith(".o.d")])
        changed[Path(file).stem] = target
    # The folder keeps the objects of files that are gone.
    known = [path for path in sorted((OBJECTS / "csrc").glob("*.o")) if f"{path.stem}.cpp" in commands]
    objects = [changed.get(path.stem, path) for path in known]
    libraries = [word for path in library_paths() for word in (f"-L{path}", f"-Wl,-rpath,{path}")]
    extension = folder / _plain().name
    names = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    _run([os.environ.get("CXX", "g++"), "-shared", *map(str, objects), "-o", str(extension), *libraries, *names])
    return extension


def _first_failure(extension: Path, tests: Sequence[str]) -> str:
    """The name of the first test that fails, or crashes, with that extension."""
    paths = [str(ROOT / "tests" / "sanitize" / "path"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYSERVE_SANITIZED_CORE": str(extension),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "--no-header", *tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        output, has_failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as late:
        output, has_failed = (late.stdout or b"").decode(), True
    if not has_failed:
        return ""
    names = re.findall(r"^tests/[\w/]+\.py::(\S.*?)(?: [A-Z]+ |$)", output, re.MULTILINE)
    if not names:
        raise SystemExit(f"no test ran:\n{output[-3000:]}")
    return names[-1]  # -x: nothing begins after it


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())
