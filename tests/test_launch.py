"""What one process of ours gives another, whatever the disk is like."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pyserve.launch import stderr_file


@pytest.mark.parametrize("has_folder", [True, False])
def test_what_a_child_prints_can_be_read_also_without_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_folder: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if has_folder else tmp_path / "gone"))
    with stderr_file() as file:
        command = [sys.executable, "-c", "import sys; sys.stderr.write('so'); sys.exit(3)"]
        assert subprocess.run(command, stderr=file, check=False).returncode == 3
        file.seek(0)
        assert file.read() == b"so"
    assert os.listdir(tmp_path) == []
