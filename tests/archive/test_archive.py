"""Opening archives of every format: what is mapped, what is cached, and what a manifest may say."""

from __future__ import annotations

import gzip
import json
import mmap
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pyserve.archive import cache as archive_cache
from pyserve.archive.archive import Archive, Weights, open_archive, survey
from pyserve.archive.entries import SourceFile
from pyserve.archive.manifest import (
    Manifest,
    check_model_name,
    check_model_version,
    handler_file,
    name_of_file,
    split_handler,
)
from pyserve.errors import InvalidModelError, ModelLoadError, ModelNotFoundError
from tests.support.archive_files import (
    HANDLER,
    WEIGHTS,
    Member,
    good_files,
    manifest,
    tar_bytes,
    tree,
    write_folder,
    write_mar,
    write_plain_mar,
    write_tgz,
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def weights_of(archive: Archive) -> bytes:
    assert archive.weights is not None
    with archive.weights.open() as window:
        return window.read()


# ---- formats


def test_stored_weights_are_mapped_and_not_unpacked(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar", Member(b"index_to_name.json", b"{}", method=8))
    archive = open_archive(path, cache_dir=cache)
    assert (archive.path, archive.name) == (path, "m.mar")
    assert archive.weights is not None
    assert (archive.weights.path, archive.weights.name, archive.weights.suffix) == (path, "w.bin", ".bin")
    assert path.read_bytes()[archive.weights.offset :][: archive.weights.size] == WEIGHTS == weights_of(archive)
    assert tree(archive.model_dir) == {"MAR-INF", "MAR-INF/MANIFEST.json", "handler.py", "index_to_name.json"}
    assert archive.files["w.bin"] == len(WEIGHTS)
    assert not any(file.name == "w.bin" for file in cache.rglob("*"))


def test_deflated_weights_are_unpacked_once(tmp_path: Path, cache: Path) -> None:
    archive = open_archive(write_plain_mar(tmp_path / "m.mar", good_files()), cache_dir=cache)
    assert archive.weights is not None and not archive.weights.is_mapped
    assert archive.weights.path == archive.model_dir / "w.bin" == archive.weights.as_file()
    assert weights_of(archive) == WEIGHTS


@pytest.mark.parametrize("prefix", ["", "m/", "./", "./m/"])
def test_tgz_opens_with_and_without_a_top_folder(tmp_path: Path, cache: Path, prefix: str) -> None:
    archive = open_archive(write_tgz(tmp_path / "m.tar.gz", prefix=prefix), cache_dir=cache)
    assert (archive.model_dir / "handler.py").read_bytes() == HANDLER
    assert archive.files.keys() == good_files().keys()
    assert weights_of(archive) == WEIGHTS


def test_plain_tar_opens(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "m.tar"
    path.write_bytes(tar_bytes(good_files()))
    assert weights_of(open_archive(path, cache_dir=cache)) == WEIGHTS


@pytest.mark.parametrize("below", ["", "inner"])
def test_folder_is_used_where_it_lies(tmp_path: Path, cache: Path, below: str) -> None:
    folder = write_folder(tmp_path / "model" / below, good_files())
    archive = open_archive(tmp_path / "model", cache_dir=cache)
    assert archive.model_dir == folder.resolve()
    assert archive.weights is not None
    assert (archive.weights.path, archive.weights.offset) == (folder.resolve() / "w.bin", 0)
    assert weights_of(archive) == WEIGHTS
    assert tree(cache) == {"archives", "digests", "locks"}


def test_folder_key_changes_with_a_file(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "model", good_files())
    first = open_archive(folder, cache_dir=cache).sha256
    assert open_archive(folder, cache_dir=cache).sha256 == first
    (folder / "handler.py").write_bytes(HANDLER + b"#")
    assert open_archive(folder, cache_dir=cache).sha256 != first


def test_folder_with_a_link_that_leaves_it_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "model", good_files(serializedFile="passwd"))
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(InvalidModelError, match="link that leaves the folder"):
        open_archive(folder, cache_dir=cache)


def test_folder_with_a_link_inside_it_opens(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "model", good_files(serializedFile="latest.bin"))
    (folder / "latest.bin").symlink_to("w.bin")
    assert weights_of(open_archive(folder, cache_dir=cache)) == WEIGHTS


def test_folder_without_manifest_opens_and_says_how_to_make_one(tmp_path: Path, cache: Path) -> None:
    folder = write_folder(tmp_path / "model", {"handler.py": HANDLER, "model-config.yaml": b"batchSize: 4\n"})
    archive = open_archive(folder, cache_dir=cache)
    assert archive.manifest == Manifest(warnings=archive.manifest.warnings)
    assert (archive.manifest.raw, archive.config.has_file) == (None, False)
    assert "pyserve archive --model-name" in archive.warnings[0]


def test_missing_archive_is_not_found(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"^Model not found at: no\.mar$"):
        open_archive(tmp_path / "no.mar", cache_dir=cache)


def test_pipe_in_place_of_an_archive_is_refused_and_does_not_block(tmp_path: Path, cache: Path) -> None:
    os.mkfifo(tmp_path / "m.mar")
    with pytest.raises(InvalidModelError, match="not a regular file"):
        open_archive(tmp_path / "m.mar", cache_dir=cache)


def test_archive_without_weights_has_none(tmp_path: Path, cache: Path) -> None:
    assert open_archive(write_mar(tmp_path / "m.mar", serializedFile=None), cache_dir=cache).weights is None


def test_zip64_and_data_descriptors_are_read(tmp_path: Path, cache: Path) -> None:
    class Unseekable:
        def __init__(self, file: Any):
            self.write, self.flush = file.write, file.flush

    path = tmp_path / "m.mar"
    with path.open("wb") as file, zipfile.ZipFile(Unseekable(file), "w") as archive:  # type: ignore[arg-type]
        for name, content in good_files().items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    assert weights_of(open_archive(path, cache_dir=cache)) == WEIGHTS


def test_torch_loads_from_the_mapped_window(tmp_path: Path, cache: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.jit.script(torch.nn.Linear(5, 3).eval())
    model.save(str(tmp_path / "w.pt"))
    files = {**good_files(serializedFile="w.pt"), "w.pt": (tmp_path / "w.pt").read_bytes()}
    archive = open_archive(write_plain_mar(tmp_path / "m.mar", files, method=zipfile.ZIP_STORED), cache_dir=cache)
    assert archive.weights is not None and archive.weights.is_mapped
    with archive.weights.open() as window:
        loaded = torch.jit.load(window)
    item = torch.ones(2, 5)
    assert torch.equal(loaded(item), model(item))
    assert torch.equal(torch.jit.load(str(archive.weights.as_file()))(item), model(item))


# ---- the window


def test_window_reads_seeks_and_gives_its_buffer(tmp_path: Path) -> None:
    content = os.urandom(3 * mmap.ALLOCATIONGRANULARITY)
    (tmp_path / "f").write_bytes(content)
    start, size = mmap.ALLOCATIONGRANULARITY + 77, 5000
    expected = content[start : start + size]
    with Weights("f", tmp_path / "f", start, size).open() as window:
        assert window.seekable() and window.readable() and not window.writable()
        assert window.read(10) == expected[:10]
        assert window.tell() == 10
        assert window.seek(-5, os.SEEK_END) == size - 5
        assert window.read() == expected[-5:]
        assert window.read(1) == b""
        assert window.seek(2) == 2 and window.seek(3, os.SEEK_CUR) == 5
        buffer = bytearray(7)
        assert window.readinto(buffer) == 7  # type: ignore[attr-defined]
        assert buffer == expected[5:12]
        window.seek(size + 9)
        assert window.read(4) == b""
        with pytest.raises(ValueError, match="before the beginning"):
            window.seek(-1)
        view = window.getbuffer()  # type: ignore[attr-defined]
    assert bytes(view) == expected
    assert view.readonly


def test_as_file_completes_the_model_folder(tmp_path: Path, cache: Path) -> None:
    archive = open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache)
    assert archive.weights is not None
    file = archive.weights.as_file()
    assert file == archive.model_dir / "w.bin" == archive.weights.as_file()
    assert file.read_bytes() == WEIGHTS
    assert tree(archive.model_dir) == {"MAR-INF", "MAR-INF/MANIFEST.json", "handler.py", "w.bin"}
    again = open_archive(archive.path, cache_dir=cache)
    assert again.weights is not None and again.weights.is_mapped


def test_weights_travel_to_another_process_and_notice_a_replaced_file(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    archive = open_archive(path, cache_dir=cache)
    there = pickle.loads(pickle.dumps(archive.weights))
    with there.open() as window:
        assert window.read() == WEIGHTS
    (tmp_path / "other.mar").write_bytes(path.read_bytes())
    os.replace(tmp_path / "other.mar", path)
    with pytest.raises(InvalidModelError, match="was replaced"):
        there.open()
    assert weights_of(archive) == WEIGHTS


# ---- the cache


def test_second_open_uses_what_is_unpacked(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    first = open_archive(path, cache_dir=cache)
    inode = (first.model_dir / "handler.py").stat().st_ino
    shutil.copy(path, tmp_path / "copy.mar")
    second = open_archive(tmp_path / "copy.mar", cache_dir=cache)
    assert (second.sha256, second.model_dir) == (first.sha256, first.model_dir)
    assert (second.model_dir / "handler.py").stat().st_ino == inode


def test_key_is_the_sha256_of_the_file(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    printed = subprocess.run(["sha256sum", str(path)], check=True, capture_output=True, text=True).stdout
    assert open_archive(path, cache_dir=cache).sha256 == printed.split()[0]


def test_digest_is_remembered_for_an_old_file_and_forgotten_when_it_changes(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    archive = open_archive(path, cache_dir=cache)
    assert not list((cache / "digests").iterdir())  # just written: its times cannot yet prove anything
    status = path.stat()
    note = cache / "digests" / f"{status.st_dev}-{status.st_ino}"
    known = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    note.write_text(json.dumps({**known, "sha256": "remembered"}))
    with path.open("rb") as file:
        source = SourceFile(file.fileno(), path.name, status.st_size)
        store = archive_cache.open_cache(cache)
        assert store.digest(source) == "remembered"
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # moves the change time only
        note.write_text(json.dumps({**known, "ctime_ns": status.st_ctime_ns - 1, "sha256": "remembered"}))
        assert store.digest(source) == archive.sha256


def test_digest_is_written_for_a_settled_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_cache, "_SETTLED_NS", -(1 << 62))
    archive = open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache)
    (note,) = (cache / "digests").iterdir()
    assert json.loads(note.read_text())["sha256"] == archive.sha256


@pytest.mark.parametrize("harm", ["delete", "shorten", "write over", "spoil the list", "delete the list"])
def test_damaged_cache_is_unpacked_again_and_keeps_derived_files(tmp_path: Path, cache: Path, harm: str) -> None:
    path = write_mar(tmp_path / "m.mar")
    archive = open_archive(path, cache_dir=cache)
    archive.cache_file("compiled.so").write_bytes(b"machine code")
    listing = cache / "archives" / archive.sha256 / "contents.json"
    if harm == "delete":
        (archive.model_dir / "handler.py").unlink()
    elif harm == "shorten":
        (archive.model_dir / "handler.py").write_bytes(b"")
    elif harm == "write over":
        written = (archive.model_dir / "handler.py").stat()
        (archive.model_dir / "handler.py").write_bytes(HANDLER.swapcase())
        later = written.st_mtime_ns + 1_000_000_000
        os.utime(archive.model_dir / "handler.py", ns=(later, later))
    elif harm == "spoil the list":
        listing.write_text('{"format": 2, "files": 3}')
    else:
        listing.unlink()
    again = open_archive(path, cache_dir=cache)
    assert (again.model_dir / "handler.py").read_bytes() == HANDLER
    assert again.cache_file("compiled.so").read_bytes() == b"machine code"
    assert [folder.name for folder in (cache / "archives").iterdir()] == [archive.sha256]


def test_remains_of_a_killed_unpacking_are_removed(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar")
    key = open_archive(path, cache_dir=tmp_path / "elsewhere").sha256
    write_folder(cache / "archives" / f".partial-{key}", {"files/handler.py": b"half"})
    archive = open_archive(path, cache_dir=cache)
    assert (archive.model_dir / "handler.py").read_bytes() == HANDLER
    assert [folder.name for folder in (cache / "archives").iterdir()] == [key]


def test_cache_file_is_a_plain_name_beside_the_files(tmp_path: Path, cache: Path) -> None:
    archive = open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache)
    assert archive.cache_file("a.pt2") == cache / "archives" / archive.sha256 / "derived" / "a.pt2"
    for name in ("../a", "a/b", "", "..", "a\0"):
        with pytest.raises(ValueError, match="plain file name"):
            archive.cache_file(name)


def _open_in_process(path: Path, cache: Path, results: Any) -> None:
    archive = open_archive(path, cache_dir=cache)
    results.put((archive.sha256, weights_of(archive), (archive.model_dir / "handler.py").read_bytes()))


@pytest.mark.slow
def test_many_processes_open_at_once(tmp_path: Path, cache: Path) -> None:
    path = write_tgz(tmp_path / "m.tgz")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(path, cache, results)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(seen) == 1 and next(iter(seen))[1:] == (WEIGHTS, HANDLER)
    assert len(list((cache / "archives").iterdir())) == 1


def test_many_threads_open_at_once_and_unpack_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tgz(tmp_path / "m.tgz")
    commits: list[str] = []
    commit = archive_cache.ArchiveCache.commit

    def counted(self: Any, key: str, *args: Any) -> None:
        commits.append(key)
        commit(self, key, *args)

    monkeypatch.setattr(archive_cache.ArchiveCache, "commit", counted)
    results: list[bytes] = []
    barrier = threading.Barrier(12)

    def run() -> None:
        barrier.wait()
        results.append(weights_of(open_archive(path, cache_dir=cache)))

    threads = [threading.Thread(target=run) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [WEIGHTS] * 12
    assert len(commits) == 1


def test_archive_replaced_while_it_is_opened_gives_one_content(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mar(tmp_path / "m.mar")
    write_mar(tmp_path / "other.mar", modelVersion="2.0")
    old = path.read_bytes()
    digest = archive_cache.ArchiveCache.digest

    def replace_then_hash(self: Any, source: SourceFile) -> str:
        os.replace(tmp_path / "other.mar", path)
        return digest(self, source)

    monkeypatch.setattr(archive_cache.ArchiveCache, "digest", replace_then_hash)
    archive = open_archive(path, cache_dir=cache)
    monkeypatch.undo()
    assert archive.manifest.model_version == "1.0"
    assert weights_of(archive) == WEIGHTS
    assert path.read_bytes() != old
    assert open_archive(path, cache_dir=cache).manifest.model_version == "2.0"


def test_archive_overwritten_while_it_is_opened_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mar(tmp_path / "m.mar")
    digest = archive_cache.ArchiveCache.digest

    def hash_then_overwrite(self: Any, source: SourceFile) -> str:
        key = digest(self, source)
        with path.open("r+b") as file:
            file.write(b"PK")
        os.utime(path, ns=(1, 1))
        return key

    monkeypatch.setattr(archive_cache.ArchiveCache, "digest", hash_then_overwrite)
    with pytest.raises(InvalidModelError, match="changed while it was read"):
        open_archive(path, cache_dir=cache)


def test_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYSERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert archive_cache.open_cache().root == tmp_path / "home" / ".cache" / "pyserve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert archive_cache.open_cache().root == tmp_path / "xdg" / "pyserve"
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "own"))
    assert archive_cache.open_cache().root == tmp_path / "own"


def test_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shared = tmp_path / "shared"
    (shared / "archives").mkdir(parents=True)
    (shared / "archives").chmod(0o777)
    monkeypatch.setenv("PYSERVE_CACHE", str(shared))
    archive = open_archive(write_mar(tmp_path / "m.mar"))
    assert not archive.model_dir.is_relative_to(shared)
    assert (archive.model_dir / "handler.py").read_bytes() == HANDLER
    assert "PYSERVE_CACHE" in caplog.text
    with pytest.raises(ModelLoadError, match="another user"):
        open_archive(tmp_path / "m.mar", cache_dir=shared)


def test_cache_that_cannot_be_made_falls_back_to_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "file" / "cache"))
    archive = open_archive(write_mar(tmp_path / "m.mar"))
    assert weights_of(archive) == WEIGHTS
    assert open_archive(tmp_path / "m.mar").model_dir == archive.model_dir


def test_full_disk_is_a_load_error_without_paths(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ModelLoadError, match=r"^m\.mar: .*No space left on device.*PYSERVE_CACHE") as caught:
        open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache)
    monkeypatch.undo()
    assert "/secret" not in caught.value.message
    assert not list((cache / "archives").iterdir())


def test_opening_imports_no_torch(tmp_path: Path) -> None:
    write_mar(tmp_path / "m.mar")
    code = (
        "import sys, pyserve.archive.packing\nfrom pyserve.archive.archive import open_archive\n"
        f"open_archive({str(tmp_path / 'm.mar')!r}, cache_dir={str(tmp_path / 'c')!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_survey_unpacks_nothing(tmp_path: Path) -> None:
    with survey(write_tgz(tmp_path / "m.tgz")) as found:
        assert (found.kind, found.root, found.is_mapped) == ("tar.gz", "m/", False)
        assert found.weights is not None and found.weights.name == "m/w.bin"
    assert tree(tmp_path) == {"m.tgz"}


# ---- the manifest


def open_with(tmp_path: Path, cache: Path, **model: Any) -> Archive:
    return open_archive(write_mar(tmp_path / "m.mar", **model), cache_dir=cache)


def test_manifest_fields_are_typed_and_unknown_ones_kept() -> None:
    text = json.dumps(
        {
            "createdOn": "02/03/2024 10:11:12",
            "runtime": "python3",
            "archiverVersion": "0.12.0",
            "license": "MIT",
            "modelServerVersion": "1.0",
            "specificationVersion": "1.0",
            "implementationVersion": "1.0",
            "model": {
                "modelName": "densenet161",
                "modelVersion": "2.1-rc1+cpu",
                "handler": "image_classifier",
                "modelFile": "model.py",
                "serializedFile": "w.pth",
                "configFile": "model-config.yaml",
                "requirementsFile": "requirements.txt",
                "extensions": {"a": 1},
            },
        }
    ).encode()
    found = Manifest.parse(text, "m.mar")
    assert (found.model_name, found.model_version, found.handler) == ("densenet161", "2.1-rc1+cpu", "image_classifier")
    assert (found.model_file, found.serialized_file) == ("model.py", "w.pth")
    assert (found.config_file, found.requirements_file) == ("model-config.yaml", "requirements.txt")
    assert (found.runtime, found.created_on) == ("python3", "02/03/2024 10:11:12")
    assert found.archiver_version == "0.12.0"
    assert found.extra == {"license": "MIT", "model": {"extensions": {"a": 1}}}
    assert found.raw == json.loads(text)


def test_manifest_of_an_old_archive_needs_only_name_and_handler() -> None:
    found = Manifest.parse(b'{"model": {"modelName": "m", "handler": "service:handle"}}', "m.mar")
    assert (found.model_version, found.runtime) == ("1.0", "python")
    assert found.created_on is None and found.archiver_version is None and found.extra == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"model": ["m"]}', '"model" must be a JSON object'),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"model": ' + b"[" * 300 + b"]" * 300 + b"}", "256 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b" " * (16 << 20) + b"{}", "more than the 16777216"),
        (b'{"model": {"modelName": [3], "handler": "h"}}', "modelName must be text, not a list"),
        (b'{"model": {"modelName": "m", "handler": ["h"]}}', "handler must be text"),
        (b'{"model": {"modelName": "m", "handler": "h", "modelVersion": {"a": 1}}}', "modelVersion must be text"),
    ],
)
def test_bad_manifest_is_refused_with_a_reason(text: bytes, reason: str) -> None:
    with pytest.raises(InvalidModelError, match=r"^m\.mar: ") as caught:
        Manifest.parse(text, "m.mar")
    assert reason in caught.value.message


