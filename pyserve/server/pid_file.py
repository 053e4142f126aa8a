"""The pid file: which supervisor is running, and where it listens.

Line 1 is the pid, so that ``kill $(head -1 FILE)`` works; line 2 is a JSON object with the rest. A pid alone can
be reused by another process, therefore the start time from /proc is kept with it and compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import tempfile
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path

from pyserve.errors import ConfigError
from pyserve.os_errors import cause_of
from pyserve.regular_file import open_regular

log = logging.getLogger(__name__)

TORCHSERVE_WORD = "org.pytorch.serve.ModelServer"
"""Among the arguments of a running TorchServe, where others look for it."""

_SIZE_MAX = 1 << 16
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class NoRoomError(ConfigError):
    """The disk has no room for the pid file, or is read-only."""


@dataclass
class RunningServer:
    """What a pid file says.

    Attributes:
        pid: process id of the supervisor.
        started: its start time in clock ticks since boot (/proc/<pid>/stat, field 22).
        addresses: ``inference``, ``management`` and ``metrics`` to address text.
        log_file: absolute path; ``""`` if the log goes to a terminal.
        drain_timeout_s: how long it drains at most.
        key_file: absolute path of the file with the keys that calls need; ``""`` if they need none.
        model_store: absolute path; ``""`` if there is none.
        control: address of the socket where it can be asked to upgrade, see `pyserve.server.control`.
    """

    pid: int
    started: int
    addresses: dict[str, str] = field(default_factory=dict)
    log_file: str = ""
    drain_timeout_s: float = 30
    key_file: str = ""
    model_store: str = ""
    control: str = ""

    @property
    def is_alive(self) -> bool:
        return start_time(self.pid) == self.started

    @property
    def sentence(self) -> str:
        return (
            f"pyserve is already running (pid {self.pid}, {self.addresses.get('inference', 'address unknown')}); "
            f"stop it with `pyserve stop`"
        )


def default_path() -> Path:
    """In the temporary folder: the same one whether or not its disk is full, so that commands find each other's."""
    wanted = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")] + ["/tmp"]
    usable = (each for each in wanted if each and os.path.isdir(each) and os.access(each, os.W_OK | os.X_OK))
    return Path(next(usable, None) or tempfile.gettempdir(), ".pyserve.pid").absolute()


def torchserve_path() -> Path:
    """Where TorchServe writes its pid, and scripts look for it."""
    return Path(tempfile.gettempdir(), ".model_server.pid")


def start_time(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; ``None`` if there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    columns = text.rpartition(")")[2].split()  # the command before it may hold blanks and parentheses
    return None if columns[0] in "ZX" else int(columns[19])


def read(path: Path) -> RunningServer | None:
    """The live server that ``path`` names; ``None`` if there is no such file or it is stale.

    Raises:
        ConfigError: the file cannot be read, or belongs to somebody else and so cannot be trusted.
    """
    try:
        fd = open_regular(path, os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"the pid file {path} cannot be read: {error.strerror}; choose another with --pid-file"
        ) from None
    with open(fd, "rb") as file:
        if os.fstat(fd).st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"the pid file {path} belongs to another user; choose another with --pid-file")
        running = _parse(file.read(_SIZE_MAX))
    return running if running is not None and running.is_alive else None


def write(path: Path, running: RunningServer) -> None:
    """Create the file in one step, replacing a stale one.

    Raises:
        NoRoomError: the disk takes no file.
        ConfigError: another server holds it, or it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        _write_draft(draft, running)
        _link(draft, path)
    except OSError as error:
        kind = NoRoomError if error.errno in _NO_ROOM else ConfigError
        raise kind(
            f"the pid file {path} cannot be written: {cause_of(error)}; choose another with --pid-file"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def update(path: Path, running: RunningServer) -> None:
    """Replaces what our own file says, in one step. That it could be written once is no promise; then it stays."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        _write_draft(draft, running)
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()


def _write_draft(draft: Path, running: RunningServer) -> None:
    rest = {name: value for name, value in vars(running).items() if name != "pid"}
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with open(fd, "w") as file:
        file.write(f"{running.pid}\n{json.dumps(rest)}\n")


