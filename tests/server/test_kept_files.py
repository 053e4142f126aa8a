"""What the next server needs: in memory that no cleaner reaches and that needs no disk, and in copies."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyserve.server.kept_files import KeptFiles, SharedMemory
from pyserve.server.own_folder import OwnFolder
from tests.support.full_disk import in_full_disk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kept(tmp_path: Path) -> KeptFiles:
    return KeptFiles(OwnFolder(str(tmp_path / "state"), environ={}), SharedMemory())


def folder_of(kept: KeptFiles) -> Path:
    assert kept.folder.path is not None
    return kept.folder.path


@pytest.mark.parametrize("step", ["cleared", "written"])
def test_memory_written_by_one_that_is_killed_at_any_step_holds_what_was_before(step: str) -> None:
    memory = SharedMemory()
    memory.write(b"first" * 1000)
    memory.write(b"second" * 2000)
    code = (
        "import os, signal, sys\n"
        "from pyserve.server.kept_files import SharedMemory\n"
        "die = lambda step: step == sys.argv[1] and os.kill(os.getpid(), signal.SIGKILL)\n"
        "SharedMemory([int(each) for each in sys.argv[2:]]).write(b'third' * 500, die)\n"
    )
    command = [sys.executable, "-c", code, step, *map(str, memory.descriptors)]
    ended = subprocess.run(command, pass_fds=memory.descriptors, cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert memory.read() == b"second" * 2000
    memory.write(b"fourth")
    assert memory.read() == b"fourth"
    memory.write(b"")
    assert memory.read() == b""
    memory.close()


def test_another_process_reads_what_was_written_last() -> None:
    memory = SharedMemory()
    for number in range(5):
        memory.write(b"x" * number)
    code = (
        "import sys; from pyserve.server.kept_files import SharedMemory\n"
        "print(len(SharedMemory(map(int, sys.argv[1:])).read()))"
    )
    command = [sys.executable, "-c", code, *map(str, memory.descriptors)]
    told = subprocess.run(command, pass_fds=memory.descriptors, cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "4\n"


def test_files_are_kept_by_name_and_copied(kept: KeptFiles) -> None:
    assert kept.get("a") is None
    assert kept.put("a", b"1") == kept.put("b", b"\xff\0") == kept.put("a", b"2") == ""
    assert (kept.get("a"), kept.get("b")) == (b"2", b"\xff\0")
    folder = folder_of(kept)
    assert sorted(os.listdir(folder)) == ["a", "b"]
    assert (folder / "a").read_bytes() == b"2" and (folder / "a").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_was_removed_is_made_again_with_all_that_was_in_it(kept: KeptFiles, tmp_path: Path) -> None:
    kept.put("a", b"1")
    kept.put("b", b"2")
    folder = folder_of(kept)
    shutil.rmtree(tmp_path / "state")
    kept.look()
    assert sorted(os.listdir(folder)) == ["a", "b"]
    (folder / "a").unlink()
    kept.look()
    assert (folder / "a").read_bytes() == b"1"
    shutil.rmtree(tmp_path / "state")
    assert kept.put("a", b"3") == ""
    assert ((folder / "a").read_bytes(), (folder / "b").read_bytes()) == (b"3", b"2")
    assert kept.get("a") == b"3"


def test_memory_that_cannot_be_written_leaves_the_copy(
    kept: KeptFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(27, os.strerror(27))

    monkeypatch.setattr(SharedMemory, "write", fail)
    assert kept.put("a", b"1") == ""
    assert kept.get("a") == b"1"
    (folder_of(kept) / "b").mkdir()
    with pytest.raises(OSError, match="File too large"):
        kept.put("b", b"2")


def test_on_a_full_disk_it_is_kept_in_memory_and_heals(tmp_path: Path) -> None:
    told = in_full_disk("tests.server.test_kept_files", tmp_path, "256k")
    assert (
        told["full"]
        == "the folder for it (state_dir) cannot be written: the disk is full (ENOSPC: No space left on device)"
    )
    assert told["kept"] == "x" * 100_000
    assert told["left"] == ["a"], "no draft is left"
    assert told["copied"] == 100_000, "as soon as there is room"
    assert told["after"] == ""
    assert told["log"] == [logging.WARNING, logging.INFO]


def on_full_disk(disk: Path) -> dict[str, object]:
    """Runs with ``disk``, of 256 KiB, mounted."""
    records: list[int] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.levelno)  # type: ignore[method-assign]
    logging.getLogger("pyserve").addHandler(handler)
    logging.getLogger("pyserve").setLevel(logging.INFO)
    kept = KeptFiles(OwnFolder(str(disk), environ={}), SharedMemory())
    assert kept.folder.path is not None and kept.folder.path.parent == disk
    kept.put("a", b"small")
    (disk / "other").write_bytes(b"x" * 200_000)
    full = [kept.put("a", b"x" * 100_000) for _ in range(3)][-1]
    found = (kept.get("a") or b"").decode()
    left = os.listdir(kept.folder.path)
    (disk / "other").unlink()
    kept.look()
    copied = (kept.folder.path / "a").stat().st_size
    after = kept.put("a", b"small")
    return {"full": full, "kept": found, "left": left, "copied": copied, "after": after, "log": records}


if __name__ == "__main__":
    print(json.dumps(on_full_disk(Path(sys.argv[1]))))