def test_manifest_of_100_mib_is_refused_before_it_is_read(tmp_path: Path, cache: Path) -> None:
    files = {**good_files(), "MAR-INF/MANIFEST.json": b" " * (100 << 20)}
    path = tmp_path / "m.tgz"
    path.write_bytes(gzip.compress(tar_bytes(files), compresslevel=0))
    with pytest.raises(InvalidModelError, match="104857600 bytes, more than the 16777216 allowed"):
        open_archive(path, cache_dir=cache)


BAD_NAMES = [
    "../x",
    "a/b",
    "%2e%2e",
    "",
    "x" * 300,
    "a\0",
    "a\u202eb",
    "all",
    "ALL",
    ".a",
    "-a",
    "a b",
    "ä",
    "a\n",
    "a:b",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_bad_model_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidModelError, match="cannot be used"):
        check_model_name(name)


def test_name_in_the_manifest_is_not_judged_before_it_is_used(tmp_path: Path, cache: Path) -> None:
    assert open_with(tmp_path, cache, modelName="my model").manifest.model_name == "my model"


@pytest.mark.parametrize("version", ["x" * 256, "a\0", "a\u202eb", "a\n"], ids=ascii)
def test_version_that_cannot_be_printed_is_refused(tmp_path: Path, cache: Path, version: str) -> None:
    with pytest.raises(InvalidModelError, match="cannot be used"):
        check_model_version(version)
    with pytest.raises(InvalidModelError, match=r"^m\.mar: modelVersion"):
        open_with(tmp_path, cache, modelVersion=version)
    assert not list((tmp_path / "cache").glob("archives/*"))