def _link(draft: Path, path: Path) -> None:
    """Give ``draft`` the name ``path``; link(2) fails if there is one, so two starters cannot both win."""
    while True:
        try:
            os.link(draft, path)
            return
        except FileExistsError:
            _remove_stale(path)


def _remove_stale(path: Path) -> None:
    try:
        fd = open_regular(path, os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        fcntl.flock(fd, fcntl.LOCK_EX)  # one starter at a time judges a file and removes it
        if not _is_same(fd, path):
            return
        running = _parse(file.read(_SIZE_MAX))
        if running is not None and running.is_alive:
            raise ConfigError(running.sentence)
        path.unlink()


def remove(path: Path, pid: int) -> None:
    """Remove the file if it still names ``pid``."""
    try:
        running = _parse(_content(path))
        if running is not None and running.pid == pid:
            path.unlink()
    except OSError:
        return


def write_plain(path: Path, pid: int) -> bool:
    """Write the pid alone; a stale file is replaced. Returns whether it is there; what is not ours is left alone."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if _names_a_torchserve(path):
            return False
        draft.unlink(missing_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:
            file.write(f"{pid}\n")
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        return False
    return True


def remove_plain(path: Path, pid: int) -> None:
    """Remove the file if it still names ``pid``."""
    try:
        if _content(path).strip() == str(pid).encode():
            path.unlink()
    except OSError:
        return


class PidFiles:
    """The pid files of one supervisor: ours, and one where TorchServe's is looked for. Any thread.

    Args:
        path: of ours.
        plain_path: of the other; None for none.
    """

    def __init__(self, path: Path, plain_path: Path | None):
        self._path = path
        self._plain_path = plain_path
        self._running: RunningServer | None = None
        self._writing = threading.Lock()

    def write(self, running: RunningServer) -> list[tuple[str, str]]:
        """Makes both. Returns what the user should know: (``warning``, one line).

        Raises:
            ConfigError: another server holds it, or it cannot be written whatever room there is.
        """
        notes = []
        try:
            write(self._path, running)
        except NoRoomError as error:
            notes.append(("warning", f"{error.message}. Until it can be, `pyserve stop` and `pyserve status` do not "
                                     f"find this server (pid {running.pid})"))  # fmt: skip
        self._running = running
        if self._plain_path is not None and not write_plain(self._plain_path, running.pid):
            log.warning("%s cannot be written, or belongs to another server", self._plain_path)
        return notes

    def adopt(self, running: RunningServer) -> None:
        """They are there: this process made them when it was another program."""
        self._running = running

    def update(self, running: RunningServer) -> None:
        """Replaces what ours says."""
        with self._writing:
            self._running = running
            update(self._path, running)

    def look(self) -> None:
        """Makes again what was removed by somebody else, or could not be made before."""
        with self._writing:
            if self._running is not None:
                self._look(self._running)

    def _look(self, running: RunningServer) -> None:
        if not os.path.lexists(self._path):
            with contextlib.suppress(OSError):  # the temporary folder of a session may go as a whole
                self._path.parent.mkdir(mode=0o700)
            try:
                write(self._path, running)
            except ConfigError:
                return  # another server's, or no room yet
            log.warning("the pid file %s was gone; it is there again", self._path)
        if self._plain_path is not None and not os.path.lexists(self._plain_path):
            write_plain(self._plain_path, running.pid)

    def remove(self, pid: int) -> None:
        """Removes those that name ``pid``."""
        with self._writing:
            self._running = None
        remove(self._path, pid)
        if self._plain_path is not None:
            remove_plain(self._plain_path, pid)


def _names_a_torchserve(path: Path) -> bool:
    """Whether the file holds the pid of a running TorchServe: it, or one of ours that was started in its name."""
    try:
        pid = int(_content(path))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return TORCHSERVE_WORD.encode() in words


def _content(path: Path) -> bytes:
    with open(open_regular(path), "rb") as file:
        return file.read(_SIZE_MAX)


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _parse(content: bytes) -> RunningServer | None:
    first, _, rest = content.partition(b"\n")
    try:
        said = json.loads(rest)
        known = {each.name for each in fields(RunningServer)} - {"pid"}  # another version may say more
        return RunningServer(pid=int(first), **{name: value for name, value in said.items() if name in known})
    except (ValueError, TypeError, AttributeError):
        return None
