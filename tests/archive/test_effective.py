"""Archives as people and other systems write them: what is odd in their entries, and what becomes of it."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from pyserve.archive.archive import Archive, open_archive, survey
from pyserve.archive.effective import effective_entries
from pyserve.archive.entries import Entry, Limits, link_target, normal_name
from pyserve.errors import InvalidModelError
from tests.support.archive_files import (
    HANDLER,
    WEIGHTS,
    Member,
    good_files,
    tar_bytes,
    write_folder,
    write_mar,
    write_plain_mar,
)

LINK = 0o120777


def opened(path: Path, tmp_path: Path) -> Archive:
    return open_archive(path, cache_dir=tmp_path / "cache")


def files_of(path: Path, tmp_path: Path) -> dict[str, bytes]:
    """What a handler finds: no links, each file by its name."""
    with opened(path, tmp_path) as archive:
        folder = archive.own_folder(with_weights=True)
        found = {}
        for each in folder.rglob("*"):
            assert not each.is_symlink()
            if each.is_file():
                found[each.relative_to(folder).as_posix()] = each.read_bytes()
        assert found.keys() == archive.files.keys()
        return found


def write_tar(path: Path, *headers: tarfile.TarInfo, files: dict[str, bytes] | None = None) -> Path:
    path.write_bytes(gzip.compress(tar_bytes(files or good_files(), *headers), mtime=0))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    header = tarfile.TarInfo(f"m/{name}")
    header.type, header.linkname = kind, target
    return header


# ---- names


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a/b", "a/b"),
        ("./a", "a"),
        ("a//b/./c", "a/b/c"),
        ("d\\x.txt", "d/x.txt"),
        ("d\\", "d/"),
        ("d/", "d/"),
        ("./", ""),
        ("..\\x", "../x"),
        ("/a", "/a"),
        ("\\a", "/a"),
    ],
)
def test_normal_name(written: str, name: str) -> None:
    assert normal_name(written) == name


def test_names_that_other_systems_write_are_taken(tmp_path: Path) -> None:
    names = [
        "A.txt",
        "a.txt",
        "B/x",
        "b/x",
        "e\u0301.txt",
        "\u00e9.txt",
        "a \u200d\U0001f468.txt",
        " b. ",
        "C:x",
        "..a",
    ]
    more = [Member(name.encode(), b"1", flags=2048) for name in names]
    odd = [Member(b"d\\e.txt", b"2"), Member(b"./f.txt", b"3"), Member(b"g//h.txt", b"4"), Member(b"i\\", mode=0o40755)]
    found = files_of(write_mar(tmp_path / "m.mar", *more, *odd, Member(b"./", mode=0o40755)), tmp_path)
    assert {name: found[name] for name in names} == dict.fromkeys(names, b"1")
    assert (found["d/e.txt"], found["f.txt"], found["g/h.txt"]) == (b"2", b"3", b"4")


def test_name_in_utf8_without_its_flag_is_utf8_and_else_code_page_437(tmp_path: Path) -> None:
    path = write_mar(tmp_path / "m.mar", Member("données.txt".encode(), b"1"), Member(b"\x82.txt", b"2"))
    found = files_of(path, tmp_path)
    assert (found["données.txt"], found["é.txt"]) == (b"1", b"2")


@pytest.mark.parametrize("mode", [0, 0o100000, 0o104755, 0o102755, 0o100444])
def test_modes_are_of_no_matter(tmp_path: Path, mode: int) -> None:
    path = write_mar(tmp_path / "m.mar", Member(b"e", b"x", mode=mode))
    with opened(path, tmp_path) as archive:
        assert stat.S_IMODE((archive.model_dir / "e").stat().st_mode) & 0o7111 == 0
    header = tarfile.TarInfo("m/e")
    header.mode = mode & 0o7777
    assert "e" in files_of(write_tar(tmp_path / "m.tgz", header), tmp_path)


def test_what_macs_add_is_carried_along(tmp_path: Path) -> None:
    more = {"__MACOSX/MAR-INF/._MANIFEST.json": b"x", ".DS_Store": b"y"}
    assert files_of(write_plain_mar(tmp_path / "m.mar", {**good_files(), **more}), tmp_path)[".DS_Store"] == b"y"


# ---- entries given twice


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_two_entries_the_last_counts_in_a_zip(
    tmp_path: Path, method: int, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "e": b"first", "d/": b""}, method=method)
    with zipfile.ZipFile(path, "a", method) as archive:  # as one updates an archive in Python
        archive.writestr("e", b"second, longer")
        archive.writestr("w.bin", WEIGHTS + b"!")
        archive.writestr("d/", b"")
    found = files_of(path, tmp_path)
    assert (found["e"], found["w.bin"]) == (b"second, longer", WEIGHTS + b"!")
    assert sum("is there twice; the last one counts" in text for text in caplog.messages) == 2
    with survey(path) as listed:
        assert len(listed.oddities) == 2 and listed.warnings[:2] == list(listed.oddities)


@pytest.mark.parametrize("sizes", [(5, 5), (5, 9)])
def test_of_two_entries_the_last_counts_in_a_tar(tmp_path: Path, sizes: tuple[int, int]) -> None:
    first = tar_bytes({**good_files(), "e": b"1" * sizes[0], "z": b"z"})
    second = tar_bytes({"e": b"2" * sizes[1]})
    (tmp_path / "m.tar").write_bytes(first[: first.rfind(b"z" + b"\0" * 511) + 512] + second)
    found = files_of(tmp_path / "m.tar", tmp_path)
    assert (found["e"], found["z"]) == (b"2" * sizes[1], b"z")


def test_twins_whose_order_two_readers_see_differently_are_refused(tmp_path: Path) -> None:
    entries = [Entry("e", 1, 1, is_stored=True, offset=90), Entry("e", 1, 1, is_stored=True, offset=30)]
    with pytest.raises(InvalidModelError, match=r'entry "e" is there twice'):
        effective_entries("m.mar", entries)


# ---- links


def test_link_to_the_whole_archive_is_refused() -> None:
    for name, written in (("d/a", ".."), ("a", "."), ("a", "")):
        with pytest.raises(InvalidModelError, match="a link to the whole archive"):
            link_target("m", name, written)


@pytest.mark.parametrize(
    ("name", "written", "target"),
    [("a", "b", "b"), ("d/a", "b", "d/b"), ("d/a", "../b", "b"), ("d/e/a", ".././x//y", "d/x/y")],
)
def test_link_target(name: str, written: str, target: str) -> None:
    assert link_target("m", name, written) == target


@pytest.mark.parametrize(
    ("name", "written"), [("a", "../b"), ("d/a", "../../b"), ("a", "/etc/passwd"), ("d/a", "x/../../../b"), ("a", "/")]
)
@pytest.mark.parametrize("is_hard", [False, True])
def test_link_that_leaves_the_archive_is_refused(name: str, written: str, is_hard: bool) -> None:
    with pytest.raises(InvalidModelError, match="is a link that leaves the archive; pack the file itself"):
        link_target("m", name, written, is_hard=is_hard)


def test_links_of_a_tar_become_files(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "m.tgz",
        link("a.py", "handler.py"),
        link("b.py", "a.py"),
        link("c.py", "m/handler.py", tarfile.LNKTYPE),
        link("d/e.py", "../handler.py"),
        link("f", "d"),
        link("nothing", "absent"),
        files={**good_files(), "d/x": b"x"},
    )
    with pytest.raises(InvalidModelError, match=r'"m/f" is a link to a folder with further links'):
        files_of(path, tmp_path)
    path = write_tar(
        tmp_path / "n.tgz",
        link("a.py", "b.py"),
        link("b.py", "handler.py"),
        link("c.py", "m/handler.py", tarfile.LNKTYPE),
        link("f/e.py", "../handler.py"),
        link("g", "d"),
        link("nothing", "absent"),
        files={**good_files(), "d/x": b"x", "d/y/z": b"z"},
    )
    found = files_of(path, tmp_path)
    assert [found[name] for name in ("a.py", "b.py", "c.py", "f/e.py")] == [HANDLER] * 4
    assert (found["g/x"], found["g/y/z"]) == (b"x", b"z")
    assert "nothing" not in found
    with survey(path) as listed:
        assert len(listed.oddities) == 1 and "nothing" in listed.oddities[0]


@pytest.mark.parametrize("method", [0, 8])
def test_links_of_a_zip_become_files(tmp_path: Path, method: int) -> None:
    path = write_mar(
        tmp_path / "m.mar",
        Member(b"a.py", b"handler.py", mode=LINK, method=method),
        Member(b"latest.bin", b"./w.bin", mode=LINK, method=method),
        Member(b"d/x", b"x"),
        Member(b"e", b"d", mode=LINK),
    )
    found = files_of(path, tmp_path)
    assert (found["a.py"], found["latest.bin"], found["e/x"]) == (HANDLER, WEIGHTS, b"x")


def test_weights_that_are_a_link_are_the_bytes_that_it_leads_to(tmp_path: Path) -> None:
    path = write_mar(tmp_path / "m.mar", Member(b"latest", b"w.bin", mode=LINK), serializedFile="latest")
    with opened(path, tmp_path) as archive:
        assert archive.weights is not None and archive.weights.is_mapped
        with archive.weights.open() as window:
            assert window.read() == WEIGHTS
        assert (archive.model_dir / "w.bin").read_bytes() == WEIGHTS
    tar = write_tar(tmp_path / "m.tgz", link("latest", "w.bin"),
                    files=good_files(serializedFile="latest"))  # fmt: skip
    with opened(tar, tmp_path) as archive:
        assert archive.weights is not None
        with archive.weights.open() as window:
            assert window.read() == WEIGHTS


def test_manifest_that_is_a_link_is_read(tmp_path: Path) -> None:
    files = good_files()
    files["real.json"] = files.pop("MAR-INF/MANIFEST.json")
    with opened(write_tar(tmp_path / "m.tgz", link("MAR-INF/MANIFEST.json", "../real.json"), files=files),
                tmp_path) as archive:  # fmt: skip
        assert archive.manifest.model_name == "m"


@pytest.mark.parametrize(
    ("links", "reason"),
    [
        ([("a", "b"), ("b", "a")], "leads through more than 16 links"),
        ([("a", "a")], "leads through more than 16 links"),
        ([("d/e/a", "..")], "a link to a folder that it lies in"),
        ([("d/a", ".")], "a link to a folder that it lies in"),
        ([("a", "d"), ("a/b", "../x")], "both a file and a folder"),
        ([("handler.py/x", "w.bin")], "both a file and a folder"),
    ],
)
def test_links_in_circles_and_through_each_other_are_refused(
    tmp_path: Path, links: list[tuple[str, str]], reason: str
) -> None:  # fmt: skip
    entries = [Entry("handler.py", 1, 1), Entry("w.bin", 1, 1), Entry("d/x", 1, 1)]
    entries += [Entry(name, 0, 0, link=link_target("m", name, target)) for name, target in links]
    with pytest.raises(InvalidModelError, match=reason):
        effective_entries("m", entries)
    path = write_tar(tmp_path / "m.tgz", *[link(name, target) for name, target in links],
                     files={**good_files(), "d/x": b"x"})  # fmt: skip
    with pytest.raises(InvalidModelError):
        opened(path, tmp_path)
    assert not list((tmp_path / "cache").glob("archives/*"))


def test_folder_links_that_multiply_are_refused(tmp_path: Path) -> None:
    limits = Limits(entry_count_max=1000)
    entries = [Entry(f"d/{index}", 1, 1) for index in range(400)]
    entries += [Entry(f"l{index}", 0, 0, link="d") for index in range(400)]
    with pytest.raises(InvalidModelError, match="entries, more than"):
        effective_entries("m", entries, limits)


def test_what_links_lead_to_counts_as_unpacked(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "m.tgz", *[link(f"l{index}", "w.bin") for index in range(9)])
    size = sum(map(len, good_files().values()))
    with pytest.raises(InvalidModelError, match="unpacks to"):
        open_archive(path, cache_dir=tmp_path / "cache", limits=Limits(unpacked_size_max=size + 5 * len(WEIGHTS)))


def test_link_to_a_folder_within_a_folder_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {**good_files(), "d/x": b"x"})
    (folder / "e").symlink_to("d")
    with opened(folder, tmp_path) as archive:
        assert (archive.model_dir / "e/x").read_bytes() == b"x"
    os.symlink("/etc", folder / "f")
    with pytest.raises(InvalidModelError, match='"f" is a link that leaves the folder'):
        opened(folder, tmp_path)
