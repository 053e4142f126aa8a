"""Packing: the flags, what is refused, and that every format opens again."""

from __future__ import annotations

import argparse
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pyserve.archive.archive import open_archive
from pyserve.archive.packing import FORMATS, ArchiverConfig, write_archive
from pyserve.archive.samples import warm_up_samples
from pyserve.commands.archive import add_archiver_arguments, archive_command
from pyserve.commands.inspect_archive import add_inspect_arguments, inspect_command
from pyserve.errors import InvalidModelError
from tests.support.archive_files import HANDLER, WEIGHTS, tree, write_folder, write_plain_mar

# A tracer takes the sum for a constant, and numpy cannot be scripted.
DEPENDS_ON_DATA = """
import torch


class Net(torch.nn.Module):
    def forward(self, x):
        return x * float(x.numpy().sum())
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files of a model."""
    folder = write_folder(
        tmp_path / "src",
        {
            "handler.py": HANDLER,
            "model.py": b"class Model:\n    pass\n",
            "w.pt": WEIGHTS,
            "labels.json": b"{}" * 4000,
            "requirements.txt": b"numpy\n",
            "model-config.yaml": b"batchSize: 8\nbatchsize: 2\n",
            "extra/a.txt": b"a",
            "extra/sub/b.txt": b"b",
            "extra/sub/deep/c.txt": b"c",
            "extra/__pycache__/x.pyc": b"x",
            "extra/.git/config": b"x",
            "extra/__MACOSX/y": b"y",
        },
    )
    monkeypatch.chdir(folder)
    return folder


def packed(**fields: Any) -> Path:
    usual = {"model_name": "m", "handler": "handler.py", "serialized_file": "w.pt", "export_path": "out"}
    return write_archive(ArchiverConfig(**{**usual, **fields}))


@pytest.mark.parametrize("archive_format", FORMATS)
def test_every_format_opens_again(sources: Path, tmp_path: Path, archive_format: str) -> None:
    path = packed(
        archive_format=archive_format,
        model_file="model.py",
        requirements_file="requirements.txt",
        config_file="model-config.yaml",
        extra_files="labels.json,extra",
        version="2.1",
    )
    suffix = {"tgz": ".tar.gz", "no-archive": ""}.get(archive_format, ".mar")
    assert path == Path("out") / f"m{suffix}"
    assert tree(Path("out")) & {f"m{suffix}"} and not [name for name in tree(Path("out")) if "partial" in name]
    archive = open_archive(path, cache_dir=tmp_path / "cache")
    found = archive.manifest
    assert (found.model_name, found.model_version, found.handler) == ("m", "2.1", "handler.py")
    assert (found.model_file, found.serialized_file) == ("model.py", "w.pt")
    assert (found.requirements_file, found.config_file) == ("requirements.txt", "model-config.yaml")
    assert archive.config.batch_size == 8
    assert archive.files.keys() == {
        "MAR-INF/MANIFEST.json",
        "handler.py",
        "model.py",
        "w.pt",
        "labels.json",
        "requirements.txt",
        "model-config.yaml",
        "a.txt",
        "sub/b.txt",
        "sub/deep/c.txt",
    }
    assert (archive.model_dir / "sub/deep/c.txt").read_bytes() == b"c"
    assert archive.weights is not None
    assert archive.weights.is_mapped is (archive_format in {"default", "zip-store"})
    with archive.weights.open() as window:
        assert window.read() == WEIGHTS


def test_default_format_deflates_code_and_aligns_stored_weights(sources: Path, tmp_path: Path) -> None:
    for length in range(1, 70):  # every remainder of the header's length
        path = packed(model_name="n" * length, extra_files="labels.json")
        archive = open_archive(path, cache_dir=tmp_path / "cache")
        assert archive.weights is not None and archive.weights.is_mapped
        assert archive.weights.offset % 64 == 0
        archive.close()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        methods = {entry.filename: entry.compress_type for entry in file.infolist()}
    assert methods["w.pt"] == zipfile.ZIP_STORED
    assert methods["labels.json"] == methods["handler.py"] == zipfile.ZIP_DEFLATED


