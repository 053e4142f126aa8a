"""Pictures as bytes, which an accelerator makes the numbers of: the same ones, and only where no other code looks."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyserve.context import Context
from pyserve.handlers.image import ImageNetTransform, RgbTransform, open_picture
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.image_segmenter import ImageSegmenter
from pyserve.handlers.object_detector import ObjectDetector
from pyserve.handlers.pixels import IDENTITY, Normalization, every_byte
from pyserve.handlers.vision_handler import VisionHandler
from tests.support.pictures import picture_file, picture_files

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")
OWN = ImageNetTransform(40, 32, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))


def prepared(handler: VisionHandler, folder: Path) -> Any:
    handler.prepare(Context("m", str(folder), {"model": {}}, model_yaml_config={}))
    return handler


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [ImageNetTransform(), OWN, RgbTransform()], ids=["imagenet", "own", "rgb"])
def test_bytes_become_the_numbers_that_the_transform_makes(transform: Any) -> None:
    for file in picture_files():
        picture = open_picture(file)
        pixels = transform.pixels(picture)
        assert pixels.dtype is torch.uint8 and pixels.shape[2] == 3 and pixels.is_contiguous()
        assert torch.equal(transform.normalization.numbers(pixels[None])[0], transform(picture))


def test_every_value_of_every_channel_becomes_the_same_number() -> None:
    column = every_byte()
    picture = Image.fromarray(column[0].numpy()).resize((256, 256), Image.Resampling.NEAREST)
    numbers = ImageNetTransform(256, 256).normalization.numbers(column)
    assert torch.equal(numbers[0, :, :, 0], ImageNetTransform(256, 256)(picture)[:, :, 0])
    assert len(set(column.flatten().tolist())) == 256


def test_normalization_is_of_three_numbers_as_the_transform_is_given_them() -> None:
    assert OWN.normalization == Normalization((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    assert RgbTransform().normalization is IDENTITY
    assert Normalization.of(torch.tensor([0, 1, 2]), (1, 1, 1)) == ((0.0, 1.0, 2.0), (1.0, 1.0, 1.0))


# --- who may ----------------------------------------------------------------------------------------------------------


class OwnNumbers(ImageClassifier):
    image_processing = OWN


class OwnAnswers(ImageClassifier):
    def postprocess(self, data: Any) -> list[Any]:
        return super().postprocess(data)


class OwnCallable(ImageClassifier):
    image_processing = staticmethod(lambda picture: torch.zeros(3, 8, 8))


class OwnTransform(ImageClassifier):
    class Brighter(ImageNetTransform):
        def __call__(self, picture: Image.Image) -> torch.Tensor:
            return super().__call__(picture) + 1

    image_processing = Brighter()


class OwnPreprocess(ImageClassifier):
    def preprocess(self, data: Any) -> Any:
        return super().preprocess(data) * 2


class OwnStep(ImageClassifier):
    def _processed(self, file: Any) -> torch.Tensor:
        return super()._processed(file) * 2


class Doubled:
    def preprocess(self, data: Any) -> Any:
        return super().preprocess(data) * 2  # type: ignore[misc]


class OwnMixin(Doubled, ImageClassifier):
    pass


class OwnInstance(ImageClassifier):
    def prepare(self, context: Context) -> None:
        super().prepare(context)
        self.preprocess = lambda data: torch.zeros(1, 3, 8, 8)  # type: ignore[method-assign]


@pytest.mark.parametrize("cls", [ImageClassifier, ImageSegmenter, VisionHandler, OwnNumbers, OwnAnswers])
def test_handler_whose_way_to_numbers_is_ours_sends_bytes(cls: type[VisionHandler], tmp_path: Path) -> None:
    handler, file = prepared(cls(), tmp_path), picture_file("RGB", (90, 70), 1)
    wanted = handler.preprocess([{"body": file}])
    normalization = handler.send_pixels()
    assert normalization == handler.image_processing.normalization
    for body in (file, bytearray(file), base64.b64encode(file).decode()):
        pixels = handler.preprocess([{"body": body}])
        assert pixels.dtype is torch.uint8 and torch.equal(normalization.numbers(pixels), wanted)
    handler.keep_numbers()
    assert torch.equal(handler.preprocess([{"body": file}]), wanted)


@pytest.mark.parametrize("cls", [OwnCallable, OwnTransform, OwnPreprocess, OwnStep, OwnMixin, OwnInstance])
def test_handler_with_a_step_of_its_own_keeps_its_numbers(cls: type[VisionHandler], tmp_path: Path) -> None:
    handler, file = prepared(cls(), tmp_path), picture_file("RGB", (90, 70), 1)
    wanted = handler.preprocess([{"body": file}])
    assert wanted.dtype is torch.float32
    assert handler.send_pixels() is None
    assert torch.equal(handler.preprocess([{"body": file}]), wanted)


def test_transform_that_is_replaced_later_makes_its_own_numbers(tmp_path: Path) -> None:
    handler, file = prepared(OwnNumbers(), tmp_path), picture_file("RGB", (90, 70), 1)
    assert handler.send_pixels() is not None
    handler.image_processing = ImageNetTransform()
    assert torch.equal(handler.preprocess([{"body": file}])[0], ImageNetTransform()(open_picture(file)))


def test_nested_numbers_stay_numbers_also_beside_pictures(tmp_path: Path) -> None:
    handler, file = prepared(OwnNumbers(), tmp_path), picture_file("RGBA", (90, 70), 1)
    nested = torch.randn(3, 32, 32)
    rows = [{"body": nested.tolist()}, {"body": file}]
    wanted = handler.preprocess(rows)
    assert handler.send_pixels() is not None
    assert torch.equal(handler.preprocess(rows[:1])[0], nested)
    assert torch.equal(handler.preprocess(rows), wanted)


# --- a handler that calls the model itself ----------------------------------------------------------------------------


def on_device(handler: VisionHandler, device: str, folder: Path) -> Any:
    prepared(handler, folder).device = torch.device(device)
    return handler


@pytest.mark.parametrize("make", [ImageClassifier, OwnNumbers, OwnPreprocess, OwnCallable, ObjectDetector])
def test_handler_that_calls_its_model_has_the_same_numbers_on_the_device(
    make: Callable[[], VisionHandler], tmp_path: Path, simdev: Any
) -> None:
    files = [picture_file(mode, (90, 70), number) for number, mode in enumerate(("RGB", "L", "CMYK", "P"))]
    rows: list[Any] = [{"body": file} for file in files]
    wanted = prepared(make(), tmp_path).preprocess(rows)
    before = simdev.counters()
    got = on_device(make(), "simdev:0", tmp_path).preprocess(rows)
    moved = simdev.counters()["h2d_bytes"] - before["h2d_bytes"]
    assert got.device.type == "simdev" and got.dtype is torch.float32 and torch.equal(got.cpu(), wanted)
    assert (moved < wanted.nbytes / 3) == make.__module__.startswith("pyserve.")  # type: ignore[attr-defined]


def test_mixed_batch_of_a_handler_that_calls_its_model(tmp_path: Path, simdev: Any) -> None:
    rows: list[Any] = [{"body": torch.randn(3, 224, 224).tolist()}, {"body": picture_file("RGB", (300, 240), 1)}]
    wanted = prepared(ImageClassifier(), tmp_path).preprocess(rows)
    assert torch.equal(on_device(ImageClassifier(), "simdev:0", tmp_path).preprocess(rows).cpu(), wanted)


def test_pictures_of_several_sizes_for_a_detector(tmp_path: Path, simdev: Any) -> None:
    rows: list[Any] = [{"body": picture_file("RGB", size, 1)} for size in ((30, 20), (20, 30))]
    wanted = prepared(ObjectDetector(), tmp_path).preprocess(rows)
    got = on_device(ObjectDetector(), "simdev:0", tmp_path).preprocess(rows)
    assert [each.shape for each in got] == [(3, 20, 30), (3, 30, 20)]
    assert all(torch.equal(left.cpu(), right) for left, right in zip(got, wanted, strict=True))
