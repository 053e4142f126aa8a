"""image_classifier: the numbers a picture becomes, what is said to files that are none, labels and answers."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, ModelLoadError
from pyserve.handlers import image
from pyserve.handlers.image import IMAGENET_MEAN, IMAGENET_STD, ImageNetTransform, center_cropped, open_picture, to_rgb
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.labels import read_labels

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # pytest undoes the filter of pyserve.handlers.image
SEED = int(os.environ.get("PYSERVE_TEST_SEED", "20"))


def context_for(folder: Path, model: Mapping[str, str] | None = None, **config: Any) -> Context:
    return Context("m", str(folder), {"model": dict(model or {})}, model_yaml_config=config)


def batch_of(context: Context, *headers: Mapping[str, str]) -> Context:
    return context.for_batch([f"id-{i}" for i in range(len(headers))], [list(each.items()) for each in headers])


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    print(f"PYSERVE_TEST_SEED={SEED}")
    random = np.random.default_rng(SEED + width * 10_000 + height)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytearray:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return bytearray(file.getvalue())


# --- pictures to numbers ----------------------------------------------------------------------------------------------


def reference_pixels(picture: Image.Image) -> torch.Tensor:
    """torchvision's pipeline: itself if it is installed, else written out from its documentation."""
    picture = picture.convert("RGB")
    if importlib.util.find_spec("torchvision"):
        from torchvision import transforms

        steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
        result: torch.Tensor = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(picture)
        return result
    width, height = picture.size
    size = (256, int(256 * height / width)) if width <= height else (int(256 * width / height), 256)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    pixels = np.array(picture)
    top, left = round((size[1] - 224) / 2.0), round((size[0] - 224) / 2.0)
    pixels = pixels[top : top + 224, left : left + 224]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return tensor.sub_(torch.tensor(IMAGENET_MEAN).view(3, 1, 1)).div_(torch.tensor(IMAGENET_STD).view(3, 1, 1))


@pytest.mark.parametrize(
    "size", [(224, 224), (256, 256), (400, 300), (300, 400), (257, 259), (31, 17), (1, 1), (999, 333), (640, 427)]
)
def test_numbers_are_bit_equal_to_torchvisions(size: tuple[int, int]) -> None:
    picture = photo(*size)
    assert torch.equal(ImageNetTransform()(picture), reference_pixels(picture))


def test_every_byte_value_is_normalised_bit_equal_to_torchvisions() -> None:
    ramp = Image.fromarray(np.arange(256 * 256, dtype=np.uint32).astype(np.uint8).reshape(256, 256)).convert("RGB")
    pixels = ImageNetTransform()(ramp)
    assert torch.equal(pixels, reference_pixels(ramp))
    assert pixels.dtype is torch.float32 and pixels.shape == (3, 224, 224) and pixels.is_contiguous()


def test_crop_larger_than_the_picture_is_padded_with_black_at_the_far_side() -> None:
    white = Image.new("RGB", (5, 8), "white")
    cropped = np.asarray(center_cropped(white, 8))[:, :, 0]
    assert cropped.shape == (8, 8)
    assert (cropped[:, 1:6] == 255).all() and cropped[:, 0].max() == 0 and cropped[:, 6:].max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_pictures_of_every_mode_become_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    decoded = open_picture(encoded(photo(40, 30, mode), kind))
    assert decoded.mode == mode
    assert ImageNetTransform()(decoded).shape == (3, 224, 224)


def test_transparency_is_dropped_not_blended() -> None:
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(open_picture(encoded(clear_red))).getpixel((0, 0)) == (255, 0, 0)


def test_16_bit_grey_keeps_its_high_byte() -> None:
    wide = Image.fromarray(np.full((4, 4), 0x8123, np.uint16))
    for kind in ("PNG", "TIFF"):
        assert to_rgb(open_picture(encoded(wide, kind))).getpixel((0, 0)) == (0x81, 0x81, 0x81)


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(InputError, match="floating-point pixels"):
        to_rgb(Image.new("F", (4, 4)))
    with pytest.raises(InputError, match="32-bit"):
        to_rgb(Image.fromarray(np.full((4, 4), 70_000, np.int32)))


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by a quarter
    assert open_picture(encoded(photo(40, 20), "JPEG", exif=exif)).size == (40, 20)


