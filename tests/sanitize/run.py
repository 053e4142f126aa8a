"""Builds the extension for sanitizers and runs the tests with it.

    python -m tests.sanitize.run                       all parts; `make sanitize`
    python -m tests.sanitize.run planted python        some of them
    python -m tests.sanitize.run python -- tests/test_core.py -k cancel       what pytest is to run

Parts: ``planted`` shows that faults are found, ``python`` runs the Python tests with the sanitized extension,
``native`` the C++ ones under ThreadSanitizer and AddressSanitizer. Reports of all processes, of workers and servers
too, lie in ``build/sanitize/reports``; any that is ours makes the run fail, whatever became of the process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "sanitize"
REPORTS = BUILD / "reports"
PARTS = ("planted", "python", "native")
# What runs code of csrc/: by itself, in lanes and workers, and in servers.
PYTHON_TESTS = [
    "tests/test_core.py", "tests/test_engine.py", "tests/test_cpu_budget.py", "tests/lanes", "tests/worker",
    "tests/handlers/test_tensor.py", "tests/models/test_random_models.py", "tests/server/test_serving.py",
    "tests/server/test_serving_python.py", "tests/server/test_serving_batches.py", "tests/fronts",
    "tests/fuzz/test_fuzz_corpus.py::test_each_input_of_the_corpus_holds",
]  # fmt: skip
# Left out, each with its reason.
LEFT_OUT = {
    # Sanitizers reserve terabytes of addresses, which a limit of the address space does not leave.
    "memory": "limits its address space",
}
NATIVE_SCALE = 20  # times the work of `make test`
NATIVE_RUNS = 3  # each with seeds of its own
# Of a leak, what allocated it: others' are theirs, such as those of the interpreter's and torch's ends.
_OURS = re.compile(r"/csrc/|/tests/sanitize/|/_core\.")
_SIGNAL = re.compile(r"AddressSanitizer: (?:SEGV|ILL|BUS|FPE) on unknown address")
_LEAK = re.compile(r"^(?:Direct|Indirect) leak of .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    parts = parser.parse_args(given[:split]).parts or PARTS
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    failed = []
    if "planted" in parts or "python" in parts:
        build()
    if "planted" in parts and _pytest(["-m", "nightly", "tests/sanitize"], dict(os.environ)):
        failed.append("planted")
    if "python" in parts and not _run_python(given[split + 1 :]):
        failed.append("python")
    if "native" in parts and not _run_native():
        failed.append("native")
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return int(bool(failed))


def build() -> Path:
    """The sanitized extension, built if it is older than its sources."""
    environment = os.environ | {"PYSERVE_SANITIZE": "address,undefined"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        f"--build-lib={BUILD}",
        f"--build-temp={BUILD / 'objects'}",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "build.log"
    with log.open("w") as file:
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False).returncode:
            raise SystemExit(f"{log.read_text()[-4000:]}\nthe extension cannot be built, see {log}")
    return extension()


def extension() -> Path:
    """The file that `build` makes. FileNotFoundError before that."""
    for path in (BUILD / "pyserve").glob("_core.*.so"):
        return path
    raise FileNotFoundError(f"no extension in {BUILD}; run `python -m tests.sanitize.run`")


def environment(reports: Path = REPORTS) -> dict[str, str]:
    """In which a Python, and each that it starts, loads the sanitized extension and writes reports to that folder."""
    libraries = [_library(name) for name in ("libasan.so", "libstdc++.so")]
    # A leak must not change how a process ends, since tests look at that; an error aborts it, as it would crash.
    # What is undefined traps; 2: Python's own handlers of signals, which pytest turns on, do not take their place.
    options = "exitcode=0:abort_on_error=1:handle_segv=2:handle_sigill=2:allocator_may_return_null=1:detect_leaks=1"
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),  # libstdc++: its __cxa_throw is looked for when the process starts
        "ASAN_OPTIONS": f"{options}:log_path={reports / 'asan'}",
        "PYTHONMALLOC": "malloc",  # or blocks of Python's own allocator would be all that is seen
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "sanitize" / "path"), *_python_path()]),
        "PYSERVE_SANITIZED_CORE": str(extension()),
    }


def _python_path() -> list[str]:
    return [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _library(name: str) -> str:
    found = subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if "/" not in found:
        raise SystemExit(f"the compiler has no {name}; install its sanitizers")
    return str(Path(found).resolve())


def findings(reports: Path = REPORTS) -> Iterator[str]:
    """Each report that is ours: every error of memory, and leaks and signals with our code in their stack.

    The handlers of some tests crash on purpose.
    """
    for path in sorted(reports.iterdir()):
        text = path.read_text(errors="replace")
        if "LeakSanitizer: detected memory leaks" in text:
            yield from (f"{path.name}:\n{leak}" for leak in _LEAK.findall(text) if _OURS.search(leak))
        elif "ERROR: AddressSanitizer" in text and (not _SIGNAL.search(text) or _OURS.search(text)):
            yield f"{path.name}:\n{text}"


def _run_python(arguments: list[str]) -> bool:
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    words = " and ".join(f"not {word}" for word in LEFT_OUT)
    chosen = arguments or ["-m", "not compiles and not nightly", "-k", words, *PYTHON_TESTS]
    code = _pytest(chosen, environment())
    found = list(findings())
    for text in found:
        print(text)
    print(f"{len(list(REPORTS.iterdir()))} reports, {len(found)} of them ours")
    return code == 0 and not found


def _pytest(arguments: list[str], environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def _run_native() -> bool:
    environment = os.environ | {"PYSERVE_TEST_SCALE": str(NATIVE_SCALE)}
    runs = [_pytest(["tests/test_native.py", "-k", "thread or address"], environment) for _ in range(NATIVE_RUNS)]
    return not any(runs)


if __name__ == "__main__":
    sys.exit(main())
