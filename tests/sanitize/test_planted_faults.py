"""What is planted is found: in the extension, as the Python tests load it, and by ThreadSanitizer."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sanitize.run import ROOT, environment, extension, findings
from tests.support.handler_archives import write_handler
from tests.support.serving import Server

HERE = Path(__file__).parent
MAKEFILE = ROOT / "tests" / "native" / "Makefile"

pytestmark = pytest.mark.nightly

WHICH_CORE = """
def handle(data, context):
    from pyserve import _core

    return None if data is None else [_core.__file__] * len(data)
"""
CALL = """
import ctypes, sys
import torch
from pyserve import _core
library = ctypes.CDLL(_core.__file__)
{call}
"""


def run_python(reports: Path, call: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A Python in the environment of `make sanitize`, and what is found in its reports."""
    reports.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CALL.format(call=call)]
    outcome = subprocess.run(command, cwd=ROOT, env=environment(reports), capture_output=True, text=True, check=False)
    return outcome, list(findings(reports))


def test_the_sanitized_extension_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    outcome, found = run_python(tmp_path, "print(_core.__file__)")
    assert (outcome.returncode, outcome.stdout.strip()) == (0, str(extension())), outcome.stderr
    assert found == []


def test_servers_and_their_workers_load_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    server = Server(tmp_path)
    write_handler(server.store, "own", WHICH_CORE)
    with server:
        server.start("--models", "all")
        assert str(extension()) in {part.path for part in server.process.memory_maps()}
        assert server.predict("own", "x").body == str(extension()).encode()


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("planted_heap_overflow", "heap-buffer-overflow"),
        ("planted_use_after_free", "heap-use-after-free"),
        ("planted_signed_overflow", "ILL on"),
        ("planted_misaligned", "ILL on"),
        ("planted_leak", "leak of 7 byte"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str, text: str) -> None:
    _, found = run_python(tmp_path, f"library.{fault}(7)")
    assert len(found) == 1
    assert text in found[0] and "planted.cpp" in found[0]


def test_a_fault_in_a_child_process_is_found(tmp_path: Path) -> None:
    """As in a worker: its end is taken for a crash, and nobody reads what it writes."""
    call = "import os; pid = os.fork(); pid or library.planted_heap_overflow(7); os.waitpid(pid, 0)"
    outcome, found = run_python(tmp_path, call)
    assert outcome.returncode == 0
    assert len(found) == 1 and "heap-buffer-overflow" in found[0]


def test_a_planted_race_is_found(tmp_path: Path) -> None:
    (flags,) = re.findall(r"^FLAGS_thread := (.*)$", MAKEFILE.read_text(), re.MULTILINE)
    program = tmp_path / "race"
    source = str(HERE / "planted_race.cpp")
    subprocess.run(["g++", "-std=c++20", *flags.split(), "-pthread", source, "-o", str(program)], check=True)
    outcome = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 66
    assert "data race" in outcome.stderr and "planted_race.cpp" in outcome.stderr
