"""What decides how large an archive may be: settings, the disk, the memory; and which archives are bombs anyway."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyserve.archive import archive as opening
from pyserve.archive import extract, room, weights
from pyserve.archive.archive import open_archive, survey
from pyserve.archive.limits import KEYS, LIMITS, Limits, configured_limits, use_limits
from pyserve.config.config import Config, read_config
from pyserve.config.keys import OWN_VARIABLES
from pyserve.errors import ConfigError, InvalidModelError, ModelLoadError
from tests.support.archive_files import good_files, tar_bytes, write_plain_mar

MIB = 1 << 20
VARIABLES = [OWN_VARIABLES[key] for key in KEYS.values()]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what `use_limits` sets is undone


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache folder, in which nothing unpacked may be left when the test is over."""
    folder = tmp_path / "cache"
    yield folder
    assert not [each for each in folder.glob("archives/*") if not (each / "contents.json").exists()]


def refusal(path: Path, cache: Path, limits: Limits | None = None) -> str:
    with pytest.raises(InvalidModelError) as caught:
        open_archive(path, cache_dir=cache, limits=limits)
    assert not list(cache.glob("archives/*"))
    return caught.value.message


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_files_count_alike_and_the_setting_is_named(
    tmp_path: Path, cache: Path, method: int
) -> None:
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "shard": b"x" * MIB}, method=method)
    said = refusal(path, cache, Limits(unpacked_size_max=MIB))
    assert "more than archive_unpacked_size_max=1048576" in said and "raise archive_unpacked_size_max" in said
    said = refusal(path, cache, Limits(entry_size_max=100_000))
    assert 'entry "shard" has 1048576 bytes, more than archive_entry_size_max=100000' in said
    assert "more than archive_entry_count_max=3" in refusal(path, cache, Limits(entry_count_max=3))


def test_nothing_but_the_disk_limits_what_is_unpacked_by_default(tmp_path: Path, cache: Path) -> None:
    assert LIMITS.unpacked_size_max is None and LIMITS.entry_size_max is None
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "zeros": bytes(128 * MIB)})
    assert path.stat().st_size < MIB  # 900 : 1, which is no bomb yet
    assert open_archive(path, cache_dir=cache).files["zeros"] == 128 * MIB


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_settings_reach_archives_through_the_environment(tmp_path: Path, cache: Path, kind: str) -> None:
    files = {**good_files(), "zeros": bytes(4 * MIB)}
    path = tmp_path / ("m.mar" if kind == "zip" else "m.tgz")
    if kind == "zip":
        write_plain_mar(path, files)
    else:
        path.write_bytes(gzip.compress(tar_bytes(files), mtime=0))
    settings = {"archive_ratio_free_size": ("1000000", "a flag"), "archive_ratio_max": ("20", "a flag")}
    use_limits(read_config(settings, environ={}))
    assert configured_limits() == Limits(ratio_free_size=1_000_000, ratio_max=20)
    said = refusal(path, cache)
    assert "more than 20 times as many (archive_ratio_max)" in said and "raise archive_ratio_max" in said
    with pytest.raises(InvalidModelError, match="archive_ratio_max"), survey(path):
        pass
    use_limits(read_config({"archive_ratio_max": ("1200", "a flag")}, environ={}))
    open_archive(path, cache_dir=cache).close()


def test_default_settings_are_the_default_limits() -> None:
    use_limits(Config())
    assert configured_limits() == LIMITS
    for field, key in KEYS.items():
        assert getattr(Config(), key) == getattr(LIMITS, field)


def test_unreadable_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\$PYSERVE_ARCHIVE_RATIO_MAX: allowed: a whole number from 1"):
        configured_limits({"PYSERVE_ARCHIVE_RATIO_MAX": "many"})


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archive_that_the_disk_has_no_room_for_is_refused_before_writing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    files = {**good_files(), "shard": bytes(MIB)}
    path = tmp_path / "m"
    if kind == "zip":
        write_plain_mar(path, files)
    else:
        path.write_bytes(gzip.compress(tar_bytes(files), mtime=0))
    monkeypatch.setattr(opening, "room_in", lambda folder: 1000)
    with pytest.raises(ModelLoadError, match=r"m: unpacks to \d+ bytes or more, .* room for 1000 .*PYSERVE_CACHE"):
        open_archive(path, cache_dir=cache)
    with survey(path):  # whoever packs or looks unpacks nothing
        pass


def test_writing_stops_before_the_disk_is_full(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "zeros": bytes(8 * MIB)})
    asked = []
    monkeypatch.setattr(extract, "_ROOM_INTERVAL_SIZE", MIB)
    monkeypatch.setattr(extract, "room_in", lambda folder: asked.append(folder) or (0 if len(asked) == 3 else MIB))
    with pytest.raises(ModelLoadError, match=r"unpacks to 3\d+ bytes or more"):
        open_archive(path, cache_dir=cache)
    assert len(asked) == 3


def test_weights_that_inflate_beyond_the_memory_are_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "inner"
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(2 * MIB))
    path = write_plain_mar(tmp_path / "m.mar", {**good_files(), "w.bin": inner.read_bytes()})
    open_archive(path, cache_dir=cache).close()
    monkeypatch.setattr(weights, "memory_size", lambda: MIB)
    with pytest.raises(InvalidModelError, match="inflates to 2097152 bytes when loaded, and there are 1048576 of"):
        open_archive(path, cache_dir=cache.parent / "other").check_complete()


