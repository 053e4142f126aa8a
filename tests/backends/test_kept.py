"""What was made for a backend is found again by what it was made of, and by nothing else."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pyserve.archive.archive import Archive, open_archive
from pyserve.backends import kept, table
from pyserve.backends.kept import (
    Choice,
    Made,
    draft,
    forget_damaged,
    keep,
    keep_choice,
    main_file,
    read_choice,
    read_made,
)
from tests.support.packing import pack

DIGESTS = {"model.xml": hashlib.sha256(b"a graph").hexdigest()}
MADE = Made(
    "openvino", "fp32", 1.5, 7, 2e-6, 12, note="as it is", ranges=(None, (0, 99)), sizes=(((1, None),), ()),
    digests=DIGESTS,
)  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    return open_archive(pack(tmp_path))


def put(archive: Archive, made: Made, text: str = "a graph") -> None:
    with draft(archive, made.backend, made.precision) as folder:
        if not made.error:
            (folder / table.BACKENDS[made.backend].file).write_text(text)
        keep(archive, made, folder)


def test_what_is_kept_is_found_whole(archive: Archive) -> None:
    assert read_made(archive, "openvino", "fp32") is None
    put(archive, MADE)
    assert read_made(archive, "openvino", "fp32") == MADE
    assert main_file(archive, "openvino", "fp32").read_text() == "a graph"
    assert read_made(archive, "openvino", "bf16") is None and read_made(archive, "aotinductor", "fp32") is None
    put(archive, MADE, "another graph")
    assert main_file(archive, "openvino", "fp32").read_text() == "another graph"
    derived = main_file(archive, "openvino", "fp32").parents[1]
    assert [each.name for each in derived.iterdir()] == [main_file(archive, "openvino", "fp32").parent.name]


def test_a_failure_is_kept_too_and_an_infinite_difference_survives(archive: Archive) -> None:
    failed = Made("openvino", "fp32", error="it cannot", difference=math.inf)
    put(archive, failed)
    found = read_made(archive, "openvino", "fp32")
    assert found is not None and found.error == "it cannot" and found.difference == 1e300


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"backend": 1}', "null"])
def test_a_damaged_note_counts_as_nothing(archive: Archive, text: str) -> None:
    put(archive, MADE)
    (main_file(archive, "openvino", "fp32").parent / "made.json").write_text(text)
    assert read_made(archive, "openvino", "fp32") is None


def test_a_note_without_its_file_counts_as_nothing(archive: Archive) -> None:
    put(archive, MADE)
    main_file(archive, "openvino", "fp32").unlink()
    assert read_made(archive, "openvino", "fp32") is None


def test_files_that_were_cut_short_count_as_nothing(archive: Archive) -> None:
    put(archive, MADE)
    main_file(archive, "openvino", "fp32").write_text("a gr")
    assert read_made(archive, "openvino", "fp32") is None
    put(archive, MADE)
    assert read_made(archive, "openvino", "fp32") == MADE


def test_files_that_were_changed_are_removed_and_named(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    folder = main_file(archive, "openvino", "fp32").parent
    assert forget_damaged(archive, ["openvino"], "fp32") == {}
    put(archive, MADE)
    assert forget_damaged(archive, ["openvino", "aotinductor"], "fp32") == {}
    main_file(archive, "openvino", "fp32").write_bytes(b"a gra\0\0")  # of the same size
    assert read_made(archive, "openvino", "fp32") == MADE, "sizes say nothing"
    found = forget_damaged(archive, ["openvino", "aotinductor"], "fp32")
    assert found == {"openvino": f"model.xml in {folder} was changed or damaged since it was made"}
    assert found["openvino"] in caplog.text
    assert not folder.exists() and read_made(archive, "openvino", "fp32") is None


def test_a_file_too_many_or_too_few_is_a_change(archive: Archive) -> None:
    folder = main_file(archive, "openvino", "fp32").parent
    put(archive, MADE)
    (folder / "model.bin").write_text("weights")
    assert "model.bin in " in forget_damaged(archive, ["openvino"], "fp32")["openvino"]
    put(archive, MADE)
    main_file(archive, "openvino", "fp32").unlink()
    assert "model.xml in " in forget_damaged(archive, ["openvino"], "fp32")["openvino"]


def test_a_failure_that_is_kept_has_no_files_to_be_damaged(archive: Archive) -> None:
    put(archive, Made("openvino", "fp32", error="it cannot"))
    assert forget_damaged(archive, ["openvino"], "fp32") == {}
    assert read_made(archive, "openvino", "fp32") is not None


def test_another_cpu_torch_or_handler_finds_nothing(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    put(archive, MADE)
    with monkeypatch.context() as other:
        other.setattr(kept, "cpu_identity", lambda: "another CPU")
        assert read_made(archive, "openvino", "fp32") is None
    with monkeypatch.context() as other:
        other.setattr(kept, "version", lambda name: "0.0")
        assert read_made(archive, "openvino", "fp32") is None
    assert read_made(archive, "openvino", "fp32") == MADE
    archive.use_handler("image_classifier")
    assert read_made(archive, "openvino", "fp32") is None


def test_what_no_start_has_read_for_long_goes_when_another_is_kept(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept_by(torch_version: str) -> Path:
        with monkeypatch.context() as other:
            other.setattr(kept, "version", lambda name: torch_version)
            put(archive, MADE)
            return main_file(archive, "openvino", "fp32")

    old, used = kept_by("2.0"), kept_by("2.1")
    for each in (old, used):
        os.utime(each.parent / "made.json", (0, 0))
    monkeypatch.setattr(kept, "version", lambda name: "2.1")
    assert read_made(archive, "openvino", "fp32") == MADE
    now = kept_by("2.2")
    assert now.exists() and used.exists() and not old.parent.exists()


def test_several_that_keep_at_once_leave_one_whole(archive: Archive) -> None:
    made = replace(MADE, size=1000)
    threads = [threading.Thread(target=put, args=(archive, made, f"{n}" * 1000)) for n in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    text = main_file(archive, "openvino", "fp32").read_text()
    assert len(text) == 1000 and len(set(text)) == 1
    assert read_made(archive, "openvino", "fp32") == made


def test_a_choice_is_one_of_its_batch_size_and_cpus(archive: Archive) -> None:
    choice = Choice("openvino", "the fastest", ({"backend": "openvino", "batch_1_ms": 2.5},), is_final=False)
    assert read_choice(archive, "fp32", 8, 2) is None
    keep_choice(archive, "fp32", 8, 2, choice)
    assert read_choice(archive, "fp32", 8, 2) == choice
    assert read_choice(archive, "fp32", 4, 2) is None and read_choice(archive, "fp32", 8, 1) is None


def test_every_row_of_the_table_is_complete() -> None:
    for name, row in table.BACKENDS.items():
        assert row.name == name and row.label and Path(row.file).name == row.file
        assert set(row.precisions) <= set(table.AGREEMENT)
        assert row.missing() or row.version()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "g++" in table.BACKENDS["aotinductor"].missing()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in table.BACKENDS["aotinductor"].missing()
