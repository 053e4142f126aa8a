"""What processes leave in caches, and in the temporary folder that serves where the cache folder cannot be used."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pyserve.archive.archive import open_archive
from pyserve.archive.cache import open_cache
from pyserve.errors import ModelLoadError
from tests.support.archive_files import write_mar

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_what_a_killed_process_left_is_removed_by_the_next_one(temporary: Path) -> None:
    code = "import os; from pyserve.archive.cache import open_cache; open_cache(); os.kill(os.getpid(), 9)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)}, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    [left] = temporary.iterdir()
    root = open_cache().root
    assert list(temporary.iterdir()) == [root] != [left]
    alive = "from pyserve.archive.cache import open_cache; open_cache()"
    subprocess.run([sys.executable, "-c", alive], cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)}, check=True)
    assert list(temporary.iterdir()) == [root], "the other's is gone with it, and ours is held"


def test_one_that_was_cleared_away_is_made_again(temporary: Path, tmp_path: Path) -> None:
    archive = write_mar(tmp_path / "m.mar")
    before = open_archive(archive).model_dir
    shutil.rmtree(temporary)
    temporary.mkdir()
    after = open_archive(archive).model_dir
    assert after == before and (after / "handler.py").exists()


def test_without_any_place_the_error_says_what_to_do(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    monkeypatch.setenv("PYSERVE_CACHE", "/proc/nowhere/cache")
    with pytest.raises(ModelLoadError, match=r"^no cache folder can be made: .*ENOENT.*; set PYSERVE_CACHE"):
        open_cache()


def test_a_digest_that_cannot_be_remembered_is_made_each_time(tmp_path: Path) -> None:
    archive = write_mar(tmp_path / "m.mar")
    os.utime(archive, (1, 1))
    first = open_archive(archive, cache_dir=tmp_path / "cache")
    status = os.stat(archive)
    note = tmp_path / "cache/digests" / f"{status.st_dev}-{status.st_ino}"
    note.unlink(missing_ok=True)
    note.mkdir()
    assert open_archive(archive, cache_dir=tmp_path / "cache").sha256 == first.sha256
    assert [path.name for path in note.parent.iterdir()] == [note.name]


def test_drafts_of_killed_processes_are_removed_and_others_stay(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache")
    archive = open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache.root)
    derived, day_before = cache.derived(archive.sha256), time.time() - 90_000
    (cache.root / "weights").mkdir()
    drafts = [
        derived / "tmpabc.pt",
        derived / ".w.1.part",
        cache.root / "digests/1-2.ab",
        cache.root / "weights/x.part",
    ]
    kept = [derived / "traced.pt", cache.root / "digests/1-2", cache.root / "weights/x.weights"]
    for path in [*drafts, *kept]:
        path.write_bytes(b"x")
        os.utime(path, (day_before, day_before))
    being_written = derived / "tmpnew.pt"
    being_written.write_bytes(b"x")
    left, at_work = cache.root / "archives/.partial-aa1", cache.root / "archives/.partial-bb1"
    left.mkdir()
    at_work.mkdir()
    (cache.root / "archives/.partial-cc1").symlink_to("nowhere")
    with cache.lock("bb1"):
        cache.remove_drafts()
    assert not any(path.exists() for path in [*drafts, left])
    assert all(path.exists() for path in [*kept, being_written, at_work])
    assert not os.path.lexists(cache.root / "archives/.partial-cc1")
    assert open_archive(tmp_path / "m.mar", cache_dir=cache.root).sha256 == archive.sha256
