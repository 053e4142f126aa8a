"""A model's file by itself: what it is taken for, what can be read from it, and what is said of everything else."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils.bundled_inputs import augment_model_with_bundled_inputs

from pyserve.archive.archive import open_archive, survey
from pyserve.archive.bare_file import described_inputs, is_input
from pyserve.archive.entries import SourceFile
from pyserve.archive.file_kind import ARCHIVE, kind_of
from pyserve.archive.given import Given, give, given_for
from pyserve.archive.inert_pickle import InertPickleError, Named, read_inert
from pyserve.archive.limits import Limits
from pyserve.archive.program_inputs import inputs_beside, inputs_in
from pyserve.archive.weights import Weights
from pyserve.commands.model_arguments import prepare
from pyserve.errors import InvalidModelError, ModelLoadError, ServeError
from tests.support.safetensors import save_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Pair(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left.sum(1) + right.sum(1)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYSERVE_GIVEN", "{}")
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))


def scripted(path: Path, module: torch.nn.Module | None = None) -> Path:
    torch.jit.save(torch.jit.script((module or Linear()).eval()), str(path))
    return path


def test_torchscript_is_mapped_where_it_lies_whatever_its_name_ends_in(tmp_path: Path) -> None:
    path = scripted(tmp_path / "my net.bin")
    with open_archive(path) as archive:
        assert archive.manifest.model_name == "my_net"
        assert archive.manifest.handler == "tensor"
        assert archive.weights is not None and archive.weights.suffix == ".pt"
        assert archive.weights.path == path and archive.weights.offset == 0
        with archive.weights.open() as file:
            assert file.read() == path.read_bytes()
        assert not any(each.suffix == ".pt" for each in archive.model_dir.iterdir())
        assert (archive.own_folder(with_weights=True) / "my_net.pt").read_bytes() == path.read_bytes()


def test_what_is_given_is_part_of_it_and_of_its_key(tmp_path: Path) -> None:
    path = scripted(tmp_path / "net.pt")
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    with open_archive(path) as archive:
        plain = archive.sha256
    given = Given(handler="image_classifier", inputs=("float32:3,8,8",), labels=str(tmp_path / "labels.json"))
    give(path, given)
    assert given_for(path) == given
    with open_archive(path) as archive:
        assert archive.sha256 != plain
        assert archive.manifest.handler == "image_classifier"
        assert archive.config.raw == {"input": {"dtype": "float32", "shape": [3, 8, 8]}}
        assert (archive.model_dir / "index_to_name.json").read_text() == '["cat", "dog"]'
        key = archive.sha256
    (tmp_path / "labels.json").write_text('["cat", "cow"]')
    with open_archive(path) as archive:
        assert archive.sha256 != key
        assert (archive.model_dir / "index_to_name.json").read_text() == '["cat", "cow"]'


def test_what_is_given_reads_back_from_its_text() -> None:
    given = Given(handler="tensor", inputs=("a=float32:4", "b=int64:2..8"))
    assert Given.from_text(given.to_text()) == given
    assert Given().to_text() == "" and Given.from_text("") == Given()


def test_input_of_an_exported_program_is_read_from_it(tmp_path: Path) -> None:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(
        Pair(), (torch.ones(2, 5), torch.ones(2, 5)), dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length})
    )
    torch.export.save(program, tmp_path / "pair.pt2")
    with open_archive(tmp_path / "pair.pt2") as archive:
        assert archive.inputs_from == "the exported program"
        left, right = archive.config.raw["input"]
        assert (left["name"], right["name"]) == ("left", "right")
        assert left["shape"] == right["shape"] == ["2..32"]
        assert left["same"] == right["same"]
        assert [each.sizes for each in archive.config.input] == [((2, 32),)] * 2


def test_input_is_read_from_inputs_bundled_with_a_program(tmp_path: Path) -> None:
    module = torch.jit.script(Pair())
    augment_model_with_bundled_inputs(
        module, [(torch.rand(1, 4), torch.rand(1, 3)), (torch.zeros(1, 4), torch.zeros(1, 7))]
    )
    torch.jit.save(module, str(tmp_path / "pair.pt"))
    with open_archive(tmp_path / "pair.pt") as archive:
        assert archive.config.raw["input"] == [
            {"dtype": "float32", "shape": [4], "name": "input_0"},
            {"dtype": "float32", "shape": [-1], "name": "input_1"},
        ]  # fmt: skip


METADATA = {"name": "net", "platform": "pytorch_libtorch", "outputs": [], "inputs": [
    {"name": "left", "datatype": "FP32", "shape": [-1, 4]}, {"name": "right", "datatype": "INT64", "shape": [-1, -1]},
]}  # fmt: skip
DESCRIBED = [
    {"name": "left", "dtype": "float32", "shape": [4]}, {"name": "right", "dtype": "int64", "shape": [-1]},
]  # fmt: skip


def test_input_is_read_from_metadata_of_another_server(tmp_path: Path) -> None:
    script = torch.jit.script(Pair())
    torch.jit.save(script, str(tmp_path / "pair.pt"), _extra_files={"metadata.json": json.dumps(METADATA)})
    with open_archive(tmp_path / "pair.pt") as archive:
        assert (archive.config.raw["input"], archive.inputs_from) == (DESCRIBED, "metadata.json")
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.jit.save(script, str(folder / "pair.pt"))
    (folder / "metadata.json").write_text(json.dumps(METADATA))
    prepare(folder, Given())
    with open_archive(folder) as archive:
        archive.check_complete()
        assert (archive.config.raw["input"], archive.inputs_from) == (DESCRIBED, "metadata.json")
    (folder / "model-config.yaml").write_text("input: {dtype: float32, shape: [9]}\n")
    prepare(folder, Given())
    with open_archive(folder) as archive:  # what is said there goes before it
        assert archive.config.raw["input"]["shape"] == [9] and not archive.inputs_from


@pytest.mark.parametrize("text", [
    "", "{", "[]", "[" * 100_000, "{}", '{"inputs": []}', '{"inputs": {}}', '{"inputs": [[]]}',
    '{"inputs": [{"name": "x", "datatype": "BYTES", "shape": [-1]}]}',
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": []}]}',
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 224]}]}',  # without the batch
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 0]}]}',
    '{"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, true]}]}',
    '{"inputs": [{"datatype": "FP32", "shape": [-1, 3]}]}',
])  # fmt: skip
def test_metadata_that_says_no_inputs_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.json").write_text(text)
    assert inputs_beside(tmp_path, "net") is None
    (tmp_path / "metadata.json").unlink()
    os.mkfifo(tmp_path / "metadata.json")
    assert inputs_beside(tmp_path, "net") is None


def test_input_that_is_not_said_is_asked_for_when_it_is_needed(tmp_path: Path) -> None:
    with open_archive(scripted(tmp_path / "net.pt")) as archive:
        with pytest.raises(ModelLoadError, match=r"pyserve start net\.pt --input float32:3,224,224"):
            archive.check_complete()
        archive.use_handler("image_classifier")
        archive.check_complete()


def test_weights_go_with_a_model_file(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("class Net: ...\n")
    torch.save(Linear().state_dict(), tmp_path / "w.pth")
    save_safetensors({"a": torch.ones(2)}, tmp_path / "s.safetensors")
    for name in ("w.pth", "s.safetensors"):
        with pytest.raises(InvalidModelError, match=r"holds weights only.*--model-file"):
            open_archive(tmp_path / name)
        give(tmp_path / name, Given(model_file=str(tmp_path / "model.py"), inputs=("float32:4",)))
        with open_archive(tmp_path / name) as archive:
            assert archive.manifest.model_file == "model.py"
            assert (archive.model_dir / "model.py").read_text() == "class Net: ...\n"
            archive.check_complete()


def test_a_model_file_is_not_for_a_program(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("class Net: ...\n")
    give(scripted(tmp_path / "net.pt"), Given(model_file=str(tmp_path / "model.py"), inputs=("float32:4",)))
    with open_archive(tmp_path / "net.pt") as archive:
        assert archive.manifest.model_file is None


RAN: list[int] = []


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return RAN.append, (1,)


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name in names:
            packed.writestr(name, "x")
    return file.getvalue()


def others(folder: Path) -> dict[str, tuple[bytes, str]]:
    def saved(value: object, *, is_zip: bool = True) -> bytes:
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=is_zip)
        return file.getvalue()

    return {
        "empty.pt": (b"", r"is empty \(0 bytes\)"),
        "whole.pt": (saved(Linear()), "whole object that was pickled .*Linear.*state_dict"),
        "old-whole.pt": (saved(Linear(), is_zip=False), "whole object that was pickled .*Linear"),
        "bomb.pt": (saved(Bomb()), "whole object that was pickled"),
        "tensor.pt": (saved(torch.ones(3)), "holds a tensor, not a model"),
        "old-weights.pt": (saved({"a": torch.ones(3)}, is_zip=False), "holds weights only"),
        "net.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x051.0.0", "is an ONNX file.*--serialized-file net.onnx"),
        "lfs.mar": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS.*git lfs pull"),
        "page.mar": (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        "text.pt": ("gr\u00f6\u00dfe is\n".encode(), "is a text file, not a model: it begins with .gr"),
        "code.py": (b"import torch\n", "is Python source"),
        "plain.pkl": (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
        "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
        "noise.bin": (bytes(range(200, 256)) * 4, "is neither a zip"),
        "arrays.npz": (zipped("a.npy", "b.npy"), "is NumPy arrays .*they can be sent to a model"),
        "net.keras": (zipped("metadata.json", "config.json", "model.weights.h5"), "is a Keras model"),
        "report.docx": (zipped("[Content_Types].xml", "word/document.xml"), "is an Office document"),
    }


@pytest.mark.parametrize("name", others(Path()))
def test_every_other_file_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    content, text = others(tmp_path)[name]
    (tmp_path / name).write_bytes(content)
    for opened in (lambda: open_archive(tmp_path / name), lambda: survey(tmp_path / name).__enter__()):
        with pytest.raises(InvalidModelError, match=text) as caught:
            opened()
        assert caught.value.message.startswith(f"{name}: ")
        assert str(tmp_path) not in caught.value.message
    assert not RAN


def test_a_zip_that_says_nothing_is_an_archive_without_a_manifest(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("a.txt", "x")
    with open(tmp_path / "x.zip", "rb") as file:
        kind, _ = kind_of(SourceFile(file.fileno(), "x.zip", os.path.getsize(file.name)))
    assert kind == ARCHIVE
    with open_archive(tmp_path / "x.zip") as archive:
        assert archive.manifest.raw is None and "MAR-INF/MANIFEST.json" in archive.warnings[0]


def test_a_packed_state_dict_without_its_class_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text(
        '{"model": {"modelName": "m", "handler": "tensor", "serializedFile": "w.pt"}}'
    )
    torch.save(Linear().state_dict(), folder / "w.pt")
    with open_archive(folder) as archive, pytest.raises(ModelLoadError, match=r"m: w\.pt: holds weights only"):
        archive.check_complete()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("float32:3,224,224", {"dtype": "float32", "shape": [3, 224, 224]}),
        ("torch.int64:[2..64, -1]", {"dtype": "int64", "shape": ["2..64", -1]}),
        ("float32", {"dtype": "float32", "shape": []}),
        ("ids=int64:5", {"dtype": "int64", "shape": [5], "name": "ids"}),
    ],
)
def test_inputs_of_the_command_line(text: str, value: object) -> None:
    assert described_inputs([text]) == value


@pytest.mark.parametrize("text", ["float23:4", "3,224,224", "float32:a", "float32:0", "float32:3x4", ""])
def test_inputs_that_are_none_say_how_to_write_them(text: str) -> None:
    with pytest.raises(InvalidModelError, match=r"--input.*float32:3,224,224"):
        described_inputs([text])


def test_files_are_told_from_inputs() -> None:
    assert is_input("float32:4") and is_input("a=int64:-1")
    assert not is_input("kitten.jpg") and not is_input("float32") and not is_input("/tmp/float32:4")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"\x80\x02cos\nsystem\n", b"garbage", b"\x80\x02}0.", b"\x80\x02r"]
)
def test_pickles_that_are_none_are_refused(content: bytes) -> None:
    with pytest.raises(InertPickleError):
        read_inert(io.BytesIO(content))


def test_a_name_that_would_be_huge_as_text_is_refused() -> None:
    doubled = b"".join(b"q%ch%c\x86" % (level, level) for level in range(200))  # a pair of what there was, each time
    with pytest.raises(InertPickleError, match="a name that is no text"):
        read_inert(io.BytesIO(b"\x80\x04)" + doubled + b"\x8c\x01a\x93."))


@pytest.mark.parametrize(
    "examples",
    [
        b"](ctorch._utils\n_rebuild_tensor_v2\ne", b"](ctorch._utils\n_rebuild_tensor_v2\n(K\x01QK\x00K\x01\x85tRe",
        b"ctorch\nx\nK\x05R", None,
    ],
)  # fmt: skip
def test_what_bundled_inputs_cannot_be_is_no_input(tmp_path: Path, examples: bytes | None) -> None:
    name = b"_bundled_inputs_deflated_forward"
    content = b"\x80\x02c__torch__\nM\n)\x81}X%c\x00\x00\x00%b%bsb." % (len(name), name, examples or b"N")
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("net/data.pkl", content * (1 if examples else 100))
        members.writestr("net/constants.pkl", b"\x80\x02.")
    if examples is None:  # damaged
        whole = bytearray(path.read_bytes())
        whole[45:70] = b"\xff" * 25
        path.write_bytes(whole)
    assert inputs_in(Weights("net.pt", path, 0, path.stat().st_size), "net.pt", Limits()) is None


def test_a_program_that_inflates_beyond_the_limits_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = "{" + " " * (1 << 20) + "}"
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("net/models/model.json", graph)
    read: list[str] = []
    monkeypatch.setattr("pyserve.proof.export_rules.read_exported", lambda file, label: read.append(label))
    weights = Weights("net.pt2", path, 0, path.stat().st_size)
    assert inputs_in(weights, "net.pt2", Limits(unpacked_size_max=1 << 19)) is None and not read
    inputs_in(weights, "net.pt2", Limits())
    assert read == ["net.pt2"]  # within the limits it is


@pytest.mark.parametrize("text", ["[1]", '{"inputs": 5}', '{"inputs": [1]}', '{"handler": 4}', "[" * 100_000, "{"])
def test_what_was_not_written_as_given_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Given.from_text(text)


def test_a_pickle_is_read_without_running_it() -> None:
    found = read_inert(io.BytesIO(pickle.dumps(Bomb(), protocol=2)))
    assert isinstance(found, Named) and found.arguments == (1,)
    assert not RAN


def test_what_was_given_wrongly_is_named(tmp_path: Path) -> None:
    path = scripted(tmp_path / "net.pt")
    for given, text in [
        (Given(handler="image_clasifier"), "did you mean image_classifier"),
        (Given(labels=str(tmp_path / "no.json"), handler="image_classifier"), "--labels .*no.json cannot be read"),
        (Given(labels="x"), "--handler image_classifier"),
        (Given(inputs=("a=float32:4", "a=float32:4")), "a name of its own"),
    ]:
        give(path, given)
        with pytest.raises(ServeError, match=text):
            open_archive(path)
