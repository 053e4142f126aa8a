"""Hostile archives: each is refused with a reason, nothing is written outside, nothing half-done stays."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyserve.archive.archive import open_archive
from pyserve.archive.entries import Limits, SourceFile, name_problem
from pyserve.archive.tar_reader import TarReader
from pyserve.errors import InvalidModelError, ServeError
from tests.support.archive_files import (
    WEIGHTS,
    Member,
    deflate,
    good_files,
    good_members,
    manifest,
    tar_bytes,
    tree,
    write_mar,
    write_plain_mar,
    write_tgz,
    zip_bytes,
)


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Opens an archive, expects InvalidModelError, returns its text; afterwards nothing may have been left."""
    cache = tmp_path / "cache"
    before: set[str] = set()

    def check(path: Path, limits: Limits | None = None) -> str:
        before.update(tree(tmp_path))
        with pytest.raises(InvalidModelError) as caught:
            open_archive(path, cache_dir=cache, **({"limits": limits} if limits else {}))
        text = caught.value.message
        assert text.startswith(path.name)
        assert str(tmp_path) not in text
        assert text.isprintable()
        return text

    yield check
    left = {
        name
        for name in tree(tmp_path) - before
        if name not in {"cache", "cache/archives", "cache/locks", "cache/digests"}
        and not name.startswith(("cache/locks/", "cache/digests/"))
    }
    assert left == set()


BAD_NAMES = [
    b"../e",
    b"/abs",
    b"a/../../e",
    b"..\\w",
    b"C:\\x",
    b"C:/x",
    b"..",
    b"a/..",
    b"./../a",
    b"a\\..\\..\\e",
    b"a\0b",
    b"a\nb",
    b"\x7f",
    b"\x1b[2J",
    "a\u202eb".encode(),
    "a\u2066b".encode(),
    b"\\\\h\\s",
    b"x" * 256,
    b"a/" * 40 + b"b",
    b"y/" * 600 + b"z",
]

BAD_TAR_NAMES = [name.decode() for name in BAD_NAMES if b"\0" not in name]  # which a tar cannot hold


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_name_in_zip_is_refused(tmp_path: Path, refused: Callable[..., str], name: bytes) -> None:
    assert "entry" in refused(write_mar(tmp_path / "m.mar", Member(name, b"x", flags=2048)))


@pytest.mark.parametrize("name", BAD_TAR_NAMES, ids=ascii)
@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_bad_name_in_tar_is_refused(tmp_path: Path, refused: Callable[..., str], name: str, tar_format: int) -> None:
    refused(write_tgz(tmp_path / "m.tgz", tarfile.TarInfo(name), tar_format=tar_format))


def test_file_that_is_also_a_folder_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    members = [Member(name, b"x", flags=2048) for name in (b"d", b"d/e")]
    assert "entr" in refused(write_mar(tmp_path / "m.mar", *members))
    refused(write_tgz(tmp_path / "m.tgz", *[tarfile.TarInfo(f"m/{name}") for name in ("d", "d/e")]))


def test_file_that_is_also_a_folder_is_refused_in_either_order(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = write_mar(tmp_path / "m.mar", Member(b"d/e", b"x"), Member(b"d", b"x"))
    assert "both a file and a folder" in refused(path)


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (0o120777, "link that leaves the archive"),
        (0o010644, "device, pipe"),
        (0o020644, "device, pipe"),
        (0o060644, "device, pipe"),
        (0o140644, "device, pipe"),
        (0o040755, "both as a file"),
    ],
)
def test_special_file_in_zip_is_refused(tmp_path: Path, refused: Callable[..., str], mode: int, reason: str) -> None:
    assert reason in refused(write_mar(tmp_path / "m.mar", Member(b"e", b"/etc/passwd", mode=mode)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "link that leaves the archive"),
        (tarfile.LNKTYPE, "link that leaves the archive"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (b"Z", "unknown"),
    ],
)
def test_special_file_in_tar_is_refused(tmp_path: Path, refused: Callable[..., str], kind: bytes, reason: str) -> None:
    header = tarfile.TarInfo("m/e")
    header.type = kind
    header.linkname = "/etc/passwd"
    assert reason in refused(write_tgz(tmp_path / "m.tgz", header))


def test_link_with_content_in_tar_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    header = tarfile.TarInfo("m/e")
    header.type, header.linkname, header.size = tarfile.LNKTYPE, "m/w.bin", 512
    packed = bytearray(tar_bytes(good_files(), header))
    (tmp_path / "m.tgz").write_bytes(gzip.compress(bytes(packed)))
    assert "with content" in refused(tmp_path / "m.tgz")


