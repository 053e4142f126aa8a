"""The supervisor's own folder: where copies of the state, of the keys and of a certificate made at start lie.

For its owner only, with a name of its own, so that no two servers meet. In this order: ``state_dir``;
``$XDG_RUNTIME_DIR/pyserve``; ``$XDG_STATE_HOME/pyserve`` (``~/.local/state/pyserve``); the temporary folder, and if
that is full, ``/dev/shm``. Nobody clears the first three while a server runs; should the folder vanish all the same,
`OwnFolder.look` makes another.

Whoever uses it holds a lock on it for as long as it lives, however that ends. The next one to make such a folder
removes those without a holder. Where homes are shared between machines whose locks do not reach each other, another
machine's folder counts as held until it was not touched for an hour; `OwnFolder.look` touches ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pyserve.os_errors import cause_of

log = logging.getLogger(__name__)

PREFIX = "pyserve-server-"
TOUCH_INTERVAL_S = 300.0
LEFT_AFTER_S = 3600.0
_SHARED_MEMORY = Path("/dev/shm")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9.]")


class Base(NamedTuple):
    """A folder that own folders can be made in.

    Attributes:
        makes: whether it is made if it is not there; else it only serves when nothing better can be had.
        with_parents: whether what lies above it is made too.
        is_wanted: it was asked for: another one is a reason to warn.
    """

    path: Path
    makes: bool = False
    with_parents: bool = False
    is_wanted: bool = False


def bases(state_dir: str, environ: Mapping[str, str] = os.environ) -> list[Base]:
    """Where to look, the best first.

    Args:
        state_dir: as configured; ``""`` if it is not.
    """
    found = [Base(Path(state_dir), makes=True, with_parents=True, is_wanted=True)] if state_dir else []
    runtime, state = environ.get("XDG_RUNTIME_DIR", ""), environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(runtime):  # the specification has relative ones ignored
        found.append(Base(Path(runtime, "pyserve"), makes=True))
    home = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~"), ".local", "state")
    if home.is_absolute():
        found.append(Base(home / "pyserve", makes=True, with_parents=True))
    with contextlib.suppress(OSError):  # there is none that can be written
        found.append(Base(Path(tempfile.gettempdir())))
    return [*found, Base(_SHARED_MEMORY)]


class OwnFolder:
    """A folder of our own, until `remove`. Any thread, one at a time.

    Args:
        state_dir: as configured; ``""`` if it is not.
        path: that of the process that started this one, which removes it; None for a new one.

    Attributes:
        path: the folder; None while there is no place for one.
        problem: why it lies where things do not stay, or nowhere; ``""`` if it does not.
    """

    def __init__(self, state_dir: str = "", path: Path | None = None, environ: Mapping[str, str] = os.environ):
        self.path: Path | None = None
        self.problem = ""
        self._bases = bases(state_dir, environ)
        self._descriptor = -1
        self._owner = os.getpid()
        self._is_guest = False
        self._touched_at = time.monotonic()
        if path is not None and (self._take(path) or self._make_at(path)):
            self._is_guest = True
            return
        for base in self._bases:
            for left in _left_overs(base.path):
                _remove_left_over(left)
        self._make()

    def look(self) -> bool:
        """Makes it again if it is gone, there if that can be, else at the next place. Returns whether it did."""
        if self._is_there():
            if time.monotonic() - self._touched_at > TOUCH_INTERVAL_S:
                self._touched_at = time.monotonic()
                with contextlib.suppress(OSError):
                    os.utime(self._descriptor)
            return False
        gone = self.path
        if gone is not None and (self._take(gone) or self._make_at(gone)):
            log.warning("%s was removed by somebody else; it is there again", gone)
            return True
        self._is_guest = False
        self._make()
        if gone is not None:
            log.warning("%s was removed by somebody else; %s is there in its place", gone, self.path or "nothing")
        return self.path is not None

    def remove(self) -> None:
        """Removes it, with what is in it; only lets go of another process's."""
        if self.path is not None and not self._is_guest and os.getpid() == self._owner:
            shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()
        self.path = None

    def _is_there(self) -> bool:
        if self.path is None:
            return False
        try:
            return os.path.samestat(os.lstat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def _make(self) -> None:
        """At the first place that takes it. None may."""
        self._let_go()
        self.path = None
        problems: list[tuple[Base, str]] = []
        for base in self._bases:
            problem = self._make_in(base)
            if problem:
                problems.append((base, problem))
                continue
            if base.makes:  # as good as those before it, unless one was asked for
                problems = [(each, why) for each, why in problems if each.is_wanted]
            break
        self.problem = "; ".join(f"{base.path}: {why}" for base, why in problems if base.makes or self.path is None)

    def _make_in(self, base: Base) -> str:
        """Why it cannot be, or ``""``."""
        problem = _prepare(base)
        if not problem:
            try:
                self._make_new(base.path)
            except OSError as error:
                problem = cause_of(error)
        return problem

    def _make_new(self, base: Path) -> None:
        while self.path is None:
            path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_host()}-", dir=base))
            try:
                probe = path / ".room"  # a full disk may still have room for a folder
                probe.write_bytes(b"x" * 4096)
                probe.unlink()
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            self._take(path)  # one that was looking for left-overs may have been quicker, and have removed it

    def _make_at(self, path: Path) -> bool:
        if any(base.path == path.parent and _prepare(base) for base in self._bases):
            return False
        try:
            path.mkdir(mode=0o700)
        except OSError:
            return False
        return self._take(path)

    def _take(self, path: Path) -> bool:
        """Opens and locks it; whether it is there and nobody else could write to it."""
        try:
            descriptor = _opened(path)
        except OSError:
            return False
        try:
            if not _is_ours(os.fstat(descriptor)):
                raise OSError
            with contextlib.suppress(OSError):  # no locks on this file system; then others see none either
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                raise OSError
        except OSError:
            os.close(descriptor)
            return False
        self._let_go()
        self._descriptor = descriptor
        self.path = path
        return True

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _prepare(base: Base) -> str:
    """Makes it if that is ours to do; why it cannot be used, or ``""``."""
    try:
        if base.makes:
            above = next(each for each in base.path.parents if each.exists())
            if not base.path.exists() and above.stat().st_uid not in (0, os.geteuid()):  # sudo keeps the user's home
                return f"{above} belongs to another user"
            base.path.mkdir(mode=0o700, parents=base.with_parents, exist_ok=True)
        status = os.stat(base.path)
        if status.st_uid not in (0, os.geteuid()):
            return "it belongs to another user"
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            return "others can write to it"
    except OSError as error:
        return cause_of(error)
    return ""


def _left_overs(base: Path) -> Iterator[Path]:
    try:
        names = os.listdir(base)
    except OSError:
        return
    yield from (base / name for name in names if name.startswith(PREFIX))


def _remove_left_over(folder: Path) -> None:
    try:
        descriptor = _opened(folder)
    except OSError:
        return  # removed meanwhile, or no folder, or not for us
    try:
        status = os.fstat(descriptor)
        is_here = folder.name.startswith(f"{PREFIX}{_host()}-")
        if _is_ours(status) and (is_here or time.time() - status.st_mtime > LEFT_AFTER_S):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its holder lives
    finally:
        os.close(descriptor)


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == stat.S_IRWXU


def _host() -> str:
    return _NOT_IN_NAMES.sub("_", socket.gethostname())[:64] or "localhost"


def _opened(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
