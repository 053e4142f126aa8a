"""The supervisor's own folder: where copies of the state, of the keys and of a certificate made at start lie.

For its owner only, with a name of its own, so that no two servers meet. In this order: ``state_dir``;
``$XDG_RUNTIME_DIR/pyserve``; ``$XDG_STATE_HOME/pyserve`` (``~/.local/state/pyserve``); the temporary folder, and if
that is full, ``/dev/shm``. Nobody clears the first three while a server runs; should the folder vanish all the same,
`OwnFolder.look` makes another.

Whoever uses it holds it (`pyserve.held_folder`), and the next one to make such a folder removes those without a holder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pyserve.held_folder import hold, is_at, make_held, remove_unheld
from pyserve.os_errors import cause_of

log = logging.getLogger(__name__)

PREFIX = "pyserve-server-"
TOUCH_INTERVAL_S = 300.0
_SHARED_MEMORY = Path("/dev/shm")


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
        is_guest: ``path`` is that process's; else this one's, which was another program before.

    Attributes:
        path: the folder; None while there is no place for one.
        problem: why it lies where things do not stay, or nowhere; ``""`` if it does not.
    """

    def __init__(
        self, state_dir: str = "", path: Path | None = None, environ: Mapping[str, str] = os.environ, *,
        is_guest: bool = True,
    ):  # fmt: skip
        self.path: Path | None = None
        self.problem = ""
        self._bases = bases(state_dir, environ)
        self._descriptor = -1
        self._owner = os.getpid()
        self._is_guest = False
        self._touched_at = time.monotonic()
        if path is not None and (self._take(path) or self._make_at(path)):
            self._is_guest = is_guest
            return
        for base in self._bases:
            remove_unheld(base.path, PREFIX)
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
        return self.path is not None and is_at(self._descriptor, self.path)

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
        path, descriptor = make_held(base, PREFIX)
        try:
            probe = path / ".room"  # a full disk may still have room for a folder
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError:
            os.close(descriptor)
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.path, self._descriptor = path, descriptor

    def _make_at(self, path: Path) -> bool:
        if any(base.path == path.parent and _prepare(base) for base in self._bases):
            return False
        try:
            path.mkdir(mode=0o700)
        except OSError:
            return False
        return self._take(path)

    def _take(self, path: Path) -> bool:
        """Holds it; whether that can be."""
        descriptor = hold(path)
        if descriptor is None:
            return False
        self._let_go()
        self.path, self._descriptor = path, descriptor
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
