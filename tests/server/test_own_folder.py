"""Where the supervisor's own folder is made, what it does when that is not possible, and what is removed of others."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pyserve.held_folder import LEFT_AFTER_S
from pyserve.server import own_folder
from pyserve.server.own_folder import PREFIX, OwnFolder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a user with a runtime folder and a home."""
    for name in ("run", "home", "tmp"):
        (tmp_path / name).mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return {"XDG_RUNTIME_DIR": str(tmp_path / "run")}


def base_of(folder: OwnFolder) -> Path:
    assert folder.path is not None
    return folder.path.parent


def test_the_first_place_that_can_be_used_is_taken(tmp_path: Path, places: dict[str, str]) -> None:
    folder = OwnFolder(str(tmp_path / "a/b"), environ=places)
    assert (base_of(folder), folder.problem) == (tmp_path / "a/b", "")
    assert folder.path is not None and stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert (base_of(OwnFolder(environ=places)), OwnFolder(environ=places).problem) == (tmp_path / "run/pyserve", "")
    for environ in ({}, {"XDG_RUNTIME_DIR": "relative"}, {"XDG_RUNTIME_DIR": str(tmp_path / "none")}):
        folder = OwnFolder(environ=environ)
        assert (base_of(folder), folder.problem) == (tmp_path / "home/.local/state/pyserve", "")
    folder = OwnFolder(environ={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert base_of(folder) == tmp_path / "state/pyserve"
    assert not (tmp_path / "none").exists(), "a runtime folder is the system's to make"


def test_what_was_asked_for_and_cannot_be_had_is_said(tmp_path: Path, places: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    folder = OwnFolder(str(tmp_path / "file"), environ=places)
    assert base_of(folder) == tmp_path / "run/pyserve"
    assert str(tmp_path / "file") in folder.problem and "exists" in folder.problem


def test_without_a_home_the_temporary_folder_serves_with_a_warning(
    tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    folder = OwnFolder(environ={})
    assert base_of(folder) == tmp_path / "tmp"
    assert "/proc/nobody/.local/state/pyserve: there is no such file or folder (ENOENT" in folder.problem
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    monkeypatch.setattr(own_folder, "_SHARED_MEMORY", Path("/proc/none"))
    folder = OwnFolder(environ={})
    assert folder.path is None and "/proc/none" in folder.problem
    folder.remove()


def test_a_place_that_others_can_write_to_is_not_used(tmp_path: Path, places: dict[str, str]) -> None:
    (tmp_path / "run/pyserve").mkdir()
    (tmp_path / "run/pyserve").chmod(0o777)
    assert base_of(OwnFolder(environ=places)) == tmp_path / "home/.local/state/pyserve"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    folder = OwnFolder(str(tmp_path / "open"), environ=places)
    assert folder.problem == f"{tmp_path / 'open'}: others can write to it"


def test_servers_of_one_user_do_not_meet(places: dict[str, str]) -> None:
    folders = [OwnFolder(environ=places) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert all(folder.path is not None and folder.path.is_dir() for folder in folders), "each lives"
    folders[0].remove()
    assert folders[1].path is not None and folders[1].path.is_dir()


def test_what_a_killed_one_left_is_removed_and_nothing_else(
    tmp_path: Path, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal; from pyserve.server.own_folder import OwnFolder; f = OwnFolder(); print(f.path, flush=True)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"{code}; os.kill(os.getpid(), signal.SIGKILL)"],
        env={**os.environ, **places}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    left = Path(run.stdout.strip())
    assert left.is_dir(), run.stderr
    base = left.parent
    readable, elsewhere, fifo = base / f"{left.name}-r", base / f"{PREFIX}other-host-x", base / f"{PREFIX}pipe"
    readable.mkdir(mode=0o755)
    elsewhere.mkdir(mode=0o700)
    os.mkfifo(fifo)
    (base / f"{PREFIX}loop").symlink_to(f"{PREFIX}loop")
    (base / f"{PREFIX}link").symlink_to(tmp_path / "home")
    OwnFolder(environ=places).remove()
    assert not left.exists()
    assert readable.exists() and elsewhere.exists() and fifo.exists() and (tmp_path / "home").exists()
    long_ago = elsewhere.stat().st_mtime - LEFT_AFTER_S - 1
    os.utime(elsewhere, (long_ago, long_ago))
    descriptor = os.open(elsewhere, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    OwnFolder(environ=places).remove()
    assert elsewhere.exists(), "its holder lives, wherever that is"
    os.close(descriptor)
    OwnFolder(environ=places).remove()
    assert not elsewhere.exists()


def test_one_that_was_removed_is_made_again_and_still_held(tmp_path: Path, places: dict[str, str]) -> None:
    folder = OwnFolder(environ=places)
    path = folder.path
    assert path is not None and not folder.look()
    shutil.rmtree(tmp_path / "run/pyserve")
    assert folder.look() and folder.path == path and path.is_dir()
    OwnFolder(environ=places).remove()
    assert path.is_dir(), "it is held"
    home = OwnFolder(environ={})
    path_there = home.path
    shutil.rmtree(tmp_path / "home/.local")
    assert home.look() and home.path == path_there, "with all that lies above it"
    path.rename(path.with_name("moved"))
    path.mkdir(mode=0o755)  # somebody else's in its place
    assert folder.look() and folder.path not in (None, path)
    shutil.rmtree(tmp_path / "run")
    assert folder.look() and base_of(folder) == tmp_path / "home/.local/state/pyserve"
    folder.remove()
    assert list((tmp_path / "home/.local/state/pyserve").iterdir()) == [path_there]


def test_a_guest_holds_it_too_and_leaves_it(places: dict[str, str]) -> None:
    host = OwnFolder(environ=places)
    guest = OwnFolder(path=host.path, environ=places)
    assert guest.path == host.path is not None
    guest.remove()
    assert host.path.is_dir()
    host.remove()
    alone = OwnFolder(path=Path("/proc/none"), environ=places)
    assert alone.path is not None and alone.path.is_dir()
    alone.remove()
    assert os.listdir(os.path.join(places["XDG_RUNTIME_DIR"], "pyserve")) == []
