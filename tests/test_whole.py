"""A test that fails beside the others runs again alone; nothing else passes for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.whole import AGAIN_MAX

ROOT = Path(__file__).parents[1]
# Fails the first time that it runs.
ONCE = """
def test_once():
    from pathlib import Path
    mark = Path(__file__).with_suffix(".mark")
    is_first, _ = not mark.exists(), mark.touch()
    assert not is_first
"""
ALWAYS = """
def test_always():
    assert False
"""
CRASH = """
def test_crash():
    import os
    from pathlib import Path
    mark = Path(__file__).with_suffix(".crash")
    is_first, _ = not mark.exists(), mark.touch()
    if is_first:
        os.abort()
"""
PASS = "def test_pass(): pass\n"


def run(folder: Path, files: dict[str, str]) -> tuple[int, str]:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    # Without the plugins that are installed for other tests, which take seconds to import.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist.plugin"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.whole", "--jobs", "2", *files], cwd=folder, capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), **plugins}, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_one_that_passes_alone_is_named_at_the_end(tmp_path: Path) -> None:
    status, text = run(tmp_path, {"test_a.py": ONCE, "test_b.py": PASS})
    assert status == 0
    assert text.rstrip().splitlines()[-2:] == [
        "FAILED BESIDE THE OTHERS, AND PASSED ALONE (a belief in time, or a race):", "  test_a.py::test_once",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "files",
    [
        {"test_a.py": ONCE, "test_b.py": ALWAYS},
        {f"test_{n}.py": ONCE for n in range(AGAIN_MAX + 1)},
        {"tests/native/test_a.py": ONCE, "test_b.py": PASS},
        {"test_a.py": CRASH, "test_b.py": PASS},
        {"test_a.py": ONCE, "test_b.py": "import no_such_module"},
    ],
    ids=["again", "many", "native", "crash", "import"],
)
def test_what_is_no_accident_fails(tmp_path: Path, files: dict[str, str]) -> None:
    status, text = run(tmp_path, files)
    assert status != 0
    assert "PASSED ALONE" not in text


def test_nothing_runs_again_where_all_pass(tmp_path: Path) -> None:
    status, text = run(tmp_path, {"test_a.py": PASS})
    assert status == 0
    assert "once more" not in text