def test_file_written_through_a_link_in_the_same_tar_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    link = tarfile.TarInfo("m/out")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
    refused(write_tgz(tmp_path / "m.tgz", link, tarfile.TarInfo("m/out/e")))


# ---- sizes, counts, ratios

# What is a bomb counts from 4 GiB by default, which takes too long to inflate in a test.
SMALL = Limits(ratio_free_size=64 << 20)


def test_deflated_bomb_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    bomb = bytes(200 << 20)
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "w.bin": bomb})
    assert path.stat().st_size < 1 << 20
    assert "more than 200 times" in refused(path, SMALL)


def test_bomb_of_many_small_entries_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    files = {f"f{index}": bytes(10 << 20) for index in range(8)}
    assert "more than 200 times" in refused(write_plain_mar(tmp_path / "m.mar", {**good_files(), **files}), SMALL)


def test_tar_bomb_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "m.tgz"
    path.write_bytes(gzip.compress(tar_bytes({**good_files(), "w.bin": bytes(100 << 20)}), mtime=0))
    assert "more than 200 times" in refused(path, SMALL)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_deflated_records_inside_the_weights_count_for_who_loads_them(tmp_path: Path, method: int) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(200 << 20))
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "w.bin": inner.getvalue()}, method=method)
    with (
        open_archive(path, cache_dir=tmp_path / "cache", limits=Limits(ratio_free_size=1 << 20)) as opened,
        pytest.raises(InvalidModelError, match="when loaded"),
    ):
        opened.check_complete()


def test_weights_that_are_a_damaged_zip_are_refused_to_who_loads_them(tmp_path: Path) -> None:
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "w.bin": b"PK\3\4" + WEIGHTS})
    with (
        open_archive(path, cache_dir=tmp_path / "cache") as archive,
        pytest.raises(InvalidModelError, match=r"m\.mar: w\.bin: is cut short"),
    ):
        archive.check_complete()


def test_declared_total_over_the_limit_is_refused_before_writing(tmp_path: Path, refused: Callable[..., str]) -> None:
    limits = Limits(unpacked_size_max=1000)
    path = write_mar(tmp_path / "m.mar", Member(b"big", bytes(2000)))
    assert "more than archive_unpacked_size_max=1000" in refused(path, limits)
    path = tmp_path / "m.tgz"
    path.write_bytes(gzip.compress(tar_bytes({**good_files(), "big": bytes(2000)})))
    assert "more than archive_unpacked_size_max=1000" in refused(path, limits)


