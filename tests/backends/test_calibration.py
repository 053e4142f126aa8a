"""Files to calibrate with: what is read of each kind, and what becomes of those that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyserve.backends import calibration
from pyserve.backends.calibration import FOLDER, Asked, Calibration, calibration_files, read_calibration
from pyserve.context import Context
from pyserve.errors import ModelLoadError
from pyserve.handler import BUILT_IN
from pyserve.proof.probe_inputs import InputDomain

ONE = {"input": {"dtype": "float32", "shape": [3]}}
TWO = {
    "input": [
        {"name": "ids", "dtype": "int64", "shape": [-1], "vocabulary": 10, "pad_to": [4, 8]},
        {"name": "scale", "dtype": "float32", "shape": [2]},
    ]
}


def asked(config: dict[str, Any], name: str = "tensor", folder: Path = Path()) -> Asked:
    handler = BUILT_IN[name].import_class()()
    context = Context("m", str(folder), {}, model_yaml_config=config)
    handler.prepare(context)
    made = handler.example_input(context)
    example = made if isinstance(made, tuple) else (made,)
    return Asked(handler, context, example, InputDomain.of(handler, example))


def write(folder: Path, files: dict[str, Any]) -> list[str]:
    (folder / FOLDER).mkdir()
    for name, content in files.items():
        path = folder / FOLDER / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".npy"):
            np.save(path, content)
        elif name.endswith(".npz"):
            np.savez(path, **content)
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        else:
            torch.save(content, path)
    return calibration_files([f"{FOLDER}/{name}" for name in files])


def read(folder: Path, files: dict[str, Any], config: dict[str, Any]) -> Calibration:
    return read_calibration("m.mar", folder, write(folder, files), asked(config, folder=folder))


def test_only_files_of_the_folder_that_can_be_read_count() -> None:
    names = ["calibration/b.JPG", "calibration/a/x.npy", "calibration/readme.md", "calibration/.hidden.json",
             "calibration.json", "sample_input.json", "other/calibration/x.npy"]  # fmt: skip
    assert calibration_files(names) == ["calibration/a/x.npy", "calibration/b.JPG"]


def test_one_item_and_many_of_every_kind(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "a.json": [1, 2, 3],
            "b.npy": np.array([4, 5, 6], dtype=np.float64),
            "c.npy": np.array([[7, 8, 9], [10, 11, 12]], dtype=np.int32),
            "d.pt": torch.tensor([[13.0, 14.0, 15.0]]),
            "e.npz": {"whatever": np.full((2, 3), 16, dtype=np.float32)},
        },
        ONE,
    )
    assert all(item[0].shape == (1, 3) for item in found.items)
    rows = [item[0][0].tolist() for item in found.items]
    assert rows == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15], [16, 16, 16], [16, 16, 16]]
    assert {item[0].dtype for item in found.items} == {torch.float32}
    assert found.file_count == 5 and not found.left_out
    assert str(found) == "7 items of 5 files in calibration/"


def test_several_inputs_by_name_and_by_place_are_filled_up(tmp_path: Path) -> None:
    ids, scale = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0.5, 1.0], [2.0, 3.0]])
    found = read(
        tmp_path,
        {
            "a.json": {"ids": [7, 8], "scale": [1, 1]},
            "b.npz": {"scale": scale.numpy(), "ids": ids.numpy().astype(np.int32)},
            "c.pt": (ids[0], scale[0]),
        },
        TWO,
    )
    assert [item[0][0].tolist() for item in found.items] == [[7, 8, 0, 0], [1, 2, 3, 0], [4, 5, 6, 0], [1, 2, 3, 0]]
    assert {item[0].dtype for item in found.items} == {torch.int64}
    assert [item[1].tolist() for item in found.items][1:3] == [[[0.5, 1.0]], [[2.0, 3.0]]]


def test_pictures_go_through_the_handler(tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (300, 260), (255, 0, 0)).save(picture, "PNG")
    names = write(tmp_path, {"red.png": picture.getvalue(), "broken.jpg": b"\xff\xd8nothing"})
    found = read_calibration("m.mar", tmp_path, names, asked({}, "image_classifier", tmp_path))
    assert [tuple(item[0].shape) for item in found.items] == [(1, 3, 224, 224)]
    assert found.items[0][0][0, 0].min() > 2 and found.items[0][0][0, 1].max() < -2  # normalized
    (text,) = found.left_out
    assert text.startswith("calibration/broken.jpg: the handler cannot read it: ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", b"no numpy file", "it cannot be read: it is no .npy file, as numpy.save writes them"),
        ("a.npz", b"no numpy file", "it cannot be read: it is no .npz file, as numpy.savez writes them"),
        ("a.npy", b"\x93NUMPY\x01\0 cut", "it cannot be read: ValueError"),
        ("a.npy", np.array([object()], dtype=object), "it cannot be read: ValueError"),
        ("a.npy", np.array(["a", "b"]), "it cannot be read: TypeError: can't convert np.ndarray of type numpy.str_"),
        ("a.npy", np.zeros((2, 4), dtype=np.float32), "shape [4], and one item is [3]"),
        ("a.npy", np.zeros((1, 1, 1, 3), dtype=np.float32), "several are [n, 3]"),
        ("a.npy", np.zeros((0, 3), dtype=np.float32), "its inputs have 0 items"),
        ("a.npy", np.array([1, np.nan, 2], dtype=np.float32), "NaN or infinite"),
        ("a.npy", np.zeros(3, dtype=np.complex64), "the input is complex64, and the model takes float32"),
        ("a.pt", b"PK\x03\x04 cut", "it cannot be read: "),
        ("a.pt", {"state": {"nested": 1}}, "the model takes 1 tensors"),
        ("a.pt", [torch.zeros(3), torch.zeros(3)], "it has 2 values"),
        ("a.pt", torch.zeros(2, 3).to_sparse(), "the input of it is sparse_coo; save it as an ordinary tensor"),
        ("a.pt", torch.zeros(2, 3).to_sparse_csr(), "the input of it is sparse_csr"),
        ("a.pt", torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8), "the input of it is quantized"),
        ("a.pt", torch.zeros(2, 3, device="meta"), "the input of it is without numbers"),
        ("a.pt", torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]), "the input of it is nested"),
        ("a.json", b"{", "the handler cannot read it: "),
        ("a.json", {"x": 1}, "the handler cannot read it: "),
        ("a.json", b"", "it has 0 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(
    tmp_path: Path, name: str, content: Any, reason: str
) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read(tmp_path, {name: content}, ONE)
    text = caught.value.message
    assert text.startswith(f"m.mar: its only calibration file cannot be used: calibration/{name}: ")
    assert reason in text and ".." not in text and text.endswith("or take 'precision: int8' out of model-config.yaml")


def test_one_of_a_kind_that_torch_cannot_convert_keeps_no_other_from_being_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(self: Any, position: int, given: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
        if given.sum():
            raise NotImplementedError("Could not run 'aten::to' with such numbers. And a long list.")
        return given.float()

    monkeypatch.setattr(calibration._Reader, "_converted", convert)
    found = read(tmp_path, {"a.pt": torch.ones(3), "b.pt": torch.zeros(3)}, ONE)
    assert len(found.items) == 1
    (text,) = found.left_out
    assert text.startswith("calibration/a.pt: it cannot be used: NotImplementedError: Could not run 'aten::to'")


def test_numbers_outside_of_a_vocabulary_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"input 'ids' has numbers from 0 to 10, outside of 0 to 9"):
        read(tmp_path, {"a.pt": (torch.tensor([1, 10, 3]), torch.zeros(2))}, TWO)


def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(ModelLoadError, match="it cannot be read"):
        read(tmp_path, {"a.pt": Runs()}, ONE)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_is_gone_or_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write(tmp_path, {"a.npy": np.zeros(3, dtype=np.float32), "b.npy": np.zeros((500, 3), dtype=np.float32)})
    monkeypatch.setattr(calibration, "FILE_SIZE_MAX", 1000)
    found = read_calibration("m.mar", tmp_path, [*names, f"{FOLDER}/gone.npy"], asked(ONE, folder=tmp_path))
    assert len(found.items) == 1
    assert [text.split(": ")[0] for text in found.left_out] == ["calibration/b.npy", "calibration/gone.npy"]


def test_of_too_many_some_of_every_part_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ITEMS_MAX", 4)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    found = read(tmp_path, {"a.npy": rows, "b.npy": rows + 100}, ONE)
    assert [item[0][0, 0].item() for item in found.items] == [0, 12, 100, 112]
    (tmp_path / FOLDER / "a.npy").unlink()


def test_without_any_file_the_text_says_where_they_go() -> None:
    with pytest.raises(ModelLoadError, match=r"folder calibration/ \(pyserve archive --calibration"):
        read_calibration("m.mar", Path(), [], asked(ONE))