@pytest.mark.parametrize(
    ("written", "version", "warnings"),
    [
        ('"1.0 beta"', "1.0 beta", 0),
        ('"2024-01-02"', "2024-01-02", 0),
        ('"ünï"', "ünï", 0),
        ("1", "1", 0),
        ("1.10", "1.10", 0),  # not 1.1
        ("1e3", "1e3", 0),
        ("123456789012345678901234567890", "123456789012345678901234567890", 0),
        ("true", "true", 0),
        ("null", "1.0", 1),
        ('""', "1.0", 1),
        ('"1/2"', "1/2", 1),
        ('"all"', "all", 1),
        ('".."', "..", 0),
    ],
)
def test_versions_that_people_write(written: str, version: str, warnings: int) -> None:
    text = f'{{"model": {{"modelName": "m", "handler": "h", "modelVersion": {written}}}}}'
    found = Manifest.parse(text.encode(), "m.mar")
    assert (found.model_version, len(found.warnings)) == (version, warnings)


@pytest.mark.parametrize(
    ("text", "warnings"),
    [
        (b'{"createdOn": null, "archiverVersion": null, "model": {"handler": "h"}}', []),
        (b'{"createdOn": 5, "archiverVersion": 1.0, "description": 5, "model": {"handler": "h"}}', []),
        (b'{"createdOn": {"a": 1}, "model": {"handler": "h"}}', ["createdOn must be text, not an object"]),
        (b'{"runtime": "python2.7", "model": {"handler": "h"}}', ['runtime "python2.7" is none of python']),
        (b'{"runtime": null, "model": {"handler": "h"}}', ['runtime "None" is none of']),
        (b'{"runtime": "PYTHON3", "model": {"handler": "h"}}', []),
        (b'\xef\xbb\xbf{"model": {"handler": "h"}}', []),
        (b'{"model": {"handler": "h", "serializedFile": ["a.pt"]}}', ["serializedFile must be text, not a list"]),
        (b'{"model": {"handler": "h", "serializedFile": "", "modelFile": null}}', []),
    ],
)
def test_odd_manifest_is_a_warning_at_most(text: bytes, warnings: list[str]) -> None:
    found = Manifest.parse(text, "m.mar")
    assert (found.handler, found.serialized_file, found.model_file) == ("h", None, None)
    assert len(found.warnings) == len(warnings)
    assert all(part in warning for part, warning in zip(warnings, found.warnings, strict=True))
    assert found.has_odd_runtime is any("runtime" in warning for warning in warnings)