def test_first_frame_of_a_moving_picture_counts() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    body = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert to_rgb(open_picture(body)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000", "AVIF"])
def test_format_is_decoded(kind: str) -> None:
    module = {"JPEG2000": "jpg_2000", "WEBP": "webp", "AVIF": "avif"}.get(kind)
    if module and not features.check(module):
        pytest.skip(f"this Pillow is built without {kind}")
    assert open_picture(encoded(photo(32, 32), kind)).size == (32, 32)


# --- pictures that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "an empty body"),
        (b"hello world", "not a picture: 11 bytes starting with 'hello world'"),
        (b"\x00\x01\x02\x03", "not a picture: 4 bytes starting with '00 01 02 03'"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>", "not a picture: SVG"),
        (b"<svg width='1'/>", "not a picture: SVG"),
        (b"%PDF-1.7 ...", "not a picture: PDF"),
        (b'{"instances": []}', "a JSON body needs Content-Type: application/json"),
        (b"--abc123\r\nContent-Disposition: form-data", "multipart"),
        (b"\xff\xd8\xff\xe0junk", "JPEG"),
        (b"\x89PNG\r\n\x1a\njunk", "PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "PostScript"),
    ],
)
def test_what_is_no_picture_is_named(body: bytes, text: str) -> None:
    with pytest.raises(InputError) as caught:
        open_picture(bytearray(body))
    assert text in caught.value.message
    assert caught.value.status == 400


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_picture_is_the_clients_error_wherever_it_ends(kind: str) -> None:
    body = encoded(photo(64, 48), kind)
    refused_count = 0
    for end in sorted({*range(1, 40, 3), *range(40, len(body) - 1, max(1, len(body) // 40))}):
        try:
            to_rgb(open_picture(body[:end]))
        except InputError as error:
            refused_count += 1
            assert error.message
    assert refused_count > 10


def test_half_a_jpeg_is_called_truncated() -> None:
    body = encoded(photo(400, 300), "JPEG")
    with pytest.raises(InputError, match=f"truncated JPEG of {len(body) // 2} bytes"):
        open_picture(body[: len(body) // 2])


def test_flipped_bytes_never_raise_another_error() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    random = np.random.default_rng(SEED)
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA"):
        body = encoded(photo(24, 24), kind)
        for _ in range(60):
            damaged = bytearray(body)
            for place in random.integers(0, len(body), 4):
                damaged[place] = random.integers(0, 256)
            try:
                ImageNetTransform()(open_picture(damaged))
            except InputError:
                pass


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_bomb_is_refused_with_both_numbers_before_it_is_decoded(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    body = encoded(Image.new("1", (1, 1)))
    place = body.index(b"IHDR")
    body[place + 4 : place + 17] = header
    body[place + 17 : place + 21] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(InputError, match="too large") as caught:
        open_picture(body)
    assert str(side * side) in caught.value.message
    assert str(image.PIXEL_COUNT_MAX) in caught.value.message


def test_limit_on_pixels_can_be_lifted_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back at the end
    monkeypatch.setattr(image, "PIXEL_COUNT_MAX", 100)
    row = {"body": encoded(photo(20, 20))}
    limited, unlimited = ImageClassifier(), ImageClassifier()
    unlimited.prepare(Context("m", str(tmp_path), limit_max_image_pixels=False))
    limited.prepare(Context("m", str(tmp_path)))
    with pytest.raises(InputError, match="20 x 20 = 400 pixels, the limit is 100"):
        limited.preprocess([row])
    assert unlimited._limit_pixels is False
    assert open_picture(row["body"], limit_pixels=False).size == (20, 20)


def test_thread_of_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="too long and thin"):
        ImageNetTransform()(Image.new("L", (1, 60_000)))


# --- image_classifier -------------------------------------------------------------------------------------------------


class MeanColours(torch.nn.Module):
    """Scores of 3 classes: the mean of each colour, so answers are predictable."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean(dim=(2, 3)) * 4


@pytest.fixture
def classifier(tmp_path: Path) -> ImageClassifier:
    (tmp_path / "index_to_name.json").write_text(json.dumps({"0": ["n0", "red"], "1": ["n1", "green"], "2": "blue"}))
    handler = ImageClassifier()
    handler.prepare(context_for(tmp_path))
    handler.model = MeanColours()
    return handler


def classify(handler: ImageClassifier, *values: Any) -> list[Any]:
    assert handler.context is not None
    rows = [{"body": value} for value in values]
    return handler.handle(rows, batch_of(handler.context, *({} for _ in rows)))


def test_picture_gets_labels_by_descending_probability(classifier: ImageClassifier) -> None:
    (answer,) = classify(classifier, encoded(Image.new("RGB", (300, 300), (250, 120, 10)), "JPEG"))
    assert list(answer) == ["red", "green", "blue"]
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert sum(answer.values()) == pytest.approx(1.0)


def test_bytes_base64_and_form_field_are_the_same_picture(classifier: ImageClassifier) -> None:
    body = encoded(photo(50, 40))
    text = base64.encodebytes(body).decode()
    url = "data:image/png;base64," + base64.b64encode(body).decode()
    expected = classifier.preprocess([{"body": body}])
    for row in ({"data": body}, {"body": bytes(body)}, {"body": memoryview(body)}, {"body": text}, {"data": url}):
        assert torch.equal(classifier.preprocess([row]), expected)


def test_batch_is_the_stacked_rows(classifier: ImageClassifier) -> None:
    bodies = [encoded(photo(50 + i, 40)) for i in range(3)]
    batch = classifier.preprocess([{"body": body} for body in bodies])
    assert batch.shape == (3, 3, 224, 224)
    for i, body in enumerate(bodies):
        assert torch.equal(batch[i : i + 1], classifier.preprocess([{"body": body}]))


def test_preprocess_runs_in_several_threads_at_once(classifier: ImageClassifier) -> None:
    bodies = [encoded(photo(120 + i, 90), "JPEG") for i in range(12)]
    expected = [classifier.preprocess([{"body": body}]) for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda body: classifier.preprocess([{"body": body}]), bodies))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nested_lists_are_taken_as_they_are(classifier: ImageClassifier) -> None:
    values = [[[0.5, 1], [2, 3]]] * 3
    assert torch.equal(classifier.preprocess([{"body": values}]), torch.tensor([values], dtype=torch.float32))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"body": bytearray()}, "empty"),
        ({"body": "@@@"}, "expected base64"),
        ({"body": ""}, "empty"),
        ({"body": {"a": 1}}, "JSON object"),
        ({"body": None}, "null"),
        ({"body": 7}, "number 7"),
        ({"body": [[1, 2], [3]]}, "list"),
        ({"picture": b"x"}, "'picture'"),
        ({}, "none"),
    ],
)
def test_unusable_row_is_the_clients_error(classifier: ImageClassifier, row: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        classifier.preprocess([row])
    assert text in caught.value.message


def test_topk_limits_the_answer_and_fewer_classes_are_fine(classifier: ImageClassifier) -> None:
    body = encoded(photo(30, 30))
    assert len(classify(classifier, body)[0]) == 3  # topk is 5
    classifier.set_max_result_classes(1)
    assert classifier.get_max_result_classes() == 1
    assert len(classify(classifier, body)[0]) == 1
    with pytest.raises(ValueError, match="at least 1"):
        classifier.set_max_result_classes(0)


def test_equal_labels_are_kept_apart(classifier: ImageClassifier) -> None:
    classifier.mapping = {"0": "crane", "1": "crane", "2": "gull"}
    (answer,) = classifier.postprocess(torch.tensor([[1.0, 3.0, 2.0]]))
    assert list(answer) == ["crane", "gull", "crane (0)"]
    assert answer["crane"] > answer["gull"] > answer["crane (0)"]


def test_class_number_is_the_label_without_a_mapping(classifier: ImageClassifier) -> None:
    classifier.mapping = None
    assert list(classifier.postprocess(torch.tensor([[0.0, 1.0]]))[0]) == ["1", "0"]


def test_half_precision_scores_become_probabilities(classifier: ImageClassifier) -> None:
    (answer,) = classifier.postprocess(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16))
    assert sum(answer.values()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("output", [torch.zeros(3), torch.zeros(1, 0), torch.zeros(1, 2, 3), {"out": 1}])
def test_output_that_is_no_scores_is_the_models_fault(classifier: ImageClassifier, output: Any) -> None:
    with pytest.raises(HandlerError, match=r"scores \[batch, classes\]"):
        classifier.postprocess(output)


def test_pictures_are_never_preprocessed_on_the_event_loop(classifier: ImageClassifier) -> None:
    assert not classifier.is_quick(1)


def test_example_picture_is_always_the_same(classifier: ImageClassifier, tmp_path: Path) -> None:
    context = context_for(tmp_path)
    assert classifier.example_input(context).shape == (1, 3, 224, 224)
    assert torch.equal(classifier.example_input(context), ImageClassifier().example_input(context))
    small = context_for(tmp_path, input={"dtype": "float32", "shape": [3, 64, 64]})
    assert classifier.example_input(small).shape == (1, 3, 64, 64)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [{"0": "cat", "1": "dog"}, {"0": ["n1", "cat"], "1": ["n2", "dog"]}, {"object_type_names": ["cat", "dog"]}],
)
def test_labels_are_read_in_every_known_form(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "index_to_name.json"
    path.write_text(json.dumps(content))
    assert read_labels(path) == {"0": "cat", "1": "dog"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not JSON"),
        ("[]", "JSON list"),
        ('{"0": 5}', "class '0' is 5"),
        ('{"0": []}', "class '0' is []"),
        ('{"object_type_names": "cat"}', "not a list"),
        ("\xff", "UTF-8"),
    ],
)
def test_bad_labels_are_a_load_error_that_names_the_file(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "index_to_name.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelLoadError) as caught:
        ImageClassifier().prepare(context_for(tmp_path))
    assert text in caught.value.message and "index_to_name.json" in caught.value.message


def test_missing_labels_are_fine(tmp_path: Path) -> None:
    assert read_labels(tmp_path / "index_to_name.json") is None
