"""What is made of a folder without a manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pyserve.archive.archive import has_manifest, open_archive
from pyserve.archive.folder_manifest import infer_manifest
from pyserve.archive.given import Given, give
from pyserve.errors import InvalidModelError
from tests.support.handler_archives import Doubler

FUNCTION = "def handle(data, context):\n    return data\n"
CLASS = "class Mine:\n    def handle(self, data, context):\n        return data\n"
DERIVED = "from ts.torch_handler.image_classifier import ImageClassifier\n\n\nclass Mine(ImageClassifier):\n    pass\n"
NETWORK = "import torch\n\n\nclass Net(torch.nn.Module):\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "my model"
    made.mkdir()
    return made


def inferred(folder: Path, **files: str) -> dict[str, str]:
    for name, text in files.items():
        (folder / name.replace("__", ".").replace("_", "-")).write_text(text)
    model: dict[str, str] = json.loads(infer_manifest(folder).text)["model"]
    return model


def test_all_that_belongs_to_a_model_is_found(folder: Path) -> None:
    (folder / "weights.pth").write_bytes(b"state")
    (folder / "requirements.txt").touch()
    model = inferred(folder, handler__py=FUNCTION, other__py=FUNCTION, model__py=NETWORK, model_config__yaml="")
    assert model == {
        "modelName": "my_model", "modelVersion": "1.0", "handler": "handler.py", "serializedFile": "weights.pth",
        "modelFile": "model.py", "configFile": "model-config.yaml", "requirementsFile": "requirements.txt",
    }  # fmt: skip


@pytest.mark.parametrize("source", [FUNCTION, CLASS, DERIVED])
def test_only_file_with_a_handler_is_the_handler(folder: Path, source: str) -> None:
    assert inferred(folder, serve__py=source, model__py=NETWORK)["handler"] == "serve.py"


def test_torchscript_needs_no_model_file(folder: Path) -> None:
    torch.jit.script(Doubler()).save(str(folder / "model.pt"))
    assert "modelFile" not in inferred(folder, handler__py=FUNCTION, model__py=NETWORK)


def test_what_is_ambiguous_is_named_with_the_mend(folder: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"a\.py, b\.py could each be the handler; name one of them handler"):
        inferred(folder, a__py=FUNCTION, b__py=CLASS)
    (folder / "one.pt").touch()
    (folder / "two.pt").touch()
    with pytest.raises(InvalidModelError, match=r"one\.pt, two\.pt could each be the weights; name the one model\.pt"):
        inferred(folder, handler__py=FUNCTION)
    (folder / "model.pt").touch()
    assert inferred(folder)["serializedFile"] == "model.pt"


def test_folder_without_code_says_what_to_write(folder: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"write one in handler\.py, or say what is what with `pyserve archive"):
        inferred(folder, model__py=NETWORK)


def test_folder_opens_with_its_manifest_and_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "handler.py").write_text(FUNCTION)
    assert not has_manifest(folder)
    with open_archive(folder) as archive:
        assert archive.manifest.raw is None
    monkeypatch.setenv("PYSERVE_GIVEN", "{}")  # put back at the end
    before = open_archive(folder, manifest=infer_manifest(folder).text)
    give(folder, Given(manifest=infer_manifest(folder).text.decode()))
    for archive in (before, open_archive(folder)):
        assert (archive.manifest.model_name, archive.model_dir) == ("my_model", folder.resolve())
        assert list(archive.files) == ["handler.py"]
        archive.close()
    assert os.listdir(folder) == ["handler.py"]


def test_folder_with_a_manifest_keeps_it(folder: Path) -> None:
    (folder / "MAR-INF").mkdir()
    (folder / "handler.py").write_text(FUNCTION)
    manifest = {"model": {"modelName": "own", "handler": "handler.py"}}
    (folder / "MAR-INF/MANIFEST.json").write_text(json.dumps(manifest))
    assert has_manifest(folder)
    with open_archive(folder) as archive:
        assert archive.manifest.model_name == "own"