@pytest.mark.parametrize("field", ["serializedFile", "modelFile", "requirementsFile"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "missing"])
def test_file_that_is_not_an_entry_is_missed_by_who_needs_it(
    tmp_path: Path, cache: Path, field: str, name: str
) -> None:  # fmt: skip
    archive = open_with(tmp_path, cache, **{field: name})
    manifest = archive.manifest
    values = {
        "serializedFile": manifest.serialized_file, "modelFile": manifest.model_file,
        "requirementsFile": manifest.requirements_file,
    }  # fmt: skip
    assert values[field] is None
    assert manifest.raw is not None and manifest.raw["model"][field] == name
    assert f"{field} {json.dumps(name)} is not in the archive" in archive.warnings[0]
    if field == "requirementsFile":
        archive.check_complete()
    else:
        with pytest.raises(ModelLoadError, match=rf"^m\.mar: {field} .* is not in the archive"):
            archive.check_complete()


@pytest.mark.parametrize("name", ["/etc/passwd", "../../etc/passwd", "missing"])
def test_configuration_that_is_not_an_entry_is_refused(tmp_path: Path, cache: Path, name: str) -> None:
    with pytest.raises(InvalidModelError, match=r"^m\.mar: configFile .* is not in the archive"):
        open_with(tmp_path, cache, configFile=name)


