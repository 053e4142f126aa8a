"""Runs fuzz targets for some time each, guided by coverage where that is installed.

    python -m tests.fuzz.run --seconds 60                  all targets; `make fuzz SECONDS=60`
    python -m tests.fuzz.run zip frames --seconds 600      some of them
    python -m tests.fuzz.run zip --replay FILE             one input again, with the traceback
    python -m tests.fuzz.run zip --plain --seed 7          without atheris: seeded mutations of the corpus

Targets in Python are guided by atheris (the extra ``fuzz``), else mutated at random. The target in C++, ``frames``,
needs a clang with libFuzzer. What coverage finds is kept in ``build/fuzz/corpus`` for the next run; an input that fails
lies in ``build/fuzz/failures``, and the command that replays it is printed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutations
from tests.fuzz.targets import CORPUS, TARGETS

ROOT = Path(__file__).parent.parent.parent
WORK = ROOT / "build" / "fuzz"
NATIVE = "frames"
_CLANGS = ("clang++", *(f"clang++-{version}" for version in range(21, 13, -1)))
# An input that takes longer hangs; what is tried of them takes milliseconds, also on a busy machine.
_HANG_S = 60
_MEMORY_MAX_MB = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join((*TARGETS, NATIVE))}; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31))
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input of one target")
    parser.add_argument("--plain", action="store_true", help="without atheris")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    targets = parsed.targets or [*TARGETS, NATIVE]
    unknown = set(targets) - {*TARGETS, NATIVE}
    if unknown or ((parsed.replay or parsed.child) and len(targets) != 1):
        parser.error(f"no target: {', '.join(unknown)}" if unknown else "give one target")
    if parsed.replay:
        return _replay(targets[0], parsed.replay)
    if parsed.child:
        return _run_here(targets[0], parsed)
    return _run_all(targets, parsed)


def _run_all(targets: list[str], parsed: argparse.Namespace) -> int:
    results = {name: _run_one(name, parsed) for name in targets}
    print()
    for name, (text, failures) in results.items():
        print(f"{name:14}{text}")
        for path in failures:
            print(f"    {sys.executable} -m tests.fuzz.run {name} --replay {path.relative_to(ROOT)}")
    return int(any(failures or "not run" in text or "ended" in text for text, failures in results.values()))


def _run_one(name: str, parsed: argparse.Namespace) -> tuple[str, list[Path]]:
    """What became of it, and the inputs that fail."""
    folder = failures_of(name)
    before = set(folder.iterdir())
    if name == NATIVE:
        program = build_native()
        if program is None:
            return "not run: no clang with libFuzzer", []
        command = [str(program), *_libfuzzer_arguments(name, 1 << 14, parsed)]
    else:
        command = [sys.executable, "-m", "tests.fuzz.run", name, "--child", f"--seconds={parsed.seconds}",
                   f"--seed={parsed.seed}", *(["--plain"] if parsed.plain else [])]  # fmt: skip
    print(f"--- {name}, seed {parsed.seed}", flush=True)
    outcome = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors="replace", check=False)  # fmt: skip
    found = sorted(set(folder.iterdir()) - before)
    lines = outcome.stdout.splitlines()
    print("\n".join(lines[-40:] if found or outcome.returncode else lines[-2:]), flush=True)
    done = re.findall(r"Done (\d+) (?:runs|inputs)|^#(\d+)\s", outcome.stdout, re.MULTILINE)
    count = max((int(each) for pair in done for each in pair if each), default=0)
    covered = re.findall(r"cov: (\d+)", outcome.stdout)
    text = f"{count} inputs, {f'coverage {covered[-1]}' if covered else 'not guided'}, {len(found)} failed"
    if outcome.returncode and not found:
        text += f"; ended with {outcome.returncode} and left no input"
    return text, found


def failures_of(name: str) -> Path:
    """Where inputs that fail are put."""
    folder = WORK / "failures" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _libfuzzer_arguments(name: str, size_max: int, parsed: argparse.Namespace) -> list[str]:
    grown = WORK / "corpus" / name
    grown.mkdir(parents=True, exist_ok=True)
    arguments = [str(grown), str(CORPUS / name), f"-max_total_time={parsed.seconds}", f"-seed={parsed.seed}",
                 f"-max_len={size_max}", f"-artifact_prefix={failures_of(name)}/", f"-timeout={_HANG_S}",
                 f"-rss_limit_mb={_MEMORY_MAX_MB}"]  # fmt: skip
    words = TARGETS[name].words if name in TARGETS else ()
    if words:
        # libFuzzer's dictionaries escape what is not printable.
        quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
        path = WORK / f"{name}.dict"
        path.write_text("".join(f'"{word}"\n' for word in quoted))
        arguments.append(f"-dict={path}")
    return arguments


# --- a target in Python, in a process of its own


def _run_here(name: str, parsed: argparse.Namespace) -> int:
    if parsed.plain or find_spec("atheris") is None:
        return run_plain(name, parsed.seconds, parsed.seed)
    import atheris

    # What the server runs, not the libraries under it, nor torch.
    with atheris.instrument_imports(include=["pyserve", "tests.fuzz"], enable_loader_override=False):
        check = TARGETS[name].load()
    logging.disable(logging.WARNING)  # as in `run_plain`; this process ends with it
    atheris.Setup([sys.argv[0], *_libfuzzer_arguments(name, TARGETS[name].size_max, parsed)], check)
    atheris.Fuzz()  # ends the process
    return 1


def run_plain(name: str, seconds: float, seed: int, count_max: int | None = None) -> int:
    """Seeded mutations of the corpus, for ``seconds`` or until there were ``count_max``; the corpus first.

    An input that fails is kept, and its exception raised.
    """
    target = TARGETS[name]
    check = target.load()
    corpus = [path.read_bytes() for path in target.corpus]
    end = time.monotonic() + seconds
    count = 0
    logging.disable(logging.WARNING)  # a line for each odd input; errors are looked at by targets
    try:
        for data in chain(corpus, mutations(corpus, target.words, target.size_max, seed)):
            if time.monotonic() > end or (count_max is not None and count == count_max):
                break
            run_input(name, check, data)
            count += 1
    finally:
        logging.disable(logging.NOTSET)
    print(f"Done {count} inputs, seed {seed}")
    return 0


def run_input(name: str, check: Any, data: bytes) -> None:
    """Runs one input; if it fails it is kept, and the exception gets a note that says how to replay it."""
    try:
        check(data)
    except Exception as error:
        path = failures_of(name) / f"plain-{random.Random(data).randrange(2**64):016x}"
        path.write_bytes(data)
        command = f"{sys.executable} -m tests.fuzz.run {name} --replay {path.relative_to(ROOT)}"
        raise AssertionError(f"{type(error).__name__}: {error}\nreplay: {command}") from error


def _replay(name: str, path: Path) -> int:
    if name == NATIVE:
        program = build_native()
        return 1 if program is None else subprocess.run([str(program), str(path)], check=False).returncode
    TARGETS[name].load()(path.read_bytes())
    print(f"{path}: nothing wrong")
    return 0


# --- the target in C++


def build_native() -> Path | None:
    """The libFuzzer program, built if it is older than its sources; None if no compiler here can build it."""
    for compiler in _CLANGS:
        if shutil.which(compiler) and _links_fuzzers(compiler):
            make = ["make", "-s", "-C", str(ROOT / "tests" / "native"), "BUILD=fuzz", f"CXX={compiler}", "frame_fuzz"]
            subprocess.run(make, check=True)
            return ROOT / "build" / "native" / "fuzz" / "frame_fuzz"
    return None


def _links_fuzzers(compiler: str) -> bool:
    source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
    command = [compiler, "-x", "c++", "-fsanitize=fuzzer,address,undefined", "-", "-o", os.devnull]
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