def overlapping_zip(count: int) -> bytes:
    """Every entry's bytes are the headers and bytes of those behind it, quoted in stored blocks of deflate."""
    kernel = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = kernel.compress(bytes(MIB)) + kernel.flush()
    size, crc, parts, directory = MIB, zlib.crc32(bytes(MIB)), [], []
    tail = b""
    for index in reversed(range(count)):
        name = b"%05d" % index
        if tail:
            quoted = tail[: 30 + len(name)]  # the next entry's header, as a stored block
            body = struct.pack("<BHH", 0, len(quoted), len(quoted) ^ 0xFFFF)
            size += len(quoted)
            crc = 0
        header = struct.pack("<4s5HL2L2H", b"PK\3\4", 20, 0, 8, 0, 33, crc, len(body) + len(tail), size, len(name), 0)
        tail = header + name + body + tail
        parts.append((name, len(tail), crc, size))
    total = len(tail)
    for name, left, crc, size in reversed(parts):
        packed = left - 30 - len(name)
        directory.append(
            struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 8, 0, 33, crc, packed, size, len(name),
                        0, 0, 0, 0, 0, total - left) + name
        )  # fmt: skip
    listing = b"".join(directory)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listing), total, 0)
    return tail + listing + end


def test_zip_whose_entries_share_bytes_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.mar"
    path.write_bytes(overlapping_zip(50))
    with zipfile.ZipFile(path) as file:
        assert len(file.infolist()) == 50  # other readers take it
    assert "overlap" in refusal(path, cache, Limits(ratio_free_size=1 << 50))


def test_zips_within_a_zip_are_not_unpacked(tmp_path: Path, cache: Path) -> None:
    inner = zlib.compress(bytes(MIB))
    for _ in range(6):
        nested = tmp_path / "nested.zip"
        with zipfile.ZipFile(nested, "w", zipfile.ZIP_DEFLATED) as file:
            for index in range(16):
                file.writestr(f"lib {index}.zip", inner)
        inner = nested.read_bytes()
    archive = open_archive(write_plain_mar(tmp_path / "m.mar", {**good_files(), "42.zip": inner}), cache_dir=cache)
    assert (archive.model_dir / "42.zip").read_bytes() == inner


def test_large_directory_is_allowed_where_many_entries_are() -> None:
    assert Limits().directory_size_max == 64 * MIB
    assert Limits(entry_count_max=10_000_000).directory_size_max > 2 << 30


# ---- the disk and the memory


def machine(folder: Path, *, kind: str = "ext4", memory: str = "", usage: str = "", stat: str = "") -> Path:
    """``/proc`` and ``/sys`` of a machine with 16 GiB, half of them free, and of its control group."""
    device = os.stat(folder).st_dev
    mounted = f"{os.major(device)}:{os.minor(device)} / /tmp rw shared:1 - {kind} b rw"
    group = folder / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(
        f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nSwapTotal: {2 << 20} kB\n"
    )
    (folder / "proc/self/cgroup").write_text("0::/\n")
    (folder / "proc/self/mountinfo").write_text(f"1 0 7:7 / / rw - xfs a rw\n2 1 {mounted}\n")
    for name, text in (("memory.max", memory), ("memory.current", usage), ("memory.stat", stat)):
        if text:
            (group / name).write_text(text)
    return folder


def disk(monkeypatch: pytest.MonkeyPatch, total: int, free: int) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(total=total, free=free))


@pytest.mark.parametrize(
    ("total", "free", "left"),
    [
        (1 << 40, 100 << 30, 99 << 30),
        (10 << 30, 5 << 30, (5 << 30) - (10 << 30) // 20),
        (1 << 40, 1 << 30, 0),
        (1, 0, 0),
    ],
)
def test_a_part_of_the_disk_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, left: int
) -> None:
    disk(monkeypatch, total, free)
    assert room.room_in(tmp_path) == left


def test_disk_in_memory_has_no_more_room_than_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(monkeypatch, 1 << 40, 1 << 40)
    (tmp_path / "a").mkdir()
    assert room.room_in(tmp_path, root=machine(tmp_path / "a")) == (1 << 40) - (1 << 30)
    (tmp_path / "b").mkdir()
    assert room.room_in(tmp_path, root=machine(tmp_path / "b", kind="tmpfs")) == 8 << 30
    (tmp_path / "c").mkdir()
    used = machine(
        tmp_path / "c", kind="tmpfs", memory=f"{4 << 30}", usage=f"{3 << 30}", stat=f"anon 5\ninactive_file {1 << 30}\n"
    )
    assert room.room_in(tmp_path, root=used) == 2 << 30


def test_memory_is_what_the_machine_has_or_the_group_may_use(tmp_path: Path) -> None:
    for name, limit, expected in (("a", "", 18 << 30), ("b", "max", 18 << 30), ("c", f"{4 << 30}", 4 << 30)):
        (tmp_path / name).mkdir()
        assert room.memory_size(root=machine(tmp_path / name, memory=limit, usage="5")) == expected
    assert room.memory_size(root=tmp_path / "nothing") is None
