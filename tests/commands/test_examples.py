"""`pyserve example`: archives that open and answer, a digits network that is right, a picture to send."""

from __future__ import annotations

import argparse
import builtins
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyserve.archive.archive import Archive, open_archive
from pyserve.commands import example as examples
from pyserve.commands.example import add_example_arguments, digits_split, example_command, train_digits, write_example
from pyserve.context import Context
from pyserve.errors import ConfigError, InvalidModelError, ModelLoadError
from pyserve.handlers.eager import load_eager_model
from pyserve.models.sample import write_sample_picture
from pyserve.worker.handler_choice import load_handler
from pyserve.zoo import DenseNet, ResNet, seed_weights


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_example_arguments(parser)
    return parser.parse_args(words)


def eager_model(archive: Archive) -> torch.nn.Module:
    assert archive.manifest.model_file is not None and archive.weights is not None
    with archive.weights.open() as file:
        return load_eager_model(archive.model_dir, archive.manifest.model_file, file)


def answers(archive: Archive, model: Any, *values: Any) -> list[Any]:
    """What the archive's handler answers to these values, around ``model``."""
    handler = load_handler(archive)
    context = Context("m", str(archive.model_dir), archive.manifest.raw, model_yaml_config=archive.config.raw)
    handler.prepare(context)
    batch = context.for_batch([str(i) for i in range(len(values))], [[("Accept", "application/json")] for _ in values])
    handler.context = batch
    data = handler.preprocess([{"body": value} for value in values])
    with torch.inference_mode():
        return handler.postprocess(model(data))


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, float]:
    """Trained once for the whole module; with it the test that training has no side effect."""
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    thread_count = torch.get_num_threads()
    model, accuracy = train_digits()
    assert torch.equal(torch.rand(3), expected), "training must leave torch's random numbers alone"
    assert torch.get_num_threads() == thread_count
    return model, accuracy


