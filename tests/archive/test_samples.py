"""What an archive brings along to be sent to its model."""

from __future__ import annotations

from pathlib import Path

from pyserve.archive.samples import SAMPLE_SIZE_MAX, SAMPLES_MAX, Sample, archive_samples


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