def test_dot_before_a_file_name_is_no_matter(tmp_path: Path, cache: Path) -> None:
    archive = open_with(tmp_path, cache, serializedFile="./w.bin")
    assert archive.manifest.serialized_file == "w.bin" and archive.warnings == []
    assert weights_of(archive) == WEIGHTS


@pytest.mark.parametrize(
    ("handler", "split"),
    [
        ("h.py", ("h.py", None)),
        ("../../h.py:f", ("h.py", "f")),
        ("/home/me/h.py", ("h.py", None)),
        ("./h", ("h", None)),
        ("my handler.py", ("my handler.py", None)),
        ("hé.py", ("hé.py", None)),
        ("h.v2.py", ("h.v2.py", None)),
        ("h.py:", ("h.py", None)),
        ("h:a:b", ("h", "a:b")),
        ("a\\h.py", ("a\\h.py", None)),
    ],
)
def test_handler_is_cut_to_its_file(handler: str, split: tuple[str, str | None]) -> None:
    assert split_handler(handler) == split


@pytest.mark.parametrize("handler", [":f", ".py", "h.py/", "h.py\0", "h.py\n", "h\u202e.py", "x" * 2000])
def test_handler_that_is_none_is_refused(tmp_path: Path, cache: Path, handler: str) -> None:
    with pytest.raises(InvalidModelError, match=r"^m\.mar: handler .* cannot be used"):
        open_with(tmp_path, cache, handler=handler)


