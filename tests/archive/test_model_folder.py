"""A registration's own folder: whatever is done in it, the archive's other registrations have what was packed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyserve.archive import model_folder
from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.model_folder import ORIGINAL_SIZE_MIN, ModelFolder, file_identity, remove_left_overs
from pyserve.errors import ModelLoadError
from tests.support.archive_files import WEIGHTS, good_files, write_folder, write_plain_mar, write_tgz

LARGE = bytes(range(256)) * (ORIGINAL_SIZE_MIN // 256)
# Makes a folder below the one that is named, tells its path, and waits.
OWNER = """
import sys
from pathlib import Path
from pyserve.archive.model_folder import ModelFolder

folder = ModelFolder(Path(sys.argv[1]))
print(folder.path, flush=True)
sys.stdin.read()
"""


def opened(tmp_path: Path, files: dict[str, bytes] | None = None) -> Archive:
    path = tmp_path / "m.mar"
    if not path.exists():
        write_plain_mar(
            path,
            files or {**good_files(), "labels.txt": b"cat", "data/vocabulary.txt": b"a b"},
            method=zipfile.ZIP_STORED,
        )
    return open_archive(path, cache_dir=tmp_path / "cache")


def below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_opened_archive_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        first, second = one.own_folder(with_weights=True), other.own_folder(with_weights=True)
        packed = below(first)
        assert packed["labels.txt"] == b"cat"
        assert packed["data/vocabulary.txt"] == b"a b"
        assert packed["w.bin"] == WEIGHTS
        assert one.own_folder() == first != second
        (first / "labels.txt").write_bytes(b"dog")
        with (first / "w.bin").open("r+b") as file:
            file.truncate(7)
        (first / "handler.py").rename(first / "gone.py")
        shutil.rmtree(first / "data")
        assert below(second) == packed
        with opened(tmp_path) as later:
            assert below(later.own_folder(with_weights=True)) == packed


def test_closing_removes_it_and_nothing_else(tmp_path: Path) -> None:
    one, other = opened(tmp_path), opened(tmp_path)
    first, second = one.own_folder(), other.own_folder()
    (first / "made").mkdir()
    (first / "made" / "file").touch()
    one.close()
    one.close()
    assert not first.exists()
    assert (second / "handler.py").is_file()
    assert (other.model_dir / "handler.py").is_file()
    assert [path.name for path in second.parent.iterdir() if path.suffix == ".lock"] == [f"{second.name}.lock"]
    other.close()
    assert not list(second.parent.iterdir())


def test_none_is_made_after_closing(tmp_path: Path) -> None:
    archive = opened(tmp_path)
    root = archive.own_folder().parent
    archive.close()
    with pytest.raises(ModelLoadError, match="unregistered"):
        archive.own_folder(completes=True)
    assert not list(root.iterdir())


def test_weights_come_into_it_only_when_they_are_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        folder = archive.own_folder()
        assert not (folder / "w.bin").exists()
        assert archive.own_folder(with_weights=True) == folder
        assert archive.own_folder(with_weights=True) == folder
        assert (folder / "w.bin").read_bytes() == WEIGHTS


def test_archive_below_a_folder_is_copied_from_there(tmp_path: Path) -> None:
    with open_archive(write_tgz(tmp_path / "m.tar.gz"), cache_dir=tmp_path / "cache") as archive:
        assert below(archive.own_folder(with_weights=True)) == good_files()


def test_a_plain_folder_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", good_files())
    with open_archive(folder, cache_dir=tmp_path / "cache") as archive:
        assert archive.own_folder(with_weights=True) == folder.resolve()
        assert archive.originals == {}
    assert below(folder) == good_files()


def test_large_files_know_their_originals_which_are_other_files(tmp_path: Path) -> None:
    with opened(tmp_path, {**good_files(), "w.bin": LARGE}) as archive:
        folder = archive.own_folder(with_weights=True)
        assert set(archive.originals) == {os.path.realpath(folder / "w.bin")}
        original, original_identity, identity = archive.originals[os.path.realpath(folder / "w.bin")]
        assert Path(original).read_bytes() == LARGE
        assert original_identity == file_identity(original)
        assert identity == file_identity(folder / "w.bin")
        assert original_identity[:2] != identity[:2], "a link: who writes to one writes to both"


def test_models_that_are_loaded_at_once_have_the_same_originals(tmp_path: Path) -> None:
    archives = [opened(tmp_path, {**good_files(), "w.bin": LARGE}) for _ in range(8)]
    barrier = threading.Barrier(len(archives))

    def fill(archive: Archive) -> None:
        barrier.wait(60)
        archive.own_folder(with_weights=True)

    with ThreadPoolExecutor(len(archives)) as pool:
        list(pool.map(fill, archives))
    originals = [original for archive in archives for original in archive.originals.values()]
    assert len(originals) == len(archives)
    for path, identity, _ in originals:
        assert file_identity(path) == identity
    for archive in archives:
        archive.close()


def test_what_lies_in_the_cache_beside_the_archives_files_is_not_copied(tmp_path: Path) -> None:
    with opened(tmp_path) as archive:
        (archive.model_dir / "__pycache__").mkdir()
        (archive.model_dir / "__pycache__" / "handler.cpython.pyc").touch()
        (archive.model_dir / "left.txt").touch()
        names = {path.name for path in archive.own_folder().iterdir()}
    assert names == {"MAR-INF", "handler.py", "labels.txt", "data"}


@pytest.mark.parametrize("written", [0, 1000])
def test_files_are_copied_where_the_kernel_cannot_do_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    def refuses(source: int, target: int, count: int) -> int:
        os.write(target, os.read(source, written))
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    with opened(tmp_path) as archive:
        assert (archive.own_folder(with_weights=True) / "w.bin").read_bytes() == WEIGHTS


def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(original: Path, copy: Path) -> None:
        copy.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with opened(tmp_path) as archive:
        with monkeypatch.context() as patched:
            patched.setattr(model_folder, "_copy", full)
            with pytest.raises(ModelLoadError, match=r"m\.mar.*No space left on device.*PYSERVE_CACHE"):
                archive.own_folder()
        assert not list((tmp_path / "cache" / "models").iterdir())
        assert (archive.own_folder() / "handler.py").is_file()


def test_a_disk_without_room_is_refused_before_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "w.bin").write_bytes(bytes(ORIGINAL_SIZE_MIN))
    monkeypatch.setattr("pyserve.archive.model_folder.room_in", lambda folder: ORIGINAL_SIZE_MIN - 1)
    folder = ModelFolder(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        folder.add(source, ["w.bin"])
    assert not (folder.path / "w.bin").exists()
    folder.remove()


def test_a_file_that_could_not_be_copied_is_none_and_comes_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one would be taken for the handler, again and again."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    archive = open_archive(write_plain_mar(tmp_path / "m.mar", good_files()), cache_dir=tmp_path / "cache")
    with archive:
        folder = archive.own_folder(with_weights=True)
        shutil.rmtree(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", full)
            patch.setattr(shutil, "copyfileobj", full)
            with pytest.raises(ModelLoadError, match="No space left"):
                archive.own_folder(with_weights=True, completes=True)
            assert not [path for path in folder.rglob("*") if path.is_file()]
        archive.own_folder(with_weights=True, completes=True)
        for path in folder.rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (archive.model_dir / path.relative_to(folder)).read_bytes()
        assert (folder / "handler.py").stat().st_size


def test_links_stay_links(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "file").write_text("x")
    (source / "below" / "link").symlink_to("../file")
    root = tmp_path / "models"
    root.mkdir()
    folder = ModelFolder(root)
    folder.add(source, ["file", "below/link"])
    assert os.readlink(folder.path / "below" / "link") == "../file"
    (folder.path / "below" / "link").write_text("y")
    assert (source / "file").read_text() == "x"
    folder.remove()


def test_folders_of_killed_processes_are_removed_and_those_of_others_are_not(tmp_path: Path) -> None:
    with (
        subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one,
        subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as two,
    ):
        assert one.stdout is not None and two.stdout is not None
        killed, alive = (Path(each.stdout.readline().decode().strip()) for each in (one, two))  # type: ignore[union-attr]
        one.kill()
        one.wait()
        assert killed.is_dir()
        mine = ModelFolder(tmp_path)
        remaining = {path.name for path in tmp_path.iterdir()}
        assert remaining == {alive.name, f"{alive.name}.lock", mine.path.name, f"{mine.path.name}.lock"}
        remove_left_overs(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == remaining
        mine.remove()
        two.communicate()  # ends as it should, and removes its own
    assert not list(tmp_path.iterdir())


def test_a_forked_child_that_ends_removes_nothing(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path)
    pid = os.fork()
    if pid == 0:
        folder.remove()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert folder.path.is_dir()
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_removed_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ModelFolder(tmp_path)
    (folder.path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda *args: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
        patch.setattr(os, "open", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EMFILE, "no descriptors")))
        folder.remove()
    assert folder.path.is_dir()
    remove_left_overs(tmp_path)
    assert not list(tmp_path.iterdir())