def test_zip_store_stores_everything(sources: Path) -> None:
    with zipfile.ZipFile(packed(archive_format="zip-store", extra_files="labels.json")) as file:
        methods = {entry.filename: entry.compress_type for entry in file.infolist()}
    assert set(methods.values()) == {zipfile.ZIP_STORED}


def test_wide_sizes_keep_weights_aligned(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # zipfile then writes wide sizes for these small files
    archive = open_archive(packed(), cache_dir=tmp_path / "cache")
    assert archive.weights is not None and archive.weights.offset % 64 == 0
    with archive.weights.open() as window:
        assert window.read() == WEIGHTS


def test_manifest_has_torchserves_shape(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with zipfile.ZipFile(packed(handler="image_classifier", runtime="python3")) as file:
        found = json.loads(file.read("MAR-INF/MANIFEST.json"))
    assert found == {
        "createdOn": "14/11/2023 22:13:20",
        "runtime": "python3",
        "archiverVersion": "1.0",
        "model": {"modelName": "m", "serializedFile": "w.pt", "handler": "image_classifier", "modelVersion": "1.0"},
    }


@pytest.mark.parametrize("archive_format", ["default", "zip-store", "tgz"])
def test_same_files_give_the_same_bytes(sources: Path, monkeypatch: pytest.MonkeyPatch, archive_format: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = packed(archive_format=archive_format, extra_files="extra").read_bytes()
    os.utime("w.pt", (1, 1))
    assert packed(archive_format=archive_format, extra_files="extra", force=True).read_bytes() == first


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("handler.py", "handler.py"),
        ("handler", "handler"),
        ("handler.py:handle", "handler.py:handle"),
        ("handler:handle", "handler:handle"),
        ("./handler.py", "handler.py"),
        ("../src/handler:handle", "handler:handle"),
    ],
)
def test_handler_file_may_be_spelled_in_all_ways(sources: Path, tmp_path: Path, given: str, written: str) -> None:
    archive = open_archive(packed(handler=given), cache_dir=tmp_path / "cache")
    assert archive.manifest.handler == written
    assert "handler.py" in archive.files


def test_built_in_handler_needs_no_file(sources: Path, tmp_path: Path) -> None:
    archive = open_archive(packed(handler="image_classifier"), cache_dir=tmp_path / "cache")
    assert archive.files.keys() == {"MAR-INF/MANIFEST.json", "w.pt"}


def test_library_of_the_lsp_runtime_is_packed(sources: Path) -> None:
    Path("libmine.so").write_bytes(b"\x7fELF")
    path = packed(runtime="LSP", handler="libmine:Mine")
    with zipfile.ZipFile(path) as file:
        assert "libmine.so" in file.namelist()
    packed(runtime="LSP", handler="TorchScriptHandler", model_name="n")


def test_handler_that_is_nowhere_names_the_nearest(sources: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"neither a Python file nor built in; did you mean image_classifier\?"):
        packed(handler="image_clasifier")
    with pytest.raises(InvalidModelError) as refused:  # TorchServe's covers of other engines are not offered
        packed(handler="vlm_handler")
    assert "tensor" in str(refused.value) and "vllm_handler" not in str(refused.value)


def test_extra_files_take_wildcards_lists_and_folders(sources: Path) -> None:
    with zipfile.ZipFile(packed(extra_files=" *.json , extra/sub/*.txt,./requirements.txt,")) as file:
        assert set(file.namelist()) == {
            "MAR-INF/MANIFEST.json",
            "handler.py",
            "w.pt",
            "labels.json",
            "b.txt",
            "requirements.txt",
        }


def test_file_whose_name_looks_like_a_wildcard_is_taken_literally(sources: Path) -> None:
    Path("a[1].txt").write_bytes(b"x")
    with zipfile.ZipFile(packed(extra_files="a[1].txt")) as file:
        assert "a[1].txt" in file.namelist()


def test_two_files_of_one_name_are_refused_and_both_named(sources: Path) -> None:
    write_folder(sources, {"one/utils.py": b"1", "two/utils.py": b"2"})
    with pytest.raises(InvalidModelError, match=r"utils\.py given twice: one/utils\.py, two/utils\.py"):
        packed(extra_files="one,two/utils.py")


def test_the_same_file_named_twice_is_packed_once(sources: Path) -> None:
    with zipfile.ZipFile(packed(extra_files="handler.py,../src/handler.py,labels.json,*.json")) as file:
        assert sorted(file.namelist()) == sorted({*file.namelist()})


def test_a_wildcard_that_matches_nothing_is_a_warning(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    with zipfile.ZipFile(packed(extra_files="*.nothing,labels.json")) as file:
        assert "labels.json" in file.namelist()
    assert "*.nothing matches no file" in caplog.text


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"extra_files": "labels.json,missing.txt"}, r"extra file not found: missing\.txt"),
        ({"serialized_file": "no.pt"}, r"serialized file not found: no\.pt"),
        ({"model_file": "no.py"}, "model file not found"),
        ({"requirements_file": "no.txt"}, "requirements file not found"),
        ({"config_file": "no.yaml"}, "config file not found"),
        ({"config_file": "labels.json"}, r"labels\.json: is not plain YAML"),
        ({"model_name": "../m"}, "modelName .* cannot be used"),
        ({"model_name": "all"}, "modelName .* cannot be used"),
        ({"version": "1\n2"}, "modelVersion .* cannot be used"),
        ({"archive_format": "rar"}, "use one of default, zip-store"),
        ({"runtime": "ruby"}, "use one of python"),
        ({"extra_files": "linked"}, "link to a folder"),
        ({"extra_files": "own"}, "written by the archiver"),
        ({"extra_files": "pipes"}, "not found|not a regular file"),
    ],
)
def test_what_cannot_be_packed_leaves_nothing(sources: Path, fields: dict[str, Any], reason: str) -> None:
    write_folder(
        sources,
        {
            "linked/x": b"",
            "own/MAR-INF/MANIFEST.json": b"{}",
            "pipes/x": b"",
        },
    )
    (sources / "linked/extra").symlink_to("../extra")
    os.mkfifo(sources / "pipes/pipe")
    with pytest.raises(InvalidModelError, match=reason):
        packed(**fields)
    assert not Path("out").exists() or not tree(Path("out"))