def test_mapped_weights_do_not_count_as_unpacked(tmp_path: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    archive = open_archive(path, cache_dir=tmp_path / "cache", limits=Limits(unpacked_size_max=len(WEIGHTS) // 2))
    assert archive.weights is not None and archive.weights.is_mapped


def test_a_million_entries_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    count = 1_000_000
    name = b"x"
    central = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + name
    local = zip_bytes(*good_members())
    path = tmp_path / "m.mar"
    directory = central * count
    at = len(local) + len(directory)
    path.write_bytes(
        local
        + directory
        + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), len(local))
        + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )
    assert "1000000 entries" in refused(path)


def test_too_many_entries_in_a_tar_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = write_tgz(tmp_path / "m.tgz", *[tarfile.TarInfo(f"m/{index}") for index in range(20)])
    assert "more than archive_entry_count_max=10" in refused(path, Limits(entry_count_max=10))


def test_longest_name_a_zip_can_hold_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    text = refused(write_mar(tmp_path / "m.mar", Member(b"n" * 65_535, b"x")))
    assert "65535 bytes" in text and len(text) < 400


def test_huge_pax_record_is_refused_without_reading_it_into_memory(tmp_path: Path, refused: Callable[..., str]) -> None:
    header = tarfile.TarInfo("m/x")
    header.pax_headers = {"comment": "x" * (1 << 20)}
    assert "record of" in refused(write_tgz(tmp_path / "m.tgz", header))


# ---- damaged files and lies


def _zip_lies() -> dict[str, bytes]:
    good = good_members()
    whole = zip_bytes(*good)
    return {
        "zero bytes": b"",
        "not a zip": b"hello, this is no archive at all",
        "html": b"<html>404 not found</html>" * 40,
        "cut in the list": whole[:-40],
        "cut in the middle": whole[: len(whole) // 2],
        "no end record": whole[:-22],
        "only an end record": whole[-22:],
        "junk in front": zip_bytes(*good, junk=b"#!/bin/sh\n"),
        "junk in front, offsets moved": b"PK\3\4junk" + whole,
        "junk behind": zip_bytes(*good, tail=b"junk"),
        "bad end offset": zip_bytes(*good, directory_offset=5),
        "too large count": zip_bytes(*good, entry_count=9),
        "too small count": zip_bytes(*good, entry_count=2),
        "bad crc, stored": zip_bytes(*good, Member(b"e", b"xyz", crc=1)),
        "bad crc, deflated": zip_bytes(*good, Member(b"e", b"xyz", method=8, crc=1)),
        "bad crc, weights": zip_bytes(*good[:2], Member(b"w.bin", WEIGHTS, crc=1)),
        "encrypted": zip_bytes(*good, Member(b"e", b"xyz", flags=1)),
        "strongly encrypted": zip_bytes(*good, Member(b"e", b"xyz", flags=65)),
        "unknown method": zip_bytes(*good, Member(b"e", b"xyz", method=14)),
        "says smaller": zip_bytes(*good, Member(b"e", b"xyz" * 99, method=8, size=3)),
        "says larger": zip_bytes(*good, Member(b"e", b"xyz", method=8, size=99)),
        "stored sizes differ": zip_bytes(*good, Member(b"e", b"xyz", size=99)),
        "headers differ in size": zip_bytes(*good, Member(b"e", b"xyz", method=8, local_size=2)),
        "headers differ in name": zip_bytes(*good, Member(b"e", b"xyz", local_name=b"../e")),
        "headers differ in length of name": zip_bytes(*good, Member(b"e", b"xyz", local_name=b"e\0../e")),
        "reaches past the end": zip_bytes(*good, Member(b"e", b"xyz", packed_size=9999, size=9999)),
        "overlap": zip_bytes(*good, Member(b"e", b"xyz"), Member(b"e", b"xyz", offset=0)),
        "bytes after the deflated end": zip_bytes(*good, Member(b"e", b"xyz", method=8, packed=deflate(b"xyz") + b"j")),
        "deflate cut short": zip_bytes(*good, Member(b"e", b"xyz" * 50, method=8, packed=deflate(b"xyz" * 50)[:-2])),
        "not deflate": zip_bytes(*good, Member(b"e", b"xyz", method=8, packed=b"\xff\xff\xff\xff")),
        "zip64 size missing": zip_bytes(*good, Member(b"e", b"xyz", size=0xFFFFFFFF)),
        "folder with content": zip_bytes(*good, Member(b"e/", b"xyz", mode=0o040755)),
        "name not utf-8": zip_bytes(*good, Member(b"\xff\xfe", b"xyz", flags=2048)),
        "no members": zip_bytes(),
    }


@pytest.mark.parametrize("what", _zip_lies())
def test_damaged_or_lying_zip_is_refused(tmp_path: Path, refused: Callable[..., str], what: str) -> None:
    path = tmp_path / "m.mar"
    path.write_bytes(_zip_lies()[what])
    text = refused(path)
    assert len(text) > len("m.mar: ") + 20


def test_two_entries_on_the_same_bytes_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    good = good_members()
    start = len(zip_bytes(*good)) - 22 - sum(46 + len(member.name) for member in good)
    kernel = Member(b"e", b"x" * 100)
    # The second local header lies inside the first one's content.
    inner = struct.pack("<4s5HL2L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 1, 0) + b"f"
    kernel.content = inner.ljust(100, b"x")
    path = tmp_path / "m.mar"
    path.write_bytes(zip_bytes(*good, kernel, Member(b"f", b"", offset=start + 31)))
    assert "overlap" in refused(path)


def test_zip64_end_record_that_contradicts_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    whole = zip_bytes(*good_members())
    body, end = whole[:-22], whole[-22:]
    count, size, offset = struct.unpack("<HLL", end[10:20])
    for lie in (0, 1):
        path = tmp_path / f"m{lie}.mar"
        path.write_bytes(
            body
            + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset + lie)
            + struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1)
            + end
        )
        if lie:
            assert "contradicts" in refused(path)
        else:
            open_archive(path, cache_dir=tmp_path.parent / "elsewhere").close()


def test_damaged_tar_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    whole = gzip.compress(tar_bytes(good_files()), mtime=0)
    plain = tar_bytes(good_files())
    flipped = bytearray(plain)
    flipped[600] ^= 1
    flipped[2 * 1024 + 3] ^= 0x40
    wrong_crc = bytearray(whole)
    wrong_crc[-7] ^= 1
    cases = {
        "cut": whole[: len(whole) // 2],
        "cut at the end": whole[:-4],
        "crc": bytes(wrong_crc),
        "junk": whole + b"junk",
        "tail": gzip.compress(plain + b"\0" * 512 + b"junk"),
        "header": gzip.compress(bytes(flipped)),
        "cut inside": gzip.compress(plain[:1500]),
        "empty tar": gzip.compress(bytes(10240)),
        "gzip": gzip.compress(b""),
        "negative size": gzip.compress(_with_size(plain, b"\xff" * 12)),
        "bad digits": gzip.compress(_with_size(plain, b"9" * 11 + b"\0")),
        "huge size": gzip.compress(_with_size(plain, b"\x80" + b"\xff" * 11)),
    }
    for what, content in cases.items():
        path = tmp_path / f"{what.replace(' ', '-')}.tgz"
        path.write_bytes(content)
        refused(path)


def _with_size(tar: bytes, field: bytes) -> bytes:
    block = bytearray(tar[:512])
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + tar[512:]


def test_archive_of_two_models_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    files = {f"{name}/MAR-INF/MANIFEST.json": manifest() for name in ("a", "b")}
    assert "holds 2 models (a/, b/)" in refused(write_plain_mar(tmp_path / "m.mar", files))


@pytest.mark.parametrize(
    ("name", "ok"),
    [
        ("a", True),
        ("a/b.py", True),
        ("modèle.pt", True),
        ("模型/重み.pt", True),
        ("a b.txt", True),
        ("..a", True),
        ("a..b/c", True),
        (".hidden", True),
        ("a:b", True),
        ("C:x", True),
        ("C:/x", False),
        ("e\u0301.txt", True),
        ("a\u200d.txt", True),
        ("a\u202eb", False),
        ("ab:c", True),
        ("a\ud800", False),
        ("x" * 255, True),
    ],
)
def test_names_of_many_kinds(name: str, ok: bool) -> None:
    assert (name_problem(name) is None) is ok


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_reader_lists_what_tarfile_wrote(tmp_path: Path, tar_format: int) -> None:
    names = ["a", "b/c", "d/" * 12 + "e", "f" * 99, "g" * 90 + "/" + "h" * 60]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["i" * 200, "j" * 120 + "/" + "k" * 130, "ü.txt"]
    files = {name: os.urandom(index * 700) for index, name in enumerate(names)}
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes(files, prefix="", tar_format=tar_format))
    with path.open("rb") as file:
        reader = TarReader(SourceFile(file.fileno(), "t.tar", path.stat().st_size), is_gzip=False)
        assert [entry.name for entry in reader.entries] == names
        assert {entry.name: b"".join(chunks) for entry, chunks in reader.contents(reader.entries)} == files


# ---- chance


@pytest.mark.parametrize("kind", ["zip", "tgz"])
def test_randomly_damaged_archive_opens_or_is_refused(tmp_path: Path, kind: str) -> None:
    seed = int(os.environ.get("PYSERVE_TEST_SEED") or random.randrange(1 << 32))
    print(f"PYSERVE_TEST_SEED={seed}")
    chance = random.Random(seed)
    cache = tmp_path / "cache"
    path = tmp_path / ("m.mar" if kind == "zip" else "m.tgz")
    if kind == "zip":
        write_mar(path, Member(b"model-config.yaml", b"batchSize: 4\n", method=8), configFile="model-config.yaml")
    else:
        write_tgz(path)
    good = path.read_bytes()
    outside = tree(tmp_path) | {"cache"}
    opened = 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(chance.choice((1, 1, 1, 2, 8))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        elif chance.random() < 0.1:
            at = chance.randrange(len(damaged))
            damaged[at:at] = chance.randbytes(chance.randrange(1, 40))
        path.write_bytes(damaged)
        try:
            with open_archive(path, cache_dir=cache) as archive:
                opened += 1
                assert archive.weights is not None
                with archive.weights.open() as window:
                    window.read()
        except InvalidModelError:
            pass
    assert opened < 300
    assert {name for name in tree(tmp_path) if not name.startswith("cache/")} == outside
    for folder in (cache / "archives").iterdir():
        assert (folder / "contents.json").is_file() and not folder.name.startswith(".")


def test_manifest_of_every_random_text_is_refused_cleanly(tmp_path: Path) -> None:
    seed = int(os.environ.get("PYSERVE_TEST_SEED") or random.randrange(1 << 32))
    print(f"PYSERVE_TEST_SEED={seed}")
    chance = random.Random(seed)
    text = manifest()
    for _ in range(50):
        damaged = bytearray(text)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        files = {**good_files(), "MAR-INF/MANIFEST.json": bytes(damaged)}
        try:
            open_archive(write_plain_mar(tmp_path / "m.mar", files), cache_dir=tmp_path / "cache").close()
        except ServeError as error:
            assert isinstance(error, InvalidModelError)
