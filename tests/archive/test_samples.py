"""What an archive brings along to be sent to its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyserve.archive.samples import (
    SAMPLE_SIZE_MAX,
    SAMPLES_MAX,
    WARM_UP_MAX,
    Sample,
    archive_samples,
    warm_up_samples,
)


def test_samples_are_the_files_of_that_name_in_their_order(tmp_path: Path) -> None:
    for name, body in {
        "sample_input2.txt": b"hi", "sample_input.json": b"[1]", "sample_input_cat.JPG": b"\xff\xd8",
        "sample_input.png": b"\x89PNG", "sample_input.bin": b"\0\1", "sample_input.pt": b"x", "input.json": b"[2]",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(body)
    assert archive_samples(tmp_path) == [
        Sample("sample_input.bin", b"\0\1", "application/octet-stream"),
        Sample("sample_input.json", b"[1]", "application/json"),
        Sample("sample_input.png", b"\x89PNG", "image/png"),
        Sample("sample_input2.txt", b"hi", "text/plain"),
        Sample("sample_input_cat.JPG", b"\xff\xd8", "image/jpeg"),
    ]


def test_what_cannot_be_sent_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "sample_input.json").mkdir()
    (tmp_path / "sample_input_empty.json").write_bytes(b"")
    (tmp_path / "sample_input_gone.json").symlink_to(tmp_path / "nowhere")
    with open(tmp_path / "sample_input_large.bin", "wb") as file:
        file.truncate(SAMPLE_SIZE_MAX + 1)
    assert archive_samples(tmp_path) == []
    assert archive_samples(tmp_path / "no_folder") == []


def test_their_number_is_bounded(tmp_path: Path) -> None:
    for number in range(SAMPLES_MAX + 4):
        (tmp_path / f"sample_input{number:02}.txt").write_text(str(number))
    assert [each.body for each in archive_samples(tmp_path)] == [b"%d" % number for number in range(SAMPLES_MAX)]


def test_files_of_the_warmup_folder_are_samples_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "warmup"
    folder.mkdir()
    for name, body in {"long.json": b"[1, 2]", "cat.JPG": b"\xff", "saved.pt": b"PK", "a.txt": b"hi",
                       "of a day/b.txt": b"ho"}.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(body)
    assert warm_up_samples(tmp_path) == [
        Sample("warmup/a.txt", b"hi", "text/plain"),
        Sample("warmup/cat.JPG", b"\xff", "image/jpeg"),
        Sample("warmup/long.json", b"[1, 2]", "application/json"),
        Sample("warmup/of a day/b.txt", b"ho", "text/plain"),
        Sample("warmup/saved.pt", b"PK", "application/octet-stream"),
    ]
    assert archive_samples(tmp_path) == []


def test_what_cannot_be_sent_to_warm_up_is_named_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "warmup"
    folder.mkdir()
    (folder / "notes.md").write_text("what is here")
    (folder / "empty.json").write_bytes(b"")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    with open(folder / "large.bin", "wb") as file:
        file.truncate(SAMPLE_SIZE_MAX + 1)
    assert warm_up_samples(tmp_path) == [] == warm_up_samples(tmp_path / "no_folder")
    for name, reason in {
        "notes.md": "has to end in one of", "empty.json": "0 bytes", "large.bin": f"1 to {SAMPLE_SIZE_MAX}",
        "gone.txt": "not a file",
    }.items():  # fmt: skip
        assert any(f"warmup/{name}" in text and reason in text for text in caplog.messages), (name, caplog.messages)


def test_at_most_so_many_files_warm_a_model_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "warmup").mkdir()
    for number in range(WARM_UP_MAX + 2):
        (tmp_path / "warmup" / f"{number:03}.txt").write_text(str(number))
    assert len(warm_up_samples(tmp_path)) == WARM_UP_MAX
    assert f"at most {WARM_UP_MAX} files" in caplog.text and "064.txt" in caplog.text
