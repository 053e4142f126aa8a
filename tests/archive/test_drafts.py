"""What is made for the cache: whole or not there, and nothing is left of a process that was killed meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve.archive.cache import ArchiveCache
from pyserve.archive.drafts import draft_folder, remove_left_drafts, write_whole

MAKER = """
import os, signal, sys
from pathlib import Path
from pyserve.archive.drafts import draft_folder
with draft_folder(Path(sys.argv[1])) as folder:
    (folder / "weights.bin").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_makers_draft_goes_at_the_next_start_and_a_living_ones_stays(tmp_path: Path) -> None:
    cache = ArchiveCache(tmp_path)
    derived = tmp_path / "archives" / "ab" / "derived"
    derived.mkdir(parents=True)
    ended = subprocess.run([sys.executable, "-c", MAKER, str(derived / "traced.pt")], check=False)
    assert ended.returncode == -signal.SIGKILL
    [left] = derived.iterdir()
    with draft_folder(derived / "other.pt") as living:
        cache.remove_drafts()
        assert list(derived.iterdir()) == [living] and not left.exists()


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_whole(path, lambda name: Path(name).write_text("first"))

    def fail(name: str) -> None:
        Path(name).write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(path, fail)
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_was_renamed_stays(tmp_path: Path) -> None:
    with draft_folder(tmp_path / "kept") as folder:
        folder.rename(tmp_path / "kept")
    remove_left_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
