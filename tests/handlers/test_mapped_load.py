"""torch.load in worker processes maps originals of the cache where that is as good as reading, and reads the rest."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.model_folder import Originals, file_identity
from pyserve.handlers import mapped_load
from pyserve.handlers.mapped_load import mapped_file, original_of

TENSORS = {"weight": torch.arange(1000.0).view(10, 100), "large": torch.full((40_000,), 0.5), "id": torch.tensor([7])}


class Network(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def saved(path: Path) -> None:
    torch.save(TENSORS, path)


def packed(compression: int) -> Callable[[Path], None]:
    """What `saved` gives, taken apart and put together by another program."""

    def write(path: Path) -> None:
        file = io.BytesIO()
        torch.save(TENSORS, file)
        with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w", compression) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))

    return write


def legacy(path: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


def cut_off(path: Path) -> None:
    saved(path)
    path.write_bytes(path.read_bytes()[:-30])


def another_file(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and no more")


def torchscript(path: Path) -> None:
    torch.jit.script(Network()).save(str(path))


WRITERS: dict[str, Callable[[Path], None]] = {
    "saved": saved, "compressed": packed(zipfile.ZIP_DEFLATED), "put together elsewhere": packed(zipfile.ZIP_STORED),
    "legacy": legacy, "another file": another_file, "cut off": cut_off, "torchscript": torchscript,
}  # fmt: skip


class Folder:
    """A model's folder with a copy of a file of the cache."""

    def __init__(self, root: Path, write: Callable[[Path], None], name: str = "weights.pth"):
        self.original = root / "cache" / name
        self.copy = root / "model" / name
        for path in (self.original, self.copy):
            path.parent.mkdir()
        write(self.original)
        shutil.copyfile(self.original, self.copy)

    @property
    def originals(self) -> Originals:
        identities = file_identity(self.original), file_identity(self.copy)
        return {os.path.realpath(self.copy): (str(self.original), *identities)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    made = Folder(tmp_path, saved)
    monkeypatch.setattr(mapped_load, "_originals", made.originals)
    return made


@pytest.mark.parametrize("kind", WRITERS)
def test_only_files_whose_numbers_lie_as_in_memory_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = Folder(tmp_path, WRITERS[kind])
    monkeypatch.setattr(mapped_load, "_originals", folder.originals)
    assert original_of(folder.copy) == folder.original
    assert mapped_file(folder.copy) == (folder.original if kind == "saved" else None)


@pytest.mark.parametrize("what", ["str", "relative", "link"])
def test_the_file_is_known_under_all_its_names(folder: Folder, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(folder.copy.parent)
    link = folder.copy.with_name("link.pth")
    link.symlink_to("weights.pth")
    assert mapped_file({"str": str(folder.copy), "relative": "./weights.pth", "link": link}[what]) == folder.original


def changed_in_place(folder: Folder) -> None:
    with folder.copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(folder.copy, ns=(folder.copy.stat().st_atime_ns, folder.originals[str(folder.copy)][2][3]))


def replaced(folder: Folder) -> None:
    saved(folder.copy.with_name("other"))
    folder.copy.with_name("other").replace(folder.copy)


def gone(folder: Folder) -> None:
    folder.copy.unlink()


def original_changed(folder: Folder) -> None:
    with folder.original.open("ab") as file:
        file.write(b"x")


def original_gone(folder: Folder) -> None:
    folder.original.unlink()


@pytest.mark.parametrize("change", [changed_in_place, replaced, gone, original_changed, original_gone])
def test_a_file_that_was_written_to_is_read(folder: Folder, change: Callable[[Folder], None]) -> None:
    assert mapped_file(folder.copy) == folder.original
    change(folder)
    assert original_of(folder.copy) is None
    assert mapped_file(folder.copy) is None


def test_other_files_are_read(folder: Folder, tmp_path: Path) -> None:
    saved(tmp_path / "weights.pth")
    assert mapped_file(tmp_path / "weights.pth") is None
    assert mapped_file(folder.original) is None


# --- in a process of its own ------------------------------------------------------------------------------------------

# Sets up what a worker process has, then runs what is given: {file} is mapped, {original} says whether it is.
SET_UP = """
import io, json, os, pathlib, pickle, sys, warnings
import torch
from pyserve.handlers.mapped_load import map_loads

path, original, originals = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
map_loads(originals)
map_loads(originals)
is_mapped = lambda: original in open("/proc/self/maps").read()
"""


def ran(folder: Folder, code: str) -> Any:
    told = subprocess.run(
        [sys.executable, "-c", SET_UP + code, str(folder.copy), str(folder.original), json.dumps(folder.originals)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


LOADS = """
def kept(load):
    try:
        value = load()
    except Exception as error:
        return [type(error).__name__, is_mapped()]
    sums = [each.float().sum().item() for each in value.values()] if isinstance(value, dict) else type(value).__name__
    return [sums, is_mapped()]

torch.save({"a": torch.ones(3)}, "own.pth", _use_new_zipfile_serialization=False)
meta = lambda value: [str(value["large"].device)]
print(json.dumps({
    "path": kept(lambda: torch.load(path)),
    "keyword": kept(lambda: torch.load(f=path, map_location="cpu")),
    "Path": kept(lambda: torch.load(pathlib.Path(path), torch.device("cpu"), weights_only=True)),
    "callable": kept(lambda: torch.load(path, lambda storage, place: storage)),
    "dict": kept(lambda: torch.load(path, {"cpu": "cpu"})),
    "pickle_module": kept(lambda: torch.load(path, None, pickle, weights_only=False)),
    "encoding": kept(lambda: torch.load(path, weights_only=False, encoding="latin1")),
    "mmap": kept(lambda: torch.load(path, mmap=True)),
    "no mmap": kept(lambda: torch.load(path, mmap=False)),
    "open file": kept(lambda: torch.load(open(path, "rb"))),
    "bytes": kept(lambda: torch.load(io.BytesIO(open(path, "rb").read()))),
    "legacy": kept(lambda: torch.load("own.pth")),
    "gone": kept(lambda: torch.load(path + "x")),
    "bad keyword": kept(lambda: torch.load(path, nonsense=1, weights_only=False)),
    "serialization": kept(lambda: torch.serialization.load(path)),
    "meta": torch.load(path, map_location="meta")["large"].device.type,
    "pickled": pickle.loads(pickle.dumps(torch.load)) is torch.load,
    "name": [torch.load.__name__, torch.load.__module__],
}))
"""


def test_every_way_to_load_gives_what_torch_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path, saved)
    monkeypatch.chdir(folder.copy.parent)
    told = ran(folder, LOADS)
    sums = [value.float().sum().item() for value in TENSORS.values()]
    mapped = ("path", "keyword", "Path", "callable", "dict", "pickle_module", "encoding", "serialization")
    read = ("mmap", "no mmap", "open file", "bytes")
    for way in (*mapped, *read):
        assert told[way] == [sums, way in mapped], way
    assert told["legacy"] == [[3.0], False]
    assert told["gone"] == ["FileNotFoundError", False]
    assert told["bad keyword"][0] == "TypeError"
    assert told["meta"] == "meta"
    assert told["pickled"] is True
    assert told["name"] == ["load", "torch.serialization"]


SETTINGS = """
from torch.utils.serialization import config

told = {}
with torch.device("meta"):
    value = torch.load(path)
    told["device"] = [is_mapped(), value["large"].device.type]
    del value
with torch.serialization.skip_data():
    value = torch.load(path)
    told["skip_data"] = list(value["large"].shape)
    del value
with torch.serialization.set_default_mmap_options(2 if os.name == "nt" else 1):  # MAP_SHARED
    value = torch.load(path)
    told["shared"] = is_mapped()
    value["large"].add_(1)
    del value
config.load.mmap = True
value = torch.load(path)
told["own mmap"] = [is_mapped(), path in open("/proc/self/maps").read()]
print(json.dumps(told))
"""


def test_what_a_handler_sets_in_torch_is_followed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, saved)
    before = folder.original.read_bytes(), folder.copy.read_bytes()
    told = ran(folder, SETTINGS)
    assert told["device"][0] is False
    assert told["skip_data"] == [40_000]
    assert told["shared"] is False
    assert told["own mmap"] == [False, True], "the handler's own file, as it asked for"
    assert (folder.original.read_bytes(), folder.copy.read_bytes()) == before


OVERWRITES = """
first, second = torch.load(path), torch.load(path)
told = [is_mapped()]
{change}
told.append([first["large"].sum().item(), second["weight"].sum().item()])
first["large"].add_(1)
told.append([first["large"].sum().item(), second["large"].sum().item()])
del first, second
try:
    told.append(torch.load(path)["large"].sum().item())
except Exception as error:
    told.append(type(error).__name__)
told.append(is_mapped())
print(json.dumps(told))
"""


@pytest.mark.parametrize(
    ("change", "then"),
    [
        ('torch.save({"large": torch.full((3,), 5.0)}, path)', 15.0),
        ('open(path, "wb").close()', "EOFError"),
        ("os.truncate(path, 100)", "RuntimeError"),
        ("os.unlink(path)", "FileNotFoundError"),
        ('os.rename(path, path + ".old")', "FileNotFoundError"),
    ],
)
def test_loaded_weights_stay_whatever_becomes_of_the_file(tmp_path: Path, change: str, then: Any) -> None:
    told = ran(Folder(tmp_path, saved), OVERWRITES.format(change=change))
    assert told == [True, [20_000.0, 499_500.0], [60_000.0, 20_000.0], then, False]


# Loads the file, changes every number of it in place, says what it has then, and waits.
WRITER = """
from pathlib import Path
from pyserve.handlers.loading import load_torchscript

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
def test_a_process_that_writes_to_its_weights_changes_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("PYSERVE_WEIGHTS_CACHE", str(tmp_path / "shared"))
    model = Large().eval()

    def write(path: Path) -> None:
        if kind == "torchscript":
            torch.jit.script(model).save(str(path))
        else:
            torch.save(model.state_dict(), path)

    name = "model.pt" if kind == "torchscript" else "weights.pth"
    folder = Folder(tmp_path, write, name)
    other = tmp_path / "other" / name
    other.parent.mkdir()
    shutil.copyfile(folder.original, other)
    original = folder.original
    first_bytes = original.read_bytes()
    with ExitStack() as stack:
        told = []
        for copy in (folder.copy, other):  # the second begins while the first has its weights changed
            originals = {str(copy): (str(original), file_identity(original), file_identity(copy))}
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            arguments = [sys.executable, "-c", SET_UP + WRITER, str(copy), str(original), json.dumps(originals)]
            process = stack.enter_context(subprocess.Popen(arguments, **pipes))
            stack.callback(process.kill)
            told.append(json.loads(process.stdout.readline()))  # type: ignore[union-attr]
    assert told == [[562_500.0, 562_500.0 + 1500 * 1500 + 4]] * 2
    assert original.read_bytes() == first_bytes
    kept = list((tmp_path / "shared").glob("*.weights"))
    assert len(kept) == (kind == "torchscript"), "of two models of one archive; what was mapped has no file of its own"
    for each in kept:
        shared = torch.frombuffer(bytearray(each.read_bytes()), dtype=torch.float32)
        assert shared.sum().item() == 562_500.0
