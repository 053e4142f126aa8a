"""Folders that are models, and hold what can be no file of one: it is named and passed over."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from pyserve.archive.archive import open_archive
from pyserve.archive.folder_manifest import infer_manifest
from pyserve.archive.import_scan import scan_folder
from pyserve.archive.model_folder import remove_left_overs
from pyserve.archive.samples import archive_samples
from pyserve.errors import ModelLoadError
from tests.support.archive_files import good_files, write_folder


def spoil(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    (folder / ".#handler.py").symlink_to("me@machine.4711")  # an editor's lock
    os.mkfifo(folder / "pipe.py")
    os.mkfifo(folder / "sample_input.json")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(folder / "socket"))
    for name in (b"\xff\xfe", b"a\nb"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
    Path(os.fsdecode(os.fsencode(folder) + b"/folder\xff")).mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/folder\xff/inner")).touch()


def test_a_folder_with_what_is_no_file_of_a_model_is_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "model", good_files())
    before = open_archive(folder, cache_dir=tmp_path / "cache").files
    spoil(folder)
    caplog.set_level(logging.WARNING)
    assert open_archive(folder, cache_dir=tmp_path / "cache").files == before
    passed = sorted(record.getMessage().partition(": ")[2] for record in caplog.records)
    assert [text.partition(" ")[0] for text in passed] == sorted(
        ['".#handler.py"', '"\\udcff\\udcfe"', '"a\\nb"', '"folder\\udcff"', '"loop"', '"pipe.py"',
         '"sample_input.json"', '"socket"'],
    )  # fmt: skip
    assert all(text.endswith("; it is passed over") for text in passed)


def test_a_manifest_that_names_what_is_passed_over_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", good_files(serializedFile="loop"))
    spoil(folder)
    archive = open_archive(folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ModelLoadError, match='serializedFile "loop" is not in the archive'):
        archive.check_complete()


def test_nothing_that_looks_into_such_a_folder_waits_or_fails(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"handler.py": b"import json\n"})
    spoil(folder)
    assert archive_samples(folder) == []
    assert [each.module for each in scan_folder(folder)[0]] == ["json"]
    assert b"handler.py" in infer_manifest(folder).text


def test_locks_that_are_no_files_do_not_hold_the_clearing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.lock")
    (tmp_path / "b.lock").symlink_to("b.lock")
    (tmp_path / "c.lock").mkdir()
    (tmp_path / "d").mkdir()
    (tmp_path / "d.lock").touch()
    remove_left_overs(tmp_path)
    assert not (tmp_path / "d").exists() and (tmp_path / "c.lock").exists()
