"""The folder where archives are unpacked once, keyed by their content.

    <cache>/archives/<key>/contents.json     what was unpacked, and where the weights are
    <cache>/archives/<key>/files/...         the archive's files
    <cache>/archives/<key>/derived/...       what was made from them: compiled models
    <cache>/models/<id>/...                  a registration's own copy of the files, see `model_folder`
    <cache>/archives/.partial-<key>/         being unpacked; renamed when complete, removed when it failed
    <cache>/locks/<xx>                       one of 256 lock files: one process unpacks a key, the others wait
    <cache>/digests/<device>-<inode>         SHA-256 of a file seen before, so that it is not hashed again

The key is the SHA-256 of all of the archive's bytes. Names, sizes and CRC-32s would be faster to collect but are easy
to forge, and whoever forges them would have their code run under another archive's key. Hashing runs at about 1.2 GB/s
and is remembered per device, inode, size, modification and change time; the last one cannot be set back.

Code of an archive never gets to see what lies under a key: one that writes into its folder would change it for others.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyserve.archive.drafts import remove_left_drafts
from pyserve.archive.entries import Entry, SourceFile
from pyserve.errors import ModelLoadError
from pyserve.held_folder import make_held, remove_unheld
from pyserve.os_errors import cause_of

_log = logging.getLogger(__name__)

_PRIVATE_PREFIX = "pyserve-cache-"
_PARTIAL_PREFIX = ".partial-"
_DRAFT_AGE_MAX_S = 86_400.0
_FORMAT = 2  # before, handlers worked in what was unpacked, and may have changed it
# File systems keep times in steps; a file written within this time of being hashed may change without showing it.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class Contents:
    """What lies under a key.

    Attributes:
        root: folder inside ``files`` that holds the model, with a trailing slash, or empty.
        files: size in bytes of each unpacked file, by name.
        weights: (name, offset, size) of weights that stay in the archive; None when they are among ``files``.
        written: modification time of each unpacked file, whole seconds since 1970, as far as an image keeps it.
    """

    root: str
    files: dict[str, int]
    weights: tuple[str, int, int] | None
    written: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Contents:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` did not write."""
        found = json.loads(text)
        if found["format"] != _FORMAT:
            raise ValueError("another version wrote this")
        weights = found["weights"]
        return cls(
            str(found["root"]),
            {str(name): int(size) for name, size in found["files"].items()},
            (str(weights[0]), int(weights[1]), int(weights[2])) if weights else None,
            {str(name): int(time) for name, time in found["written"].items()},
        )

    def are_in(self, folder: Path) -> bool:
        """Whether the files lie in ``folder`` as they were written, as far as size and time show it.

        Raises:
            OSError, KeyError: one is gone, or was not written.
        """
        for name, size in self.files.items():
            status = (folder / name).lstat()
            if (status.st_size, status.st_mtime_ns // 1_000_000_000) != (size, self.written[name]):
                return False
        return True


class ArchiveCache:
    """Unpacked archives below ``root``. Any thread, any number of processes."""

    def __init__(self, root: Path):
        self.root = root
        self._archives = root / "archives"

    def files(self, key: str) -> Path:
        return self._archives / key / "files"

    def models(self) -> Path:
        """The folder of registrations' own copies; created here.

        Raises:
            ModelLoadError: others could write to it.
            OSError: it cannot be made.
        """
        folder = self.root / "models"
        problem = _make_private(folder)
        if problem is not None:
            raise ModelLoadError(f"the cache folder cannot be used: {problem}; give one that only this user can write")
        return folder

    def derived(self, key: str) -> Path:
        """The folder for things made from this content; created here."""
        folder = self._archives / key / "derived"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def look_up(self, key: str) -> Contents | None:
        """What was unpacked under ``key``; None when nothing was, or files are gone or were written to since."""
        try:
            contents = Contents.from_json((self._archives / key / "contents.json").read_text())
            if contents.are_in(self.files(key)):
                return contents
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        return None

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held by the one that unpacks ``key``. Freed by the system when its holder dies."""
        descriptor = os.open(self.root / "locks" / key[:2], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def unpacking(self, key: str) -> Iterator[Path]:
        """A fresh folder to unpack into, for the holder of `lock`; put in place by `commit`, else removed."""
        partial = self._archives / f"{_PARTIAL_PREFIX}{key}"
        if os.path.lexists(partial):  # its writer was killed: the lock is ours now
            _remove(partial)
        partial.mkdir(mode=0o700)
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove_drafts(self) -> None:
        """What processes left that were killed while they unpacked or converted. Blocks; raises nothing."""
        for name in _names_in(self._archives):
            path = self._archives / name
            if name.startswith(_PARTIAL_PREFIX):
                self._remove_partial(path)
                continue
            remove_left_drafts(path / "derived")
            for each in _names_in(path / "derived"):  # of earlier versions
                if each.startswith(("tmp", ".")) or each.endswith((".part", ".partial")):
                    _remove_if_old(path / "derived" / each)
        for folder, mark in ((self.root / "digests", "."), (self.root / "weights", ".part")):
            for name in _names_in(folder):
                if mark in name:
                    _remove_if_old(folder / name)

    def _remove_partial(self, path: Path) -> None:
        key = path.name.removeprefix(_PARTIAL_PREFIX)
        with contextlib.suppress(OSError):
            descriptor = os.open(self.root / "locks" / key[:2], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer is gone
                _remove(path)
            finally:
                os.close(descriptor)

    def commit(self, key: str, partial: Path, contents: Contents) -> None:
        """Makes what was unpacked visible at once. An older, damaged folder of the same key goes away."""
        for name in contents.files:
            contents.written[name] = (partial / "files" / name).lstat().st_mtime_ns // 1_000_000_000
        with (partial / "contents.json").open("x") as file:
            file.write(contents.to_json())
            file.flush()
            os.fsync(file.fileno())
        target = self._archives / key
        if os.path.lexists(target):
            if (target / "derived").is_dir():
                (target / "derived").rename(partial / "derived")
            discarded = self._archives / f"{_PARTIAL_PREFIX}{key}-{os.urandom(4).hex()}"
            target.rename(discarded)
            with contextlib.suppress(OSError):
                _remove(discarded)
        _sync_folder(partial)
        partial.rename(target)
        _sync_folder(self._archives)

    def digest(self, source: SourceFile) -> str:
        """SHA-256 of the file's bytes in hex, remembered for the next time."""
        before = os.fstat(source.descriptor)
        seen: dict[str, Any] = {
            "size": before.st_size,
            "mtime_ns": before.st_mtime_ns,
            "ctime_ns": before.st_ctime_ns,
        }
        note = self.root / "digests" / f"{before.st_dev}-{before.st_ino}"
        try:
            known = json.loads(note.read_text())
            if isinstance(known, dict) and {**seen, "sha256": known.get("sha256")} == known:
                return str(known["sha256"])
        except (OSError, ValueError):
            pass
        digest = hashlib.sha256()
        for chunk in source.chunks(0, source.size):
            digest.update(chunk)
        key = digest.hexdigest()
        if time.time_ns() - max(before.st_mtime_ns, before.st_ctime_ns) > _SETTLED_NS:
            self._remember(note, json.dumps({**seen, "sha256": key}))
        return key

    @staticmethod
    def _remember(note: Path, text: str) -> None:
        """Where there is no room for it, the next one hashes again."""
        partial = note.with_name(f"{note.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            partial.write_text(text)
            partial.replace(note)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def folder_key(path: Path, entries: list[Entry]) -> str:
    """A key for a plain folder: of its files' names, identities and times, not of gigabytes of content.

    The change time cannot be set back, so a file cannot be altered and keep the key.
    """
    digest = hashlib.sha256(str(path).encode())
    for entry in entries:
        if not entry.is_folder:
            status = (path / entry.name).stat()
            digest.update(
                f"\n{entry.name}\0{status.st_dev} {status.st_ino} {status.st_size} "
                f"{status.st_mtime_ns} {status.st_ctime_ns}".encode()
            )
    return digest.hexdigest()


def open_cache(cache_dir: Path | None = None) -> ArchiveCache:
    """The cache in ``cache_dir``, or the default one.

    Default: ``$PYSERVE_CACHE``, else ``$XDG_CACHE_HOME/pyserve``, else ``~/.cache/pyserve``. When that cannot be
    written, or others could write it, a private temporary folder serves until the process ends.

    Raises:
        ModelLoadError: ``cache_dir`` was given and cannot be used, or no folder can be made.
    """
    root = cache_dir or _default_root()
    problem = _prepare(root)
    if problem is None:
        return ArchiveCache(root)
    if cache_dir is not None:
        raise ModelLoadError(f"the cache folder cannot be used: {problem}; give one that only this user can write")
    try:
        private = _private_root(str(root), problem)
        problem = _prepare(private)  # again, if it was cleared away
    except OSError as error:
        problem = cause_of(error)
    if problem is not None:
        raise ModelLoadError(f"no cache folder can be made: {problem}; set PYSERVE_CACHE to one that can be written")
    return ArchiveCache(private)


def _default_root() -> Path:
    if given := os.environ.get("PYSERVE_CACHE"):
        return Path(given).absolute()
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given).absolute() / "pyserve"
    return Path(os.path.expanduser("~")).absolute() / ".cache" / "pyserve"


def _prepare(root: Path) -> str | None:
    """Makes the folders; why they cannot be used, or None. Code is run from here, so nobody else may write it."""
    try:
        for folder in (root / "archives", root / "locks", root / "digests"):
            problem = _make_private(folder)
            if problem is not None:
                return problem
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _make_private(folder: Path) -> str | None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        return f"'{folder.name}' in it belongs to, or can be written by, another user"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"'{folder.name}' in it cannot be written"
    return None


@functools.lru_cache(maxsize=8)
def _private_root(wanted: str, problem: str) -> Path:
    base = Path(tempfile.gettempdir())
    remove_unheld(base, _PRIVATE_PREFIX)  # those of processes that were killed
    root, _ = make_held(base, _PRIVATE_PREFIX)  # until the process ends
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    _log.warning(
        "cache folder %s cannot be used (%s); unpacking into %s until exit. Set PYSERVE_CACHE to a folder "
        "that only this user can write",
        wanted,
        problem,
        root,
    )
    return root


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _remove_if_old(path: Path) -> None:
    """Its writer may still be at work."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _DRAFT_AGE_MAX_S:
            _remove(path)


def _remove(path: Path) -> None:
    """A folder, or whatever has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
