"""`pyserve dev`: a folder is served, and its handler's code is taken on while it is edited."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.archive.given import Given
from pyserve.commands import cli, dev
from pyserve.errors import ConfigError, ServeError
from tests.support.serving import LIMIT_S, Server

# {version} is what is edited; `loads` counts the calls of initialize in this instance's life.
HANDLER = """
import os

from words import WORD

DEFAULT = "{version}"


class Handler:
    def __init__(self):
        self.loads = 0

    def initialize(self, context):
        self.loads += 1

    def handle(self, data, context):
        return [{{"version": "{version}", "word": WORD, "loads": self.loads, "pid": os.getpid()}} for row in data]
"""
BROKEN = "def handle(data, context)\n    return data\n"
ADDRESSES = ("--inference-address", "--management-address", "--metrics-address")


class Developer:
    """Edits a folder that is being served."""

    def __init__(self, folder: Path):
        self.folder = folder / "mine"
        self.folder.mkdir()
        self.server = Server(folder)
        self._log = folder / "terminal.log"

    def save(self, text: str, file: str = "handler.py") -> None:
        """As an editor does, at once."""
        (self.folder / "new.tmp").write_text(text)
        os.replace(self.folder / "new.tmp", self.folder / file)

    def start(self) -> subprocess.Popen[bytes]:
        addresses = [text for flag in ADDRESSES for text in (flag, "http://127.0.0.1:0")]
        with open(self._log, "wb") as log:
            return subprocess.Popen(
                self.server.arguments("dev", str(self.folder), *addresses), env=self.server.environment,
                cwd=self.server.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def shown(self) -> str:
        """All that the terminal shows."""
        return self._log.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        """Until the terminal shows it; nothing is asked meanwhile."""
        deadline = time.monotonic() + LIMIT_S
        while self.shown().count(text) < count:
            assert time.monotonic() < deadline, f"waited in vain for {text!r}:\n{self.shown()}"
            time.sleep(0.01)

    def reloads(self) -> int:
        return self.shown().count("reloaded ")

    def answer(self) -> Any:
        got = self.server.ask("POST", "/predictions/mine", b"1")
        assert got.status == 200, got.body
        return got.json


@pytest.fixture(scope="module")
def developer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Developer]:
    developer = Developer(tmp_path_factory.mktemp("dev"))
    developer.save(HANDLER.format(version="start"))
    developer.save("WORD = 'one'\n", "words.py")
    with developer.start() as popen:
        try:
            developer.wait_for("Model server started.")
            yield developer
            popen.send_signal(signal.SIGINT)
            assert popen.wait(LIMIT_S) == 0, developer.shown()
        finally:
            popen.kill()


@pytest.mark.server
def test_what_is_taken_for_granted_is_said(developer: Developer) -> None:
    first = developer.shown().splitlines()[0]
    assert first.endswith("no MAR-INF/MANIFEST.json in mine; taken: name mine, handler handler.py")
    assert not (developer.folder / "MAR-INF").exists() and not (developer.folder / "__pycache__").exists()


@pytest.mark.server
def test_new_code_answers_without_loading_again_and_is_noticed_while_nothing_is_asked(developer: Developer) -> None:
    before, reloads = developer.answer(), developer.reloads()
    developer.save(HANDLER.format(version="edited"))
    developer.wait_for("reloaded ", reloads + 1)
    after = developer.answer()
    assert after["version"] == "edited" != before["version"]
    assert (after["loads"], after["pid"]) == (1, before["pid"])


@pytest.mark.server
def test_modules_beside_the_handler_are_taken_on_too(developer: Developer) -> None:
    developer.save("WORD = 'two'\n", "words.py")
    developer.wait_for("reloaded words.py")
    assert developer.answer()["word"] == "two"


@pytest.mark.server
def test_error_keeps_the_old_code_is_told_once_and_its_mend_is_taken_on(developer: Developer) -> None:
    reloads = developer.reloads()
    developer.save(HANDLER.format(version="good"))
    developer.wait_for("reloaded ", reloads + 1)
    developer.save(BROKEN)
    developer.wait_for("reload failed, keeping the previous code: SyntaxError: expected ':'")
    for _ in range(5):
        assert developer.answer()["version"] == "good"
    developer.save(HANDLER.format(version="mended"))
    developer.wait_for("reloaded ", reloads + 2)
    assert developer.answer()["version"] == "mended"
    assert developer.shown().count("reload failed, keeping the previous code") == 1
    assert developer.shown().count("    def handle(data, context)\n") == 1, "the line is shown"


@pytest.mark.server
def test_requests_while_files_are_saved_get_the_old_code_or_the_new(developer: Developer) -> None:
    """Saved in place, so that the file is empty for a moment; and of one size, within one tick of a coarse clock."""
    wrong: list[str] = []
    stopped = threading.Event()

    def ask() -> None:
        with developer.server.client() as client:
            while not stopped.is_set():
                answer = client.ask("POST", "/predictions/mine", b"1")
                if answer.status != 200 or answer.json["loads"] != 1:
                    wrong.append(answer.body.decode())
                    return

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    seen = set()
    try:
        for number in range(30):
            (developer.folder / "handler.py").write_text(HANDLER.format(version=f"{number:03}"))
            seen.add(developer.answer()["version"])
    finally:
        stopped.set()
        for thread in threads:
            thread.join(LIMIT_S)
    assert not wrong
    assert len(seen) > 1
    assert developer.answer()["version"] == "029"


# --- what cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"), [("nowhere", "nowhere; .* has no such file"), ("file.mar", "is a text file, not a model")]
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "file.mar").write_bytes(b"x")
    with pytest.raises(ServeError, match=text):
        dev.open_folder(tmp_path / name, Given())


def test_empty_folder_says_what_to_write_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert cli.main(["dev", "empty"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "handle(data, context)" in error and "handler.py" in error


def test_folder_whose_path_cannot_stand_in_a_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="comma"):
        dev.model_to_load(tmp_path / "a,b", "m")
