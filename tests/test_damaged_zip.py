"""torch's files are zip files: whatever is wrong with one, its own model fails, with a text, and no other."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.folder_manifest import _is_torchscript
from pyserve.archive.packing import ArchiverConfig, write_archive
from pyserve.conversion.record import is_exported
from pyserve.conversion.torchscript import needs_tracing
from pyserve.errors import ModelLoadError
from pyserve.proof.export_rules import read_exported
from pyserve.proof.package_machine import check_machine
from pyserve.proof.package_rules import is_compiled, read_program
from pyserve.server.opening import begin_tracing

NAME = "m/data/aotinductor/model/a.wrapper"
LISTED = b"PK\x01\x02"


def whole() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("m/models/model.json", "{}")
        file.writestr(f"{NAME}_metadata.json", json.dumps({"AOTI_DEVICE_KEY": "cpu"}))
        file.writestr(f"{NAME}.cpp", "int nothing;")
    return made.getvalue()


def changed(offset: int, value: bytes) -> bytes:
    """With other bytes at that place of each entry in the list of its files."""
    data = bytearray(whole())
    at = data.find(LISTED)
    while at >= 0:
        data[at + offset : at + offset + len(value)] = value
        at = data.find(LISTED, at + 4)
    return bytes(data)


DAMAGED = {
    "no bytes": b"",
    "a text": b"no zip file",
    "cut short": whole()[:-30],
    "a version of zip that is not known": changed(6, b"\xd3\x00"),
    "a method that is not known": changed(10, b"\x63\x00"),
    "encrypted": changed(8, b"\x01\x00"),
    "names that are no text": changed(8, b"\x00\x08").replace(b"m/m", b"\xff\xff\xff"),
    "a file elsewhere": changed(42, b"\xff\xff\x00\x00"),
    "other sizes": changed(20, b"\xff\xff\x00\x00\xff\xff\x00\x00"),
}


@pytest.fixture(params=DAMAGED, ids=str)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "m.pt2"
    path.write_bytes(DAMAGED[request.param])
    return path


def read_graph(path: Path) -> None:
    with path.open("rb") as file:
        read_exported(file, "m")


@pytest.mark.parametrize(
    "read",
    [is_compiled, lambda path: check_machine(path, "m"), lambda path: read_program(path, "m"), read_graph],
    ids=["is_compiled", "check_machine", "read_program", "read_exported"],
)
def test_whoever_reads_it_raises_an_error_of_the_model_or_nothing(
    damaged: Path, read: Callable[[Path], object]
) -> None:
    try:
        read(damaged)
    except ModelLoadError as error:
        assert error.message.startswith("m")
        assert error.message.count("cannot be read") <= 1


def packed(path: Path) -> Archive:
    archive = write_archive(ArchiverConfig(
        "m", "tensor", serialized_file=str(path), export_path=str(path.parent)
    ))  # fmt: skip
    return open_archive(str(archive))


def test_a_start_goes_on_with_the_other_models(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    with packed(damaged) as archive:
        assert not is_exported(archive)
        assert not needs_tracing(archive)
        assert begin_tracing({"m.mar": archive}) == {}
    _is_torchscript(damaged)


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(whole())
    assert is_compiled(path)
    check_machine(path, "m")
    with pytest.raises(ModelLoadError, match=r"^m: the package does not say what each of its inputs may be"):
        read_program(path, "m")


def test_what_is_missing_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other.txt", "")
    with pytest.raises(ModelLoadError, match=r"^m: the package does not hold the source"):
        read_program(path, "m")
    with pytest.raises(ModelLoadError, match=r"^m does not hold the graph of one exported program"):
        read_graph(path)
