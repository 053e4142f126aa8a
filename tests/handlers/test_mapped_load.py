"""torch.load in worker processes maps what gives the same numbers when it is mapped, and reads the rest."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.handlers.mapped_load import CACHE_VARIABLE, can_be_mapped

TENSORS = {"weight": torch.arange(1000.0).view(10, 100), "large": torch.full((40_000,), 0.5), "id": torch.tensor([7])}
# Loads each file that is named, in every way, and says what came of it.
LOADER = """
import io, json, sys
import torch
from pyserve.handlers.mapped_load import map_loads

map_loads()
map_loads()
path = sys.argv[1]
loads = [lambda: torch.load(path), lambda: torch.load(open(path, "rb")), lambda: torch.load(path, "cpu"),
         lambda: torch.load(io.BytesIO(open(path, "rb").read()), weights_only=True)]
print(json.dumps([{name: [value.sum().item(), list(value.shape)] for name, value in load().items()} for load in loads]))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache" / "weights"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def saved(path: Path) -> Path:
    torch.save(TENSORS, path)
    return path


def packed(path: Path, compression: int) -> Path:
    """What `saved` gives, taken apart and put together by another program."""
    file = io.BytesIO()
    torch.save(TENSORS, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return path


def legacy(path: Path) -> Path:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    return path


def test_files_of_torch_save_in_the_cache_are_mapped(cache: Path) -> None:
    assert can_be_mapped(saved(cache / "weights.pth"))


@pytest.mark.parametrize("kind", ["compressed", "elsewhere put together", "legacy", "another file", "gone", "cut off"])
def test_others_are_read(cache: Path, kind: str) -> None:
    path = cache / "weights.pth"
    if kind == "compressed":
        packed(path, zipfile.ZIP_DEFLATED)
    elif kind == "elsewhere put together":
        packed(path, zipfile.ZIP_STORED)
    elif kind == "legacy":
        legacy(path)
    elif kind == "another file":
        path.write_bytes(b"PK\x03\x04 and no more")
    elif kind == "cut off":
        path.write_bytes(saved(path).read_bytes()[:-30])
    assert not can_be_mapped(path)


def test_a_file_that_others_may_write_to_is_read(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "weights.pth")
    assert not can_be_mapped(path)
    monkeypatch.delenv(CACHE_VARIABLE)
    assert not can_be_mapped(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saved", "compressed", "stored", "legacy"])
def test_every_file_and_every_way_to_load_it_gives_its_numbers(cache: Path, kind: str) -> None:
    path = cache / "weights.pth"
    if kind == "saved":
        saved(path)
    elif kind == "legacy":
        legacy(path)
    else:
        packed(path, zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED)
    told = subprocess.run([sys.executable, "-c", LOADER, str(path)], capture_output=True, text=True, check=True).stdout
    wanted = {name: [value.sum().item(), list(value.shape)] for name, value in TENSORS.items()}
    assert json.loads(told) == [wanted] * 4


# Loads the file, changes every number of it in place, says what it has then, and waits.
WRITER = """
import json, sys
from pathlib import Path
from typing import Any
import torch
from pyserve.handlers.loading import load_torchscript
from pyserve.handlers.mapped_load import map_loads

map_loads()
path = sys.argv[1]
tensors = load_torchscript(Path(path), None).state_dict() if path.endswith(".pt") else torch.load(path)
before = sum(value.sum().item() for value in tensors.values())
with torch.no_grad():
    for value in tensors.values():
        value.add_(1)
after = sum(value.sum().item() for value in tensors.values())
print(json.dumps([before, after]), flush=True)
sys.stdin.read()
"""


class Large(torch.nn.Module):
    """With weights that are worth sharing, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1500, 1500), 0.25))
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.seen.sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state dict", "torchscript"])
def test_a_process_that_writes_to_its_weights_changes_nobody_elses(cache: Path, kind: str) -> None:
    path = cache / ("model.pt" if kind == "torchscript" else "weights.pth")
    model = Large().eval()
    if kind == "torchscript":
        torch.jit.script(model).save(str(path))
    else:
        torch.save(model.state_dict(), path)
    first_bytes = path.read_bytes()
    with ExitStack() as stack:
        told = []
        for _ in range(2):  # the second begins while the first has its weights changed
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", WRITER, str(path)], **pipes))
            stack.callback(process.kill)
            told.append(json.loads(process.stdout.readline()))  # type: ignore[union-attr]
    assert told == [[562_500.0, 562_500.0 + 1500 * 1500 + 4]] * 2
    assert path.read_bytes() == first_bytes
    kept = list((cache / "weights").glob("*.weights"))
    assert len(kept) == (kind == "torchscript"), "only what was read, not mapped, has a file of its own"
    for each in kept:
        shared = torch.frombuffer(bytearray(each.read_bytes()), dtype=torch.float32)
        assert shared.sum().item() == 562_500.0
