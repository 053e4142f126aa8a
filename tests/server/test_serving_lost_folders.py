"""Servers whose own folders are cleared away or whose disk is full: what they serve, also after a crash."""

from __future__ import annotations

import os
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.full_disk import mounted
from tests.support.serving import LIMIT_S, Server

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

SECURE = [part for name in ("inference", "management") for part in (f"--{name}-address", "https://127.0.0.1:0")]
FULL = "the disk is full (ENOSPC: No space left on device)"


@pytest.fixture
def secured(server: Server, session_store: Path) -> Server:
    """With keys and a certificate that it made, and ``linear`` in its first version."""
    shutil.copytree(session_store, server.store, dirs_exist_ok=True)
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "linear.mar", *SECURE)
    return server


def certificate(server: Server) -> str:
    return ssl.get_server_certificate(server.address())


def register(server: Server, archive: str = "linear-2.mar") -> dict[str, str]:
    answer = server.ask("POST", f"/models?url={archive}&initial_workers=1", None, server.key(), port="management")
    assert answer.status == 200, answer.body
    told: dict[str, str] = answer.json
    return told


def versions(server: Server) -> list[str]:
    answer = server.ask("GET", "/models/linear/all", None, server.key(), port="management")
    return sorted(row["modelVersion"] for row in answer.json)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def own_folder(server: Server) -> Path:
    (folder,) = (server.folder / "state/pyserve").iterdir()
    return folder


def test_what_a_cleaner_takes_comes_back_and_a_crash_loses_nothing(secured: Server) -> None:
    folder, before, key = own_folder(secured), certificate(secured), secured.key()
    files = sorted(os.listdir(folder))
    assert files == ["certificate.pem", "key.pem", "keys.json", "runtime-state.json"]
    shutil.rmtree(secured.folder / "state")
    told = register(secured)
    assert "warning" not in told and folder.is_dir(), "the change itself makes it again"
    wait_for(lambda: sorted(os.listdir(folder)) == files)
    shutil.rmtree(secured.folder / "logs")
    wait_for((secured.folder / "logs/pyserve.log").exists)
    running = secured.running
    secured.pid_path.unlink()
    wait_for(secured.pid_path.exists)
    assert secured.running == running
    shutil.rmtree(secured.folder / "state")
    secured.kill_server_process()
    assert versions(secured) == ["1.0", "2.0"]
    wait_for(lambda: "restarting (1)" in secured.log())  # in the new file
    assert (certificate(secured), secured.key()) == (before, key)
    assert secured.ask("GET", "/token?type=management", None, secured.key("API"), port="management").status == 200
    assert secured.key() != key
    secured.kill_server_process()
    assert versions(secured) == ["1.0", "2.0"], "with the new key"
    assert secured.run("stop").returncode == 0
    assert list((secured.folder / "state/pyserve").iterdir()) == []


class OnSmallDisk(Server):
    """Its logs and state lie on a disk of 1 MiB that only its processes see."""

    def __init__(self, folder: Path, cache: Path):
        super().__init__(folder, cache=cache)
        self.disk = folder / "disk"
        self.environment |= {"LOG_LOCATION": str(self.disk / "logs"), "PYSERVE_STATE_DIR": str(self.disk / "state")}
        self.first: list[str] = []

    def arguments(self, command: str, *more: str) -> list[str]:
        arguments = super().arguments(command, *more)
        return mounted([*self.first, *arguments], self.disk, "1m") if command == "start" else arguments

    @property
    def seen(self) -> Path:
        """The disk, as its processes see it."""
        return Path(f"/proc/{self.running.pid}/root{self.disk}")

    def fill(self) -> None:
        with open(self.seen / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)


@pytest.fixture
def on_small_disk(tmp_path: Path, session_store: Path) -> Iterator[OnSmallDisk]:
    made = OnSmallDisk(tmp_path, session_store.parent / "cache")
    shutil.copytree(session_store, made.store, dirs_exist_ok=True)
    (tmp_path / "config.properties").write_text("disable_token_authorization=false\n")
    try:
        yield made
    finally:
        made.kill()


def test_on_a_full_disk_changes_are_made_and_say_what_is_not_kept(on_small_disk: OnSmallDisk) -> None:
    on_small_disk.start("--models", "linear.mar")
    state = on_small_disk.seen / "state"
    assert sorted(os.listdir(next(state.iterdir()))) == ["keys.json", "runtime-state.json"]
    on_small_disk.fill()
    told = register(on_small_disk)
    assert told["status"] == 'Model "linear" Version: 2.0 registered with 1 initial workers'
    assert told["warning"] == (
        f"What is served is kept in memory only: the folder for it (state_dir) cannot be written: {FULL}. No snapshot "
        f"could be written to the log folder, so that --restore will not know of it: {FULL}."
    )
    on_small_disk.kill_server_process()
    assert versions(on_small_disk) == ["1.0", "2.0"]
    (on_small_disk.seen / "fill").unlink()
    answer = on_small_disk.ask(
        "PUT", "/models/linear/2.0/set-default", None, on_small_disk.key(), port="management"
    )  # fmt: skip
    assert list(answer.json) == ["status"]
    newest = sorted((on_small_disk.seen / "logs/config").iterdir())[-1]
    assert '"2.0"' in newest.read_text().replace("\\", "")


def test_a_start_on_a_full_disk_serves_with_warnings(on_small_disk: OnSmallDisk) -> None:
    fill = f'mkdir {on_small_disk.disk}/state; cat /dev/zero > {on_small_disk.disk}/fill 2>&-; exec "$@"'
    on_small_disk.first = ["sh", "-c", fill, "sh"]
    started = on_small_disk.start("--models", "linear.mar")
    assert f"because {on_small_disk.disk}/state: {FULL}" in started.stderr
    assert versions(on_small_disk) == ["1.0"]
    (on_small_disk.seen / "fill").unlink()
    assert list(register(on_small_disk)) == ["status"], "it writes snapshots as soon as there is room"


def test_a_model_store_with_bad_entries_is_served_from(server: Server, session_store: Path) -> None:
    shutil.copy(session_store / "linear.mar", server.store)
    (server.store / "loop.mar").symlink_to("loop.mar")
    os.mkfifo(server.store / "pipe.mar")
    Path(os.fsdecode(os.fsencode(server.store) + b"/\xff.mar")).touch()
    started = server.start("--models", "all")
    assert "loop.mar: it is a link that leads in a circle; it is passed over" in started.stderr
    assert "pipe.mar: it is neither a file nor a folder; it is passed over" in started.stderr
    assert "\\xff.mar: its name is not UTF-8; it is passed over" in started.stderr
    assert [model["modelName"] for model in server.manage("GET", "/models")["models"]] == ["linear"]
    for name in ("loop.mar", "pipe.mar", "%FF.mar"):
        assert server.ask("POST", f"/models?url={name}", port="management").status in (400, 404)
