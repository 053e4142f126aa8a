"""BaseHandler on its own, models built from archives, and finding the handler an archive asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.archive.archive import open_archive
from pyserve.archive.manifest import BUILTIN_HANDLERS
from pyserve.archive.packing import ArchiverConfig, write_archive
from pyserve.context import Context
from pyserve.handler import BUILT_IN, NOT_BUILT_IN, InputError, ModelLoadError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.eager import load_eager_model
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.skipped_init import SkipRandomFill
from pyserve.worker.handler_choice import load_handler, python_lane_reason


def context_for(folder: Path, model: Mapping[str, str] | None = None, **config: Any) -> Context:
    return Context("m", str(folder), {"model": dict(model or {})}, model_yaml_config=config)


def batch_of(context: Context, *headers: Mapping[str, str]) -> Context:
    return context.for_batch([f"id-{i}" for i in range(len(headers))], [list(each.items()) for each in headers])


# --- BaseHandler stand-alone ------------------------------------------------------------------------------------------

MODEL_FILE = """
import torch
from parts import DOUBLE

class Doubler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, numbers):
        return DOUBLE * self.linear(numbers)
"""
MODEL = {"modelFile": "model.py", "serializedFile": "weights.pth"}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL_FILE)
    (tmp_path / "parts.py").write_text("DOUBLE = 2.0\n")
    torch.save({"linear.weight": torch.eye(2), "linear.bias": torch.ones(2)}, tmp_path / "weights.pth")
    return tmp_path


def test_eager_archive_answers_stand_alone(model_dir: Path) -> None:
    handler = BaseHandler()
    context = context_for(model_dir, MODEL)
    handler.initialize(context)
    assert handler.initialized and not handler.model.training
    assert handler.manifest == {"model": MODEL} and handler.device == torch.device("cpu")
    assert handler.handle([{"body": [1, 2.0]}, {"data": [0, 0]}], batch_of(context, {}, {})) == [[4.0, 6.0], [2.0, 2.0]]


def test_torchscript_archive_answers_stand_alone(model_dir: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(str(model_dir / "relu.pt"))
    handler = BaseHandler()
    context = context_for(model_dir, {"serializedFile": "relu.pt"})
    handler.initialize(context)
    assert handler.handle([{"body": [-1.0, 2.0]}], batch_of(context, {})) == [[0.0, 2.0]]


def test_model_files_of_two_archives_do_not_mix(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "model.py").write_text(MODEL_FILE)
    (other / "parts.py").write_text("DOUBLE = 20.0\n")
    path_before = list(sys.path)
    numbers = torch.zeros(1, 2)
    weights = model_dir / "weights.pth"
    assert load_eager_model(model_dir, "model.py", weights, "cpu")(numbers).tolist() == [[2.0, 2.0]]
    assert load_eager_model(other, "model.py", weights, "cpu")(numbers).tolist() == [[20.0, 20.0]]
    assert "parts" not in sys.modules and "model" not in sys.modules
    assert sys.path == path_before


def test_random_initialisation_is_skipped_for_parameters_only() -> None:
    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.free = torch.nn.Parameter(torch.zeros(4))
            torch.nn.init.xavier_normal_(self.linear.weight)
            torch.nn.init.normal_(self.free)
            self.register_buffer("noise", torch.zeros(4).uniform_(1, 2), persistent=False)
            self.norm = torch.nn.BatchNorm1d(3)

    torch.manual_seed(7)
    expected = torch.zeros(4).uniform_(1, 2)
    torch.manual_seed(7)
    with SkipRandomFill():
        parts = Parts()
    assert torch.equal(parts.get_buffer("noise"), expected)  # no random number was drawn before
    assert parts.norm.weight.tolist() == [1.0] * 3


def test_weights_may_come_from_an_open_file(model_dir: Path) -> None:
    with (model_dir / "weights.pth").open("rb") as file:
        model = load_eager_model(model_dir, "model.py", file)
    assert model(torch.zeros(1, 2)).tolist() == [[2.0, 2.0]]


def test_weights_in_the_format_of_2017_load(model_dir: Path) -> None:
    state = torch.load(model_dir / "weights.pth", weights_only=True)
    torch.save(state, model_dir / "weights.pth", _use_new_zipfile_serialization=False)
    assert load_eager_model(model_dir, "model.py", model_dir / "weights.pth")(torch.zeros(1, 2)).tolist() == [[2, 2]]


def test_weights_of_another_precision_become_the_models(model_dir: Path) -> None:
    torch.save({"linear.weight": torch.eye(2).half(), "linear.bias": torch.ones(2).half()}, model_dir / "weights.pth")
    model = load_eager_model(model_dir, "model.py", model_dir / "weights.pth")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def spoil(name: str, content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, (str, bytes)):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            torch.save(content, folder / name)

    return write


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (spoil("model.py", None), "model file model.py is not in the archive"),
        (spoil("model.py", "import missing_module_xyz"), "missing_module_xyz"),
        (spoil("model.py", "def f(: pass"), "SyntaxError"),
        (spoil("model.py", "x = 1"), "exactly one class"),
        (spoil("model.py", "class A: pass\nclass B: pass"), "defines: A, B"),
        (spoil("model.py", "class A: pass"), "not a torch.nn.Module"),
        (spoil("model.py", "class A:\n def __init__(self, n): pass"), "without arguments"),
        (spoil("weights.pth", None), "weights.pth is not in the archive"),
        (spoil("weights.pth", b"hello"), "weights.pth"),
        (spoil("weights.pth", b""), "weights.pth"),
        (spoil("weights.pth", {"linear.weight": torch.eye(2)}), "linear.bias"),
        (spoil("weights.pth", {"linear.weight": torch.eye(3), "linear.bias": torch.ones(2)}), "size mismatch"),
        (spoil("weights.pth", {"module.linear.weight": torch.eye(2)}), "DataParallel"),
        (spoil("weights.pth", {"epoch": 3, "state_dict": {}}), "save its member 'state_dict'"),
        (spoil("weights.pth", [1, 2]), "holds a list"),
        (spoil("weights.pth", torch.nn.Linear(2, 2)), "torch.save(model.state_dict(), path)"),
    ],
)
def test_archive_that_does_not_fit_together_says_why(
    model_dir: Path, damage: Callable[[Path], None], text: str
) -> None:
    damage(model_dir)
    with pytest.raises(ModelLoadError) as caught:
        BaseHandler().initialize(context_for(model_dir, MODEL))
    assert text in caught.value.message
    assert str(model_dir) not in caught.value.message


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({}, "names no weights"),
        ({"serializedFile": "weights.pth"}, "weights.pth is not a TorchScript file"),
        ({"serializedFile": "m.bin"}, "m.bin: this handler loads TorchScript"),
        ({"serializedFile": "gone.pt"}, "gone.pt is not in the archive"),
        ({"serializedFile": "gone.pt2"}, "gone.pt2 is not in the archive"),
        ({"serializedFile": "weights.pth", "modelFile": "gone.py"}, "gone.py is not in the archive"),
    ],
)
def test_weights_without_a_way_to_run_them_are_named(model_dir: Path, model: dict[str, str], text: str) -> None:
    handler = BaseHandler()
    with pytest.raises(ModelLoadError, match=text):
        handler.initialize(context_for(model_dir, model))
    assert not handler.initialized


@pytest.mark.parametrize("value", [[[1, 2], [3]], "text", b"bytes", None, {"a": 1}, ["x"], [10**400]])
def test_base_handler_takes_regular_numbers_only(tmp_path: Path, value: Any) -> None:
    handler = BaseHandler()
    handler.prepare(context_for(tmp_path))
    with pytest.raises(InputError):
        handler.preprocess([{"body": value}])


# --- which handler an archive asks for --------------------------------------------------------------------------------


def archive_with(tmp_path: Path, handler: str, **files: str) -> Path:
    """A folder archive, its manifest written by hand so that it may name what a packer would refuse."""
    folder = tmp_path / "m"
    (folder / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": "m", "modelVersion": "1.0", "handler": handler}}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["image_classifier", "image_classifier.py", "ts.torch_handler.image_classifier"])
def test_built_in_handler_is_found_by_name(tmp_path: Path, name: str) -> None:
    with open_archive(archive_with(tmp_path, name), cache_dir=tmp_path / "cache") as archive:
        assert type(load_handler(archive)) is ImageClassifier


@pytest.mark.slow
def test_every_built_in_handler_loads_from_a_packed_archive(tmp_path: Path, model_dir: Path) -> None:
    for name, built_in in BUILT_IN.items():
        packed = write_archive(
            ArchiverConfig(
                model_name=name,
                handler=name,
                model_file=str(model_dir / "model.py"),
                serialized_file=str(model_dir / "weights.pth"),
                export_path=str(tmp_path / "store"),
            )
        )
        with open_archive(packed, cache_dir=tmp_path / "cache") as archive:
            assert type(load_handler(archive)).__name__ == built_in.class_name


@pytest.mark.parametrize("name", ["my_handler", "my_handler.py:entry", "image_classifier"])
def test_own_handler_code_does_not_run_in_the_server(tmp_path: Path, name: str) -> None:
    files = {name.partition(".")[0]: "def handle(data, context): return data"}
    with open_archive(archive_with(tmp_path, name, **files), cache_dir=tmp_path / "cache") as archive:
        assert "own" in python_lane_reason(archive)
        with pytest.raises(ModelLoadError, match=r"own.*python lane.*base_handler, densenet_handler"):
            load_handler(archive)


@pytest.mark.parametrize("name", sorted(NOT_BUILT_IN))
def test_handler_of_torchserve_that_needs_a_package_names_it(tmp_path: Path, name: str) -> None:
    with open_archive(archive_with(tmp_path, name), cache_dir=tmp_path / "cache") as archive:
        assert not python_lane_reason(archive)
        with pytest.raises(ModelLoadError, match=f"'{name}', which is not built in.*Install {NOT_BUILT_IN[name]}"):
            load_handler(archive)


def test_a_manifest_may_name_every_handler_of_torchserve() -> None:
    assert set(BUILTIN_HANDLERS) == set(BUILT_IN) | set(NOT_BUILT_IN)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("image_classifier", ""),
        ("ts.torch_handler.image_segmenter", ""),
        ("text_classifier", "text_classifier calls the model in Python"),
        ("object_detector.py", "object_detector calls the model in Python"),
        ("json.decoder:scanstring", "json.decoder is a module, not a built-in handler"),
    ],
)
def test_lane_follows_from_the_handler(tmp_path: Path, name: str, reason: str) -> None:
    with open_archive(archive_with(tmp_path, name), cache_dir=tmp_path / "cache") as archive:
        assert python_lane_reason(archive) == reason
        assert python_lane_reason(archive, "tensor") == ""


def test_missing_handler_file_is_named_with_the_nearest_name(tmp_path: Path) -> None:
    packed = archive_with(tmp_path, "image_classifier")
    with open_archive(packed, cache_dir=tmp_path / "cache") as archive:
        object.__setattr__(archive.manifest, "handler", "image_clasifier.py")
        with pytest.raises(ModelLoadError) as caught:
            load_handler(archive)
    for part in ("image_clasifier.py", "did you mean 'image_classifier'", "--handler image_classifier"):
        assert part in caught.value.message