@pytest.mark.parametrize(
    ("handler", "file"),
    [
        ("h.py", "h.py"),
        ("/abs/h.py:f", "h.py"),
        ("sub/x.py", "sub/x.py"),
        ("./sub/x", "sub/x.py"),
        ("sub/h.py", "h.py"),  # the folder is dropped, as in TorchServe
        ("../x.py", None),
        ("/sub/x.py", None),
        ("image_classifier", None),
    ],
)
def test_file_of_a_handler(handler: str, file: str | None) -> None:
    assert handler_file(handler, {"h.py", "sub/x.py", "x"}.__contains__) == file


def test_handler_that_is_nowhere_is_no_matter_until_it_is_called(tmp_path: Path, cache: Path) -> None:
    assert open_with(tmp_path, cache, handler="other.py:handle").manifest.handler == "other.py:handle"
    archive = open_with(tmp_path, cache, handler=None)
    assert archive.manifest.handler == ""
    archive.use_handler("handler.py")
    assert (archive.manifest.handler, archive.given_handler) == ("handler.py", "handler.py")
    assert archive.manifest.raw is not None and "handler" not in archive.manifest.raw["model"]


@pytest.mark.parametrize(
    ("file", "name"),
    [("m.mar", "m"), ("my model.tar.gz", "my_model"), ("_x-1.0.mar", "_x_1_0"), ("folder", "folder"), ("a.b.c", "a_b")],
)
def test_name_of_a_model_without_one(file: str, name: str) -> None:
    assert name_of_file(file) == name