def test_what_is_odd_is_packed_as_torch_model_archiver_packs_it(sources: Path) -> None:
    write_folder(sources, {"twins/a.txt": b"1", "twins/A.txt": b"2", "empty.pt": b"", "my é.py": HANDLER})
    with zipfile.ZipFile(packed(extra_files="twins", serialized_file="empty.pt", handler="my é.py",
                                version="1.0 beta")) as file:  # fmt: skip
        assert {"a.txt", "A.txt", "empty.pt", "my é.py"} < set(file.namelist())


@pytest.mark.parametrize("archive_format", FORMATS)
def test_existing_archive_is_replaced_only_by_force(sources: Path, tmp_path: Path, archive_format: str) -> None:
    path = packed(archive_format=archive_format)
    with pytest.raises(InvalidModelError, match="already exists in the export path; use --force"):
        packed(archive_format=archive_format, version="2.0")
    assert open_archive(path, cache_dir=tmp_path / "cache").manifest.model_version == "1.0"
    packed(archive_format=archive_format, version="2.0", force=True)
    assert open_archive(path, cache_dir=tmp_path / "cache").manifest.model_version == "2.0"
    assert [child.name for child in Path("out").iterdir()] == [path.name]


def test_failed_replacement_keeps_the_old_archive(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed()
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        packed(force=True, version="2.0")
    assert path.read_bytes() == before
    assert tree(Path("out")) == {"m.mar"}


def test_archive_is_readable_as_the_umask_says(sources: Path) -> None:
    before = os.umask(0o022)
    try:
        assert stat.S_IMODE(packed().stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_calibration_folder_keeps_its_name(sources: Path, tmp_path: Path) -> None:
    with open_archive(packed(calibration="extra"), cache_dir=tmp_path / "cache") as archive:
        inside = {name for name in archive.files if name.startswith("calibration/")}
        assert inside == {"calibration/a.txt", "calibration/sub/b.txt", "calibration/sub/deep/c.txt"}
        assert (archive.model_dir / "calibration/sub/b.txt").read_bytes() == b"b"
    with pytest.raises(InvalidModelError, match=r"calibration folder not found: labels\.json"):
        packed(calibration="labels.json", force=True)


# ---- the commands


def run(add: Any, command: Any, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add(parser)
    return int(command(parser.parse_args(arguments)))


def test_archive_command_prints_path_and_size(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(
        add_archiver_arguments,
        archive_command,
        "--model-name",
        "m",
        "-v",
        "1.0",
        "--handler",
        "handler.py",
        "--serialized-file",
        "w.pt",
        "--model-file",
        "model.py",
        "--extra-files",
        "labels.json",
        "-f",
        "--export-path",
        "out",
        "--runtime",
        "python",
        "--archive-format",
        "default",
        "-r",
        "requirements.txt",
        "-c",
        "model-config.yaml",
    )
    assert code == 0
    assert capsys.readouterr().out == f"out/m.mar ({Path('out/m.mar').stat().st_size / 1024:.1f} KiB)\n"


@pytest.mark.slow
def test_archive_command_says_why_a_model_cannot_share_its_weights(
    sources: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(sources / "cache"))
    (sources / "model.py").write_text(DEPENDS_ON_DATA)
    (sources / "shape.yaml").write_text("input: {dtype: float32, shape: [4]}\n")
    arguments = ["--model-name", "m", "--version", "1.0", "--handler", "tensor", "--model-file", "model.py"]
    assert run(add_archiver_arguments, archive_command, *arguments, "--config-file", "shape.yaml") == 0
    path, note = capsys.readouterr().out.splitlines()
    assert path.startswith(f"{sources / 'm.mar'} (")
    assert note.startswith("note: it runs in worker processes, each with a copy of the model: ")
    assert "reads numbers or sizes of its input" in note and "--serialized-file" in note


def test_archive_command_fails_with_one_line(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run(add_archiver_arguments, archive_command, "--model-name", "m", "-v", "1.0", "--handler", "nohandler")
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.startswith('error: handler "nohandler"') and captured.err.count("\n") == 1


def test_inspect_shows_manifest_config_entries_and_mapping(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(config_file="model-config.yaml", extra_files="labels.json")
    assert run(add_inspect_arguments, inspect_command, str(path)) == 0
    out = capsys.readouterr().out
    for expected in (
        '"modelName": "m"',
        "batchSize: 8",
        "stored",
        "deflated",
        "mapped from the archive at byte",
        'warning: m.mar: model-config.yaml: unknown key "batchsize", did you mean batchSize?',
    ):
        assert expected in out
    line = next(line for line in out.splitlines() if line.endswith("w.pt"))
    assert line.split() == [str(len(WEIGHTS)), str(len(WEIGHTS)), "stored", "w.pt"]


@pytest.mark.parametrize(
    ("archive_format", "expected"),
    [
        ("tgz", "unpacked once into the cache"),
        ("no-archive", "used where it lies"),
    ],
)
def test_inspect_reads_the_other_formats(
    sources: Path, capsys: pytest.CaptureFixture[str], archive_format: str, expected: str
) -> None:
    assert run(add_inspect_arguments, inspect_command, str(packed(archive_format=archive_format))) == 0
    assert expected in capsys.readouterr().out


def test_inspect_of_a_bad_archive_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plain_mar(tmp_path / "m.mar", {"MAR-INF/MANIFEST.json": b"a"})
    assert run(add_inspect_arguments, inspect_command, str(path)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: m.mar: MAR-INF/MANIFEST.json is not JSON") and captured.err.count("\n") == 1
    assert run(add_inspect_arguments, inspect_command, str(tmp_path / "no.mar")) == 1


def test_a_warm_up_folder_keeps_its_name(sources: Path, tmp_path: Path) -> None:
    with open_archive(packed(warmup="extra"), cache_dir=tmp_path / "cache") as archive:
        assert "warmup/a.txt" in archive.files
        assert [each.name for each in warm_up_samples(archive.model_dir)] == [
            "warmup/a.txt", "warmup/sub/b.txt", "warmup/sub/deep/c.txt",
        ]  # fmt: skip
    with pytest.raises(InvalidModelError, match=r"warm-up folder not found: labels\.json"):
        packed(warmup="labels.json", force=True)
