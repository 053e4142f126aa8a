"""What is true of every archive that is opened, and of every one that is refused."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from pyserve.archive.archive import Survey, open_archive, survey
from pyserve.archive.limits import Limits
from pyserve.errors import InvalidModelError, ModelLoadError

# Small enough that no input fills the memory that it is unpacked into.
LIMITS = Limits(entry_count_max=500, unpacked_size_max=8 << 20, entry_size_max=8 << 20, ratio_free_size=1 << 20)
_IN_MEMORY = "/dev/shm"
# What opening an archive leaves beside its files, whatever becomes of it.
_CACHE_FOLDERS = {"locks", "digests", "archives"}


def unpacked(data: bytes, suffix: str) -> dict[str, bytes] | None:
    """The files of an archive by name, weights that stay in it included; None if it is refused.

    Fails if anything but an error that is promised comes out of it, if a file lies elsewhere or is no plain file, if
    descriptors stay open, or if something of a refused archive stays on disk.
    """
    folder = Path(tempfile.mkdtemp(dir=_IN_MEMORY if os.path.isdir(_IN_MEMORY) else None))
    try:
        path = folder / f"m{suffix}"
        path.write_bytes(data)
        before = _open_descriptors()
        found = _open(path, folder / "cache")
        assert _open_descriptors() == before, "descriptors stay open"
        assert {each.name for each in folder.iterdir()} <= {path.name, "cache"}, "something was written elsewhere"
        if found is None:
            _check_nothing_stays(folder / "cache")
        return found
    finally:
        shutil.rmtree(folder)


def _open(path: Path, cache: Path) -> dict[str, bytes] | None:
    surveyed: Survey | None = None
    try:
        with survey(path, limits=LIMITS) as surveyed:
            pass
    except InvalidModelError as error:
        _check_text(error)
    try:
        with open_archive(path, cache_dir=cache, limits=LIMITS) as archive:
            assert surveyed is not None, "opened, though it is not fit to be listed"
            files = _files(archive.model_dir)
            if archive.weights is not None and archive.weights.is_mapped:
                weights = archive.weights
                files[weights.name] = path.read_bytes()[weights.offset : weights.offset + weights.size]
            assert {name: len(content) for name, content in files.items()} == archive.files, "sizes are not as listed"
            return files
    except InvalidModelError as error:
        _check_text(error)
    except ModelLoadError as error:
        # What a disk cannot hold, and that is no fault of the archive; nothing else may be behind it.
        assert isinstance(error.__cause__, OSError) or "room" in error.message or "space" in error.message, error
    return None


def _check_text(error: InvalidModelError) -> None:
    assert error.message.isprintable(), f"a text with control characters: {error.message!r}"
    assert len(error.message) < 2000, f"a text of {len(error.message)} characters"


def _files(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for at, folders, names in os.walk(folder):
        for name in (*folders, *names):
            each = Path(at, name)
            status = each.lstat()
            assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode), f"{name!r} is no file and no folder"
            assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH), f"{name!r} has an odd mode"
            if stat.S_ISREG(status.st_mode):
                files[each.relative_to(folder).as_posix()] = each.read_bytes()
    return files


def _check_nothing_stays(cache: Path) -> None:
    if cache.exists():
        assert {each.name for each in cache.iterdir()} <= _CACHE_FOLDERS
        stays = [each.name for each in (cache / "archives").iterdir()] if (cache / "archives").exists() else []
        assert not stays, f"of a refused archive stays {stays}"


def _open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))