@pytest.fixture
def store(trained: tuple[torch.nn.Module, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with digits.mar; further digits archives are made of the same network."""
    monkeypatch.setattr(examples, "train_digits", lambda: trained)
    write_example("digits", tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.slow
def test_digits_are_recognised(trained: tuple[torch.nn.Module, float]) -> None:
    model, accuracy = trained
    assert accuracy >= 0.97
    _, (held_out, digits) = digits_split()
    assert len(held_out) == 360
    with torch.inference_mode():
        assert (model(held_out).argmax(1) == digits).float().mean().item() == pytest.approx(accuracy)


@pytest.mark.slow
def test_training_twice_gives_the_same_network(trained: tuple[torch.nn.Module, float]) -> None:
    again, _ = train_digits()
    for name, value in trained[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_digits_archive_answers_right(store: Path, tmp_path: Path) -> None:
    _, (held_out, digits) = digits_split()
    with open_archive(store / "digits.mar", cache_dir=tmp_path) as archive:
        assert archive.manifest.handler == "tensor"
        assert archive.config.input is not None
        assert archive.config.input.dtype == "float32" and tuple(archive.config.input.shape) == (1, 8, 8)
        scores = answers(archive, eager_model(archive), *held_out[:100].tolist())
        raw = [bytearray(each.numpy().tobytes()) for each in held_out[:9]]
        raw_scores = answers(archive, eager_model(archive), *raw)
    assert all(len(row) == 10 for row in scores)
    assert (torch.tensor(scores).argmax(1) == digits[:100]).float().mean().item() >= 0.95
    np.testing.assert_allclose(raw_scores, scores[:9], rtol=1e-4, atol=1e-4)


def test_digits_as_torchscript_answer_alike(store: Path, tmp_path: Path) -> None:
    archive_path = write_example("digits", tmp_path, model_format="torchscript")
    _, (held_out, _) = digits_split()
    with (
        open_archive(archive_path, cache_dir=tmp_path / "cache") as archive,
        open_archive(store / "digits.mar", cache_dir=tmp_path / "cache") as eager,
    ):
        assert archive.manifest.model_file is None and archive.weights is not None
        scripted = torch.jit.load(archive.weights.open())
        values = held_out[:5].tolist()
        np.testing.assert_allclose(
            answers(archive, scripted, *values), answers(eager, eager_model(eager), *values), rtol=1e-5, atol=1e-5
        )


def test_missing_scikit_learn_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def without_sklearn(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        write_example("digits", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_random_weights_are_said_loudly_and_answer_by_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert example_command(arguments("resnet18", "--export-path", str(tmp_path))) == 0
    output = capsys.readouterr()
    assert "RANDOM WEIGHTS" in output.err and "MEANINGLESS" in output.err
    assert "resnet18-f37072fd.pth" in output.err
    assert str(tmp_path / "resnet18.mar") in output.out
    assert f"pyserve start --model-store {tmp_path} --models resnet18.mar" in output.out
    plain = bytearray(write_sample_picture(tmp_path / "a.jpg").read_bytes())
    with Image.open(tmp_path / "a.jpg") as sample:
        sample.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "b.jpg")
    turned = bytearray((tmp_path / "b.jpg").read_bytes())
    with open_archive(tmp_path / "resnet18.mar", cache_dir=tmp_path / "cache") as archive:
        first, second = answers(archive, eager_model(archive), plain, turned)
    assert len(first) == len(second) == 5
    assert first != second
    assert all(label.isdigit() for label in first)


@pytest.mark.slow
def test_given_weights_and_labels_are_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ResNet(18, 7)
    seed_weights(model, 3)
    weights = tmp_path / "mine.pth"
    torch.save(model.eval().state_dict(), weights)
    labels = tmp_path / "my-labels.json"
    labels.write_text(json.dumps({str(i): f"kind {i}" for i in range(7)}))
    path = write_example("resnet18", tmp_path / "store", weights, labels=labels)
    assert "RANDOM" not in capsys.readouterr().err
    picture = bytearray(write_sample_picture(tmp_path / "a.jpg").read_bytes())
    with open_archive(path, cache_dir=tmp_path / "cache") as archive:
        assert archive.weights is not None and archive.weights.name == "mine.pth"
        loaded = eager_model(archive)
        (answer,) = answers(archive, loaded, picture)
    assert all(label.startswith("kind ") for label in answer)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.slow
def test_densenet_file_of_2017_fits(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = DenseNet(121, 4)
    model = model.to_empty(device="cpu")
    seed_weights(model)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value
        for name, value in model.state_dict().items()
        if "num_batches_tracked" not in name
    }
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    path = write_example("densenet121", tmp_path / "store", tmp_path / "old.pth")
    pictures = torch.rand(1, 3, 64, 64)
    with open_archive(path, cache_dir=tmp_path / "cache") as archive, torch.inference_mode():
        assert torch.equal(eager_model(archive)(pictures), model.eval()(pictures))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(10, 512)}, tmp_path / "w.pth")
    with pytest.raises(ModelLoadError, match=r"w\.pth holds other weights than resnet18's"):
        write_example("resnet18", tmp_path / "store", tmp_path / "w.pth")
    with pytest.raises(ModelLoadError, match=r"missing\.pth"):
        write_example("resnet18", tmp_path / "store", tmp_path / "missing.pth")


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("resnet50", {}, "no example 'resnet50'"),
        ("digits", {"weights": Path("w.pth")}, "trained on the spot"),
        ("digits", {"labels": Path("l.json")}, "trained on the spot"),
        ("digits", {"model_format": "onnx"}, "no format 'onnx'"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(
    tmp_path: Path, name: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        write_example(name, tmp_path, **options)


def test_missing_labels_are_named(tmp_path: Path) -> None:
    torch.save(ResNet(18, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelLoadError, match=r"no\.json"):
        write_example("resnet18", tmp_path / "store", tmp_path / "w.pth", labels=tmp_path / "no.json")


@pytest.mark.slow
def test_existing_archive_is_kept_unless_forced(tmp_path: Path) -> None:
    torch.save(ResNet(18, 2).state_dict(), tmp_path / "w.pth")
    write_example("resnet18", tmp_path, tmp_path / "w.pth")
    with pytest.raises(InvalidModelError, match="resnet18"):
        write_example("resnet18", tmp_path, tmp_path / "w.pth")
    write_example("resnet18", tmp_path, tmp_path / "w.pth", force=True)


def test_sample_picture_is_always_the_same_jpeg(tmp_path: Path) -> None:
    first = write_sample_picture(tmp_path / "new" / "a.jpg").read_bytes()
    assert first == write_sample_picture(tmp_path / "b.jpg").read_bytes()
    with Image.open(tmp_path / "b.jpg") as picture:
        assert picture.format == "JPEG" and picture.size == (400, 300) and picture.mode == "RGB"
        assert len(picture.getcolors(120_000) or ()) > 1000


def test_picture_command_writes_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert example_command(arguments("picture")) == 0
    assert capsys.readouterr().out == "sample.jpg\n"
    with pytest.raises(ConfigError, match="--force"):
        example_command(arguments("picture"))
    assert example_command(arguments("picture", "--force")) == 0
