"""What of a model store is an archive, and what is named and passed over."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyserve.config import model_source
from pyserve.config.config import load_config
from pyserve.config.model_source import list_store, resolve_models, store_problems


def spoil(store: Path) -> None:
    """Puts what cannot be an archive into ``store``."""
    (store / "loop.mar").symlink_to("loop.mar")
    (store / "there.mar").symlink_to("back.mar")
    (store / "back.mar").symlink_to("there.mar")
    (store / "dangling.mar").symlink_to("/nowhere/a.mar")
    os.mkfifo(store / "pipe.mar")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(store / "socket.mar"))
    (store / "notes").symlink_to("notes")  # looks like no archive: nobody misses it
    Path(os.fsdecode(os.fsencode(store) + b"/\xff\xfe.mar")).touch()
    (store / "two\nlines.mar").symlink_to("two\nlines.mar")


PROBLEMS = [
    "\\xff\\xfe.mar: its name is not UTF-8",
    "back.mar: it is a link that leads in a circle",
    "dangling.mar: it is a link to a file that is not there",
    "loop.mar: it is a link that leads in a circle",
    "pipe.mar: it is neither a file nor a folder",
    "socket.mar: it is neither a file nor a folder",
    "there.mar: it is a link that leads in a circle",
    "two\\nlines.mar: it is a link that leads in a circle",
]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "good.mar").write_bytes(b"x")
    (folder / "linked.mar").symlink_to("good.mar")
    (folder / "unpacked").mkdir()
    spoil(folder)
    return folder


def test_bad_entries_are_named_and_the_others_are_taken(store: Path) -> None:
    assert list_store(str(store)) == ["good.mar", "linked.mar", "unpacked"]
    assert store_problems(str(store)) == PROBLEMS
    assert [source.shown for source in resolve_models("all", str(store))] == ["good.mar", "linked.mar", "unpacked"]
    # Asked for by name each is kept, so that the server reports it.
    assert [source.shown for source in resolve_models("loop.mar,x=pipe.mar", str(store))] == ["loop.mar", "pipe.mar"]
    config = load_config({"model_store": (str(store), "--model-store"), "load_models": ("all", "--models")}, environ={})
    assert config.store_files() == ["good.mar", "linked.mar", "unpacked"]
    assert [text for text in config.warnings if text.startswith("model store: ")] == [
        f"model store: {problem}; it is passed over" for problem in PROBLEMS
    ]


def test_entries_that_go_while_they_are_listed_are_no_entries(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = os.listdir(store)
    monkeypatch.setattr(model_source.os, "listdir", lambda _: [*names, "gone.mar"])
    assert list_store(str(store)) == ["good.mar", "linked.mar", "unpacked"]
    assert store_problems(str(store)) == PROBLEMS


def test_a_store_that_goes_or_cannot_be_read_has_no_entries(tmp_path: Path) -> None:
    assert list_store(str(tmp_path / "gone")) == []
    assert store_problems(str(tmp_path / "gone")) == ["gone: it cannot be listed: No such file or directory"]
    assert list_store(None) == store_problems(None) == []
