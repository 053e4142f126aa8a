"""What of a model store is an archive, and what is named and passed over."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyserve.config import model_source
from pyserve.config.archive_url import is_url
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


@pytest.mark.parametrize(("given", "expected"), [
    ("a=b/net.pt", [(None, "a=b/net.pt")]),
    ("x=a=b/net.pt", [("x", "a=b/net.pt")]),
    ("one,two.pt", [(None, "one,two.pt")]),
    ("y=one,two.pt", [("y", "one,two.pt")]),
    ("plain.pt, one,two.pt,a=b/net.pt ,plain.pt", [(None, "plain.pt"), (None, "one,two.pt"), (None, "a=b/net.pt")]),
    ("a=plain.pt", [("a", "plain.pt")]),
    ("q=plain.pt", [("q", "plain.pt")]),  # although there is a file of that very name
    ("none,neither.pt", [(None, "none"), (None, "neither.pt")]),
    ("c=d/none.pt", [("c", "d/none.pt")]),
    ("https://h/m.mar?a=1,plain.pt", [(None, "https://h/m.mar?a=1"), (None, "plain.pt")]),
])  # fmt: skip
def test_commas_and_equals_signs_may_be_of_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: list[tuple[str | None, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    for name in ("a=b/net.pt", "one,two.pt", "plain.pt", "q=plain.pt"):
        (tmp_path / name).write_bytes(b"x")
    found = [
        (name, path if is_url(path) else os.path.relpath(path, tmp_path))
        for name, path, _ in resolve_models(given, None)
    ]
    assert found == expected
