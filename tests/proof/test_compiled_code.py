"""Compiled code that is not whole is refused before anything maps it: the process would end there."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from pyserve import _http
from pyserve.errors import ModelLoadError
from pyserve.proof.compiled_code import check_library, check_package_code

LIBRARY = Path(_http.__file__).read_bytes()  # any will do
MEMBER = "m/data/aotinductor/model/a.wrapper.so"
# Of the header, the tables behind it, pages of code, and the list of sections at the end.
LENGTHS = [0, 1, 4, 20, 63, 64, 100, 4096, len(LIBRARY) // 2, len(LIBRARY) - 4096, len(LIBRARY) - 64, len(LIBRARY) - 1]


def packed(path: Path, code: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("m/version", "1")
        package.writestr(MEMBER, code)
    return path


def changed(offset: int, value: bytes) -> bytes:
    return LIBRARY[:offset] + value + LIBRARY[offset + len(value) :]


def test_whole_ones_pass(tmp_path: Path) -> None:
    path = tmp_path / "m.so"
    for code in (LIBRARY, LIBRARY + b"weights behind it"):
        path.write_bytes(code)
        check_library(path)
        check_package_code(packed(tmp_path / "m.pt2", code), "m.mar: m.pt2")
    with zipfile.ZipFile(tmp_path / "none.pt2", "w") as package:
        package.writestr("m/models/model.json", "{}")
    check_package_code(tmp_path / "none.pt2", "m.mar: none.pt2")


@pytest.mark.parametrize("length", LENGTHS)
def test_one_that_was_cut_short_is_named_with_what_to_do(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.so"
    path.write_bytes(LIBRARY[:length])
    with pytest.raises(ModelLoadError, match=rf"^m\.so is cut short: it has {length} bytes .*; copy the file again"):
        check_library(path)
    with pytest.raises(ModelLoadError, match=r"^m\.mar: m\.pt2: its compiled code \(a\.wrapper\.so\) is cut short: "):
        check_package_code(packed(tmp_path / "m.pt2", LIBRARY[:length]), "m.mar: m.pt2")


@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_one_whose_end_is_zeros_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.so"
    path.write_bytes(LIBRARY[:length] + bytes(len(LIBRARY) - length))
    with pytest.raises(ModelLoadError, match=r"^m\.so is (damaged|cut short): .*; copy the file again"):
        check_library(path)


SECTIONS_AT = struct.unpack_from("<Q", LIBRARY, 40)[0]


@pytest.mark.parametrize(
    "code",
    [
        b"no library" * 100,
        changed(4, b"\x01"),  # of 32 bits
        changed(16, b"\x01\x00"),  # not linked yet
        changed(32, struct.pack("<Q", 1 << 62)),  # segments far away
        changed(40, struct.pack("<Q", (1 << 64) - 1)),  # sections beyond all numbers
        changed(40, struct.pack("<Q", 64)),  # sections where there are none
        changed(54, struct.pack("<H", 1)),  # segments of another size
        changed(56, struct.pack("<H", 0)),  # no segments
        changed(58, struct.pack("<H", 1)),  # sections of another size
        changed(60, struct.pack("<H", 0)),  # a count that stands elsewhere, and does not
        changed(62, struct.pack("<H", 9999)),  # names where there are none
        changed(SECTIONS_AT, b"\x01" * 64),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path: Path, code: bytes) -> None:
    with pytest.raises(ModelLoadError, match=r"its compiled code \(a\.wrapper\.so\) is (damaged|cut short): "):
        check_package_code(packed(tmp_path / "m.pt2", code), "m")


@pytest.mark.parametrize("offset", range(64))
def test_any_byte_of_the_header_may_be_wrong(tmp_path: Path, offset: int) -> None:
    for value in (0, 1, 0x7F, 0xFF):
        path = tmp_path / "m.so"
        path.write_bytes(changed(offset, bytes([value])))
        try:
            check_library(path)
        except ModelLoadError as error:
            assert error.message.startswith("m.so is ")


def test_one_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"^m\.so cannot be read: No such file"):
        check_library(tmp_path / "m.so")
    (tmp_path / "m.pt2").write_bytes(b"no zip")
    with pytest.raises(ModelLoadError, match=r"^m: the package cannot be read: "):
        check_package_code(tmp_path / "m.pt2", "m")