@pytest.mark.parametrize("method", [0, 8])
def test_empty_weights_are_missed_by_who_needs_them(tmp_path: Path, cache: Path, method: int) -> None:
    archive = open_archive(
        write_mar(tmp_path / "m.mar", Member(b"empty", method=method), serializedFile="empty"), cache_dir=cache
    )
    assert archive.manifest.serialized_file == "empty" and archive.warnings == []
    assert (archive.own_folder(with_weights=True) / "empty").read_bytes() == b""
    with pytest.raises(ModelLoadError, match=r"serializedFile \"empty\" is empty \(0 bytes\); add the weights"):
        archive.check_complete()


def test_config_is_read_and_a_bad_one_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = write_mar(tmp_path / "m.mar", Member(b"c.yaml", b"batchSize: 8\nbatchsize: 3\n"), configFile="c.yaml")
    config = open_archive(path, cache_dir=cache).config
    assert config.batch_size == 8 and config.has_file
    assert len(config.warnings) == 1
    shutil.rmtree(cache)
    path = write_mar(tmp_path / "m.mar", Member(b"c.yaml", b"batchSize: [\n"), configFile="c.yaml")
    with pytest.raises(InvalidModelError, match=r"^m\.mar: c\.yaml: is not plain YAML"):
        open_archive(path, cache_dir=cache)
    assert not list((cache / "archives").iterdir())


def test_archive_without_config_has_an_empty_one(tmp_path: Path, cache: Path) -> None:
    config = open_with(tmp_path, cache).config
    assert not config.has_file and config.batch_size is None and config.raw == {}
    assert manifest() == (open_with(tmp_path, cache).model_dir / "MAR-INF/MANIFEST.json").read_bytes()


def test_letting_go_of_weights_does_not_close_the_descriptor_of_who_is_reading_them(
    tmp_path: Path, cache: Path
) -> None:
    weights = open_archive(write_mar(tmp_path / "m.mar"), cache_dir=cache).weights
    assert weights is not None
    with weights.pinned() as descriptor:
        weights.close()
        reused = os.open(os.devnull, os.O_RDONLY)  # what was closed would be given out again here
        try:
            assert os.fstat(descriptor).st_ino == (tmp_path / "m.mar").stat().st_ino != os.fstat(reused).st_ino
        finally:
            os.close(reused)
