"""The pid file: which supervisor is running, and where it listens.

Line 1 is the pid, so that ``kill $(head -1 FILE)`` works; line 2 is a JSON object with the rest. A pid alone can
be reused by another process, therefore the start time from /proc is kept with it and compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pyserve.errors import ConfigError

TORCHSERVE_WORD = "org.pytorch.serve.ModelServer"
"""Among the arguments of a running TorchServe, where others look for it."""

_SIZE_MAX = 1 << 16


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
    """

    pid: int
    started: int
    addresses: dict[str, str] = field(default_factory=dict)
    log_file: str = ""
    drain_timeout_s: float = 30
    key_file: str = ""
    model_store: str = ""

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
    return Path(tempfile.gettempdir(), ".pyserve.pid")


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
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        ConfigError: another server holds it, or it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        _write_draft(draft, running)
        try:
            _link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the pid file {path} cannot be written: {error.strerror}; choose another with --pid-file"
        ) from None


def update(path: Path, running: RunningServer) -> None:
    """Replaces what our own file says, in one step. That it could be written once is no promise; then it stays."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        _write_draft(draft, running)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)


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
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        running = _parse(path.read_bytes()[:_SIZE_MAX])
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
        draft.unlink(missing_ok=True)
        return False
    return True


def remove_plain(path: Path, pid: int) -> None:
    """Remove the file if it still names ``pid``."""
    try:
        if path.read_bytes()[:_SIZE_MAX].strip() == str(pid).encode():
            path.unlink()
    except OSError:
        return


def _names_a_torchserve(path: Path) -> bool:
    """Whether the file holds the pid of a running TorchServe: it, or one of ours that was started in its name."""
    try:
        pid = int(path.read_bytes()[:_SIZE_MAX])
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return False
    return TORCHSERVE_WORD.encode() in words


def _is_same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _parse(content: bytes) -> RunningServer | None:
    first, _, rest = content.partition(b"\n")
    try:
        return RunningServer(pid=int(first), **json.loads(rest))
    except (ValueError, TypeError):
        return None
