"""``.safetensors`` weights are read as they were written, in every dtype, and damaged files are refused by name."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.handler import ModelLoadError
from pyserve.handlers import shared_weights
from pyserve.handlers.eager import load_eager_model
from pyserve.handlers.loading import kind_of
from pyserve.handlers.safetensors_file import looks_like_safetensors, read_safetensors
from tests.support.packing import EAGER
from tests.support.safetensors import header_of, safetensors_bytes, save_safetensors

STATE = {
    "three bytes first, so that nothing behind is aligned": torch.tensor([True, False, True]),
    "a": torch.arange(12.0).reshape(3, 4), "half": torch.randn(5).half(), "brain": torch.randn(2, 2).bfloat16(),
    "none": torch.empty(0, 3), "one": torch.tensor(7), "double": torch.randn(3).double(),
}  # fmt: skip
TIED = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.table(x))
"""


def test_every_tensor_is_as_it_was_written(tmp_path: Path) -> None:
    path = save_safetensors(STATE, tmp_path / "w.safetensors")
    for source in (path, io.BytesIO(path.read_bytes())):
        found = read_safetensors(source, "w")
        assert list(found) == list(STATE)
        for name, tensor in STATE.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[name], tensor)
            assert found[name].data_ptr() % 64 == 0 or not tensor.numel()
    path.unlink()  # nothing is mapped any more
    assert torch.equal(found["a"], STATE["a"])


def changed(name: str, **fields: Any) -> Any:
    header = header_of(STATE)
    header[name] = {**header[name], **fields}
    return header


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", r"not a safetensors file \(0 bytes\)"),
        (b"\xff" * 60, "not a safetensors file"),
        (safetensors_bytes(STATE)[:100], r"cut short: its header has \d+ bytes, and 92 are there"),
        (safetensors_bytes(STATE)[:-1], r"cut short: 'double' ends at byte \d+, and the file has \d+ bytes"),
        (safetensors_bytes(STATE) + b"\0", "1 bytes belong to no tensor"),
        (safetensors_bytes(STATE, [1]), "its header is a list"),
        ((20).to_bytes(8, "little") + b"{not json at all....", "its header is not JSON"),
        (safetensors_bytes(STATE, {"a": 3}), "does not say dtype, shape and place of 'a'"),
        (safetensors_bytes(STATE, changed("a", dtype="F3")), "'a' is of dtype F3"),
        (safetensors_bytes(STATE, changed("a", shape=[3, -4])), "shape or place of 'a' is not of whole numbers"),
        (safetensors_bytes(STATE, changed("a", shape=[True, 12])), "shape or place of 'a' is not of whole numbers"),
        (safetensors_bytes(STATE, changed("a", shape=[1 << 62, 1 << 62])), "and has 48"),
        (safetensors_bytes(STATE, changed("a", data_offsets=[0, 48])), "begins at byte"),
        (b"PK\3\4" + b"\0" * 60, r"was written by torch.save, not as safetensors; rename it to end in \.pth"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_what_is_wrong(data: bytes, text: str) -> None:
    with pytest.raises(ModelLoadError, match=text) as caught:
        read_safetensors(io.BytesIO(data), "w.safetensors")
    assert caught.value.message.startswith("w.safetensors")


def test_whatever_is_in_a_file_it_is_read_or_refused(seed: int) -> None:
    numbers = random.Random(seed)
    good = safetensors_bytes(STATE)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(numbers.randint(1, 4)):
            data[numbers.randrange(min(len(data), 600))] = numbers.randrange(256)
        try:
            read_safetensors(io.BytesIO(data[: numbers.randint(0, len(data))]), "w")
        except ModelLoadError:
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(code: str = EAGER) -> Path:
        (tmp_path / "model.py").write_text(code)
        return tmp_path

    return make


def test_an_eager_model_is_filled_by_names(folder: Callable[..., Path]) -> None:
    state = {"linear.weight": torch.randn(2, 4), "linear.bias": torch.randn(2)}
    path = save_safetensors(state, folder() / "w.safetensors")
    x = torch.randn(3, 4)
    expected = torch.nn.functional.linear(x, *state.values())
    for plain in (False, True):
        assert torch.equal(load_eager_model(path.parent, "model.py", path, plain=plain)(x), expected)
    with path.open("rb") as file:
        assert torch.equal(load_eager_model(path.parent, "model.py", file, name=path.name)(x), expected)


def test_the_content_counts_where_the_name_says_pth(folder: Callable[..., Path]) -> None:
    state = {"linear.weight": torch.randn(2, 4), "linear.bias": torch.randn(2)}
    path = save_safetensors(state, folder() / "w.pth")
    assert looks_like_safetensors(path)
    assert torch.equal(load_eager_model(path.parent, "model.py", path).linear.bias, state["linear.bias"])  # type: ignore[union-attr]


def test_names_that_do_not_fit_are_named(folder: Callable[..., Path]) -> None:
    path = save_safetensors({"linear.weight": torch.randn(2, 4)}, folder() / "w.safetensors")
    with pytest.raises(ModelLoadError, match=r"w\.safetensors does not fit Net in model\.py: .*linear\.bias"):
        load_eager_model(path.parent, "model.py", path)


@pytest.mark.parametrize("plain", [False, True])
def test_names_left_out_of_tied_weights_are_filled_in(folder: Callable[..., Path], plain: bool) -> None:
    table = torch.randn(6, 4)
    path = save_safetensors({"table.weight": table}, folder(TIED) / "w.safetensors")
    model = load_eager_model(path.parent, "model.py", path, plain=plain)
    assert torch.equal(model(torch.tensor([2])), table[2:3] @ table.T)


def test_an_untied_weight_is_missed_all_the_same(folder: Callable[..., Path]) -> None:
    path = save_safetensors(
        {"table.weight": torch.randn(6, 4)},
        folder(TIED.replace("self.head.weight = self.table.weight", "pass")) / "w.safetensors",
    )
    with pytest.raises(ModelLoadError, match=r"head\.weight"):
        load_eager_model(path.parent, "model.py", path)


def test_worker_processes_share_them(
    folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(shared_weights.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(shared_weights, "SHARED_SIZE_MIN", 1)
    state = {"linear.weight": torch.randn(2, 4), "linear.bias": torch.randn(2)}
    path = save_safetensors(state, folder() / "w.safetensors")
    model = load_eager_model(path.parent, "model.py", path)
    [kept] = (tmp_path / "cache").glob("*.weights")
    maps = Path("/proc/self/maps").read_text()
    assert kept.name in maps
    assert torch.equal(model.linear.weight, state["linear.weight"])  # type: ignore[union-attr]


def test_weights_without_a_model_file_say_what_to_pack(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"w\.safetensors holds weights only; pack .* with --model-file"):
        kind_of(tmp_path / "w.safetensors")


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_length_that_begins_like_another_format_is_no_other_format(tmp_path: Path, length: int) -> None:
    state = {"a": torch.ones(2)}
    content = safetensors_bytes(state)
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip()
    padded = length.to_bytes(8, "little") + header.ljust(length) + content[-8:]
    (tmp_path / "w.safetensors").write_bytes(padded)
    assert read_safetensors(tmp_path / "w.safetensors", "w")["a"].tolist() == [1, 1]
